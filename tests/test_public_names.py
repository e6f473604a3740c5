"""Public names: complete, the same object as in their own module, visible to type checkers, imported at first use."""

import ast
import importlib
import json
import subprocess
import sys
from types import ModuleType

import pytest

import dpa4
import dpa4.interfaces
import dpa4.simulation

PACKAGES = [dpa4, dpa4.interfaces, dpa4.simulation]
IDS = [package.__name__ for package in PACKAGES]


def seen_by_type_checkers(package: ModuleType) -> dict[str, str]:
    """Module of every name that is imported in the TYPE_CHECKING block."""
    with open(str(package.__file__), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {
        alias.asname or alias.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def run(code: str) -> list[str]:
    """Run code in a fresh interpreter and return the JSON it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_names_of_the_package():
    assert dpa4.__all__ == sorted(
        "DPA4Calculator load_potential Potential save_potential train evaluate "
        "relax run_md run_neb phonons elastic_tensor equation_of_state screen".split()
    )


@pytest.mark.parametrize("package", PACKAGES, ids=IDS)
def test_type_checkers_see_the_same_names(package):
    assert seen_by_type_checkers(package) == dict(package._homes)
    assert sorted(package._homes) == sorted(package.__all__)
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.parametrize("package", PACKAGES, ids=IDS)
def test_names_are_the_objects_of_their_modules(package):
    for name, home in package._homes.items():
        if name == "screen":
            pytest.importorskip("torch_sim")
        value = getattr(importlib.import_module(home), name)
        assert getattr(package, name) is value
        assert callable(value) and not isinstance(value, ModuleType)
        assert value.__module__.startswith(home)


@pytest.mark.parametrize("package", PACKAGES, ids=IDS)
def test_unknown_names_are_attribute_errors(package):
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'relaxx'"):
        _ = package.relaxx


def test_importing_the_packages_does_not_import_torch():
    code = "import json, sys, dpa4, dpa4.simulation; dir(dpa4); print(json.dumps(sorted(sys.modules)))"
    loaded = {name.partition(".")[0] for name in run(code)}
    assert "dpa4" in loaded and not loaded & {"torch", "numpy", "ase", "scipy", "pydantic"}


def test_a_function_wins_over_the_submodule_of_its_name():
    code = (
        "import json, dpa4.simulation.relax, dpa4.simulation as s; from dpa4.simulation import relax, eos;"
        "print(json.dumps([type(s.relax).__name__, type(relax).__name__, type(eos).__name__]))"
    )
    assert run(code) == ["function", "function", "module"]
