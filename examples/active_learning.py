"""Active learning on the bundled data: train on 50 structures, run dynamics, label what the committee doubts, repeat.

Run ``python examples/active_learning.py`` from the repository; it needs the package tblite and about a quarter of an
hour on one core. Run it again to continue after an interruption. The folder active-learning then holds the models and
dynamics of every round, errors.csv and errors.png. docs/active-learning.md describes the same loop with commands.

The errors are those of forces on test structures from dynamics at 300 to 1200 K. As a control, a second committee is
trained on as many structures taken at random from the same dynamics.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read, write
from rich.console import Console

from dpa4 import DPA4Calculator, evaluate, load_potential, run_md
from dpa4.data import read_frames, with_results, write_structures
from dpa4.output import new_figure, save_figure, write_csv
from dpa4.potential.committee import member_files
from dpa4.simulation import select
from dpa4.training import RunConfig, train_committee

DATA = Path(__file__).resolve().parent / "organic"
MOLECULES = ("methanol", "ethanol", "dimethyl-ether", "acetaldehyde", "acetic-acid")
MODEL = {"preset": "nano", "cutoff": 4.5, "edge_norm": False}
MEMBERS = 3
START = 50  # structures of dynamics at 300 K to begin with
ADDED = 25  # structures labelled in each round
STOP_ABOVE = 1.0  # eV/Angstrom, where errors are about 5 eV/Angstrom according to calibration.json
MAX_FORCE = 10.0  # eV/Angstrom; structures with larger forces are not used


def bundled(name: str, kinds: tuple[str, ...]) -> list[Atoms]:
    """Structures of the molecules in a bundled file, of some kinds."""
    frames = read(DATA / name, ":")
    return [a for a in frames if a.info["config_type"] in MOLECULES and a.info["kind"] in kinds]


def label(atoms: Atoms) -> Atoms | None:
    """Energy and forces of GFN2-xTB, as in scripts/make_dataset.py; None if that fails or a force is huge."""
    from tblite.ase import TBLite

    bare = Atoms(atoms.numbers, atoms.positions.round(6))
    bare.calc = TBLite(method="GFN2-xTB", accuracy=0.01, verbosity=0)
    try:
        energy, forces = bare.get_potential_energy(), bare.get_forces()
    except RuntimeError:  # the charges do not converge
        return None
    labelled = with_results(bare, energy=energy, forces=forces)
    return labelled if np.abs(forces).max() < MAX_FORCE else None


def labelled(structures: list[Atoms], number: int) -> list[Atoms]:
    """Labels of the first structures that can be labelled."""
    found: list[Atoms] = []
    for atoms in structures:
        if len(found) < number and (frame := label(atoms)) is not None:
            found.append(frame)
    return found


def train_on(structures: list[Atoms], folder: Path, steps: int) -> Path:
    """Train a committee, or finish its training; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    atoms = [a for a in read(DATA / "train.xyz", ":") if a.info["config_type"] == "IsolatedAtom"]
    write(folder / "train.xyz", [*atoms, *structures])
    write(folder / "valid.xyz", bundled("valid.xyz", ("md-300K", "md-600K", "md-1200K")))
    config = RunConfig.model_validate(
        {
            "model": MODEL,
            "data": {"train": str(folder / "train.xyz"), "validation": str(folder / "valid.xyz")},
            "training": {
                "steps": steps,
                "batch_size": 5,
                "learning_rate": 1e-2,
                "validation_interval": steps // 4,
            },
            "output": str(folder / "committee"),
        }
    )
    known = (folder / "committee").is_dir()
    return train_committee(config, MEMBERS, resume=known, console=Console(quiet=True))


def dynamics(
    committee: Path, starts: list[Atoms], folder: Path, steps: int, temperature: float
) -> list[Atoms]:
    """Frames of Langevin dynamics from each structure."""
    calculator = DPA4Calculator(committee, neighbor_skin=1.0)
    frames: list[Atoms] = []
    for number, atoms in enumerate(starts):
        output = folder / f"md-{number}"
        run_md(
            atoms.copy(), calculator, output, steps=steps, ensemble="langevin", temperature=temperature,
            friction=0.02, interval=5, stop_above=STOP_ABOVE, seed=number, resume=output.is_dir(),
        )  # fmt: skip
        frames += read(output / "trajectory.xyz", "1:")
    return frames


def errors(committee: Path, folder: Path) -> dict[str, float]:
    """Errors of the mean of a committee on the test structures, in meV/Angstrom and meV/atom."""
    write(folder / "test.xyz", bundled("test.xyz", ("md-300K", "md-600K", "md-1200K")))
    potentials = [load_potential(file) for file in member_files(committee)]
    table = evaluate(potentials, read_frames(folder / "test.xyz"), output=folder / "eval")
    rows = {name: table.row(name) for name in ("forces", "energy per atom")}
    return {
        f"{name} {kind}": getattr(row, kind) for name, row in rows.items() if row for kind in ("mae", "rmse")
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the force errors of both committees against the number of training structures."""
    figure = new_figure(5.5, 4)
    axis = figure.subplots()
    for choice, style in (("deviation and diversity", "o-"), ("random", "s--")):
        points = [(r["structures"], r["forces rmse"]) for r in rows if r["choice"] in (choice, "start")]
        axis.plot(
            *zip(*points, strict=True),
            style,
            label=f"added by {choice}" if choice != "random" else "added at random",
        )
    axis.set(xlabel="structures to train on", ylabel="force error (RMSE, meV/Å)", ylim=(0, None))
    axis.legend()
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def main() -> None:
    """Run the loop and print the errors of every round."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("active-learning"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300, help="training steps of each member")
    parser.add_argument("--md-steps", type=int, default=400, help="steps of dynamics from each molecule")
    parser.add_argument("--temperature", type=float, default=1000.0, help="temperature of the dynamics, in K")
    arguments = parser.parse_args()
    output = arguments.output

    rng = np.random.default_rng(0)
    pool = bundled("train.xyz", ("md-300K",))
    start = [pool[i] for i in sorted(rng.permutation(len(pool))[:START])]
    committee = train_on(start, output / "start", arguments.steps)
    rows = [{"choice": "start", "structures": len(start)} | errors(committee, output / "start")]
    print(rows[-1], flush=True)

    selected, random = list(start), list(start)
    first = {a.get_chemical_formula() + a.info["config_type"]: a for a in start}
    for number in range(1, arguments.rounds + 1):
        folder = output / f"round-{number}"
        frames = dynamics(committee, list(first.values()), folder, arguments.md_steps, arguments.temperature)
        potentials = [load_potential(file) for file in member_files(committee)]
        # A few more than needed, because some cannot be labelled.
        select(frames, potentials, folder / "select", number=ADDED + 10, below=STOP_ABOVE, known=selected)
        selected += labelled(read(folder / "select" / "selected.xyz", ":"), ADDED)
        random += labelled([frames[i] for i in rng.permutation(len(frames))], ADDED)
        for choice, structures in (("deviation and diversity", selected), ("random", random)):
            place = folder / choice.partition(" ")[0]
            trained = train_on(structures, place, arguments.steps)
            rows.append({"choice": choice, "structures": len(structures)} | errors(trained, place))
            print(rows[-1], flush=True)
            if choice != "random":
                committee = trained
    write_csv(output / "errors.csv", list(rows[0]), rows)
    write_structures(output / "selected.xyz", selected)
    plot(rows, output / "errors.png")


if __name__ == "__main__":
    main()
