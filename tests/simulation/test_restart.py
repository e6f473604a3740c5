"""Restart files of molecular dynamics: every entry is checked, files are only cut back, structures are recognised."""

import json
import os
import shutil

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import read

from dpa4.output import OutputFolder
from dpa4.simulation import dynamics, run_md

pytestmark = pytest.mark.usefixtures("no_figures")

NUMBER = 4  # atoms
OPTIONS = {"ensemble": "nvt", "tdamp": 20.0, "interval": 5, "progress": False}


def copper() -> Atoms:
    return bulk("Cu", cubic=True)


def resume(folder, atoms: Atoms | None = None, steps: int = 30):
    return run_md(atoms or copper(), EMT(), folder, steps=steps, resume=True, **OPTIONS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run of 20 steps."""
    folder = tmp_path_factory.mktemp("md") / "run"
    run_md(copper(), EMT(), folder, steps=20, **OPTIONS)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


NAN = float("nan")
ENTRIES = (
    "format", "settings", "system", "step", "cell", "positions", "momenta", "random", "baths", "trajectory_bytes",
)  # fmt: skip
CHANGES = [(name, ...) for name in ENTRIES] + [
    ("step", -5), ("step", "x"), ("step", 1e300), ("step", 2.5), ("step", True), ("step", 10**9), ("step", 10**30),
    ("positions", [[0, 0, 0]]), ("positions", "x"), ("positions", [[NAN] * 3] * NUMBER),
    ("positions", [[0, 0]] * NUMBER),
    ("momenta", None), ("momenta", [[NAN] * 3] * NUMBER), ("momenta", [[1e400] * 3] * NUMBER),
    ("random", {}), ("random", 5), ("random", {"bit_generator": "PCG64", "state": {"state": -1, "inc": 1}}),
    ("random", {"bit_generator": "MT19937", "state": {}}),
    ("baths", 5), ("baths", {}), ("baths", {"_thermostat._eta": [0.0]}),
    ("baths", {"_thermostat._eta": [0.0] * 3, "_thermostat._p_eta": [NAN] * 3}),
    ("baths", {"_thermostat._eta": [0.0] * 3, "_thermostat._p_eta": 1.0}),
    ("baths", {"_thermostat._eta": [0.0] * 3, "_thermostat._p_eta": [[0.0], [1.0], "x"]}),
    ("trajectory_bytes", -1), ("trajectory_bytes", 10**12), ("trajectory_bytes", "x"), ("trajectory_bytes", None),
    ("cell", [[1]]), ("cell", [[NAN] * 3] * 3), ("settings", 5), ("settings", {}), ("system", {}), ("system", []),
    ("system", {"elements": ["Cu"]}), ("format", 2), ("format", "x"), ("unknown", 1), ("seconds", -1.0),
]  # fmt: skip


def test_a_restart_file_without_the_time_of_computation_continues(folder):
    """Files of earlier versions lack it; a continued run counts the time of all calls."""
    file = folder / "restart.json"
    state = json.loads(file.read_text())
    assert state.pop("seconds") > 0
    file.write_text(json.dumps(state))
    resume(folder)
    first = json.loads(file.read_text())["seconds"]
    file.write_text(json.dumps(state | {"seconds": 1000.0}))
    resume(folder)
    assert 0 < first < 1000 < json.loads(file.read_text())["seconds"]


@pytest.mark.parametrize(("name", "value"), CHANGES, ids=[f"{n}={str(v)[:20]}" for n, v in CHANGES])
def test_a_restart_file_with_a_changed_entry_is_refused(folder, name, value):
    file = folder / "restart.json"
    state = json.loads(file.read_text())
    assert value is ... or name in state or name == "unknown"
    changed = state | {name: value}
    if value is ...:
        del changed[name]
    file.write_text(json.dumps(changed))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"is damaged|has format 2|choose another folder") as caught:
        resume(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and len(message) < 400
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "null", "\x00" * 100, "[" * 100_000])
def test_restart_files_that_are_none(folder, content):
    (folder / "restart.json").write_text(content)
    with pytest.raises(ValueError, match=r"restart.json is damaged \(.*start again in another folder"):
        resume(folder)


def cut(path, size: int) -> None:
    os.truncate(path, path.stat().st_size - size)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("trajectory.xyz", lambda path: cut(path, 500)),
        ("trajectory.xyz", lambda path: cut(path, 1)),
        ("trajectory.xyz", lambda path: os.truncate(path, 0)),
        ("trajectory.xyz", os.remove),
        ("thermo.csv", os.remove),
        ("thermo.csv", lambda path: cut(path, 30)),
        ("thermo.csv", lambda path: path.write_text("a,b\n1,2\n")),
        ("thermo.csv", lambda path: path.write_text("")),
    ],
)
def test_data_before_the_restart_file_that_are_lost(folder, name, change):
    change(folder / name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        resume(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_killed_at_any_write_of_its_start_can_be_continued_or_started_again(
    finished, tmp_path, monkeypatch
):
    """Die in the first, second, ... write of a run; the command that works next gives the undisturbed run."""

    class Killed(BaseException):
        pass

    writers = ("write_restart", "CsvLog", "write_structures", "flush_to_disk")
    outcomes = []
    for kill in range(9):
        folder = tmp_path / str(kill)
        with monkeypatch.context() as patch:
            calls = []

            def deadly(original, calls=calls, kill=kill):
                def call(*arguments, **options):
                    if len(calls) == kill:
                        raise Killed
                    calls.append(original)
                    return original(*arguments, **options)

                return call

            for name in writers:
                patch.setattr(dynamics, name, deadly(getattr(dynamics, name)))
            with pytest.raises(Killed):
                run_md(copper(), EMT(), folder, steps=20, **OPTIONS)
        begun = (folder / "restart.json").exists()
        outcomes.append(begun)
        run_md(copper(), EMT(), folder, steps=20, resume=begun, **OPTIONS)
        for file in ("trajectory.xyz", "thermo.csv"):
            assert (folder / file).read_bytes() == (finished / file).read_bytes(), (kill, file)
        states = (json.loads((path / "restart.json").read_text()) for path in (folder, finished))
        one, other = (state | {"seconds": 0} for state in states)
        assert one == other, kill
    assert outcomes == [False] + [True] * 8


def test_files_of_a_run_killed_before_its_first_state_are_replaced(tmp_path):
    """Earlier versions wrote the table first."""
    for number, text in enumerate(("", "step,time_ps\n", "step,time_ps\n0,0.0\n")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "thermo.csv").write_text(text)
        (folder / "trajectory.xyz").write_text("4\ncut")
        assert run_md(copper(), EMT(), folder, steps=5, **OPTIONS).finished
        assert len(read(folder / "trajectory.xyz", ":")) == 2
    for name, text in (("trajectory.xyz", "4\n"), ("thermo.csv", "step\n0\n5\n")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(FileExistsError, match="already holds a run; continue it with --resume"):
            run_md(copper(), EMT(), folder, steps=5, **OPTIONS)
        assert (folder / name).read_text() == text


def heavy(atoms: Atoms) -> None:
    atoms.set_masses([60] * NUMBER)


def isolated(atoms: Atoms) -> None:
    atoms.pbc = False


def longer(atoms: Atoms) -> None:
    atoms.set_cell(atoms.cell.array * 1.001)


def gold(atoms: Atoms) -> None:
    atoms.symbols[0] = "Au"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gold, "elements"),
        (heavy, "masses"),
        (isolated, "periodicity"),
        (longer, "box"),
        (lambda atoms: atoms.set_constraint(FixAtoms([0])), "constraints"),
        (lambda atoms: atoms.info.update(charge=1), "charge and spin"),
        (lambda atoms: atoms.info.update(spin_multiplicity=3), "charge and spin"),
    ],
)
def test_another_structure_does_not_go_on(folder, change, message):
    atoms = copper()
    change(atoms)
    with pytest.raises(
        ValueError, match=f"the structure is not that of the run in .*: {message} .* instead of"
    ):
        resume(folder, atoms)


def test_the_last_frame_is_the_same_structure(folder):
    atoms = copper()
    atoms.set_constraint(FixAtoms([0]))
    other = folder.parent / "fixed"
    run_md(atoms, EMT(), other, steps=5, **OPTIONS)
    assert resume(other, read(other / "trajectory.xyz", -1)).steps == 30
    assert resume(folder, read(folder / "trajectory.xyz", -1)).steps == 30


def test_a_box_that_has_changed_goes_on_from_its_first_or_last_form(tmp_path):
    options = {
        "ensemble": "npt",
        "tdamp": 20.0,
        "pdamp": 50.0,
        "pressure": 5.0,
        "interval": 5,
        "progress": False,
    }
    atoms = copper()
    run_md(atoms, EMT(), tmp_path, steps=5, **options)
    assert not np.allclose(atoms.cell.array, copper().cell.array)
    for structure, steps in ((atoms, 10), (copper(), 15)):
        assert run_md(structure, EMT(), tmp_path, steps=steps, resume=True, **options).steps == steps


def test_data_are_on_the_disk_before_the_restart_file(tmp_path, monkeypatch):
    order = []
    for name in ("flush_to_disk", "write_restart"):
        original = getattr(dynamics, name)
        monkeypatch.setattr(
            dynamics,
            name,
            lambda *a, name=name, original=original, **o: (order.append(name), original(*a, **o)),
        )
    original_rows = dynamics.CsvLog.flush_to_disk
    monkeypatch.setattr(
        dynamics.CsvLog, "flush_to_disk", lambda self: (order.append("rows"), original_rows(self))
    )
    run_md(copper(), EMT(), tmp_path, steps=5, **OPTIONS)
    first, *others = order
    assert first == "write_restart"  # there are no data yet
    assert others == ["flush_to_disk", "rows", "write_restart"] * 2


def test_a_second_run_in_the_folder_is_refused(folder):
    with OutputFolder(folder), pytest.raises(BlockingIOError, match="another process is working on"):
        resume(folder)
    assert resume(folder).steps == 30
