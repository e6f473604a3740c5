"""Keep one checkpoint and one training state of the current format versions in tests/data/checkpoints.

Run ``OMP_NUM_THREADS=1 python scripts/make_old_checkpoint.py`` in the environment of the tests after raising
``FORMAT_VERSION`` (dpa4.potential.checkpoint) or ``STATE_FORMAT`` (dpa4.training.state). The script writes what is
missing for the current versions, with the energy and forces that the files give, and never replaces a file: later
versions of dpa4 must read what this one wrote.
"""

import gzip
import sys
import tempfile
from pathlib import Path

import ase.io

from dpa4.data.coverage import Coverage
from dpa4.model import Bridging
from dpa4.potential.checkpoint import FORMAT_VERSION, save_potential
from dpa4.training.state import STATE_FORMAT

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import molecule, random_potential  # noqa: E402
from kept_files import (  # noqa: E402
    ALL_STEPS,
    DATA,
    SAVED_STEPS,
    checkpoint_file,
    evaluate,
    state_file,
    training_run,
    write_results,
)


def structure_of(atoms: ase.Atoms) -> dict:
    """Return numbers and positions (Angstrom) as JSON values."""
    return {"numbers": atoms.numbers.tolist(), "positions": atoms.positions.round(6).tolist()}


def make_checkpoint(path: Path) -> None:
    """Save a random potential with options of every kind: nested, of tuples, of numbers and switches."""
    potential = random_potential(
        bridging=Bridging(r_inner=0.6, r_outer=1.0),
        excluded_pairs=(("H", "O"),),
        l_schedule=(2, 1),
        channels=4,
        mixing_layers=2,
        n_focus=2,
        edge_norm=True,
        message_node_so3=True,
        charge_spin=True,
        default_charge_spin=(1, 2),
    ).float()
    potential.coverage = Coverage(4.0, ("H", "C", "O"), {("H", "H"): 0.74, ("H", "C"): 1.05})
    save_potential(potential, path, {"data": "random weights"})
    structure = structure_of(molecule())
    write_results(path, structure, evaluate(path, structure))


def make_state(path: Path) -> None:
    """Interrupt a short training run, keep its state, and record the model of the resumed run."""
    if not DATA.exists():
        frames = ase.io.read(ROOT / "examples/organic/train.xyz", index=":")
        ase.io.write(DATA, [atoms for atoms in frames if str(atoms.symbols) == "COH4"][:8])
    with tempfile.TemporaryDirectory() as name:
        run = training_run(Path(name), SAVED_STEPS)
        path.write_bytes(gzip.compress((run / "last.pt").read_bytes(), mtime=0))
        training_run(Path(name), ALL_STEPS, resume=True)
        structure = structure_of(ase.io.read(DATA, index=0))
        write_results(path, structure, evaluate(run / "last.safetensors", structure))


def main() -> None:
    """Make the files that are missing."""
    for path, make in (
        (checkpoint_file(FORMAT_VERSION), make_checkpoint),
        (state_file(STATE_FORMAT), make_state),
    ):
        if path.exists():
            print(f"{path.name} exists already")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
            path.chmod(0o644)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
