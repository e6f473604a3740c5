"""Files in the layout of VASP, from scripts/make_vasp_runs.py."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
from ase import Atoms
from ase.build import bulk


def _script() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "scripts" / "make_vasp_runs.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _script()
"""The script as a module."""


def copper(seed: int) -> Atoms:
    """Rattled, strained cell of four copper atoms with energy, forces and stress."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True)
    atoms.set_cell(atoms.cell.array * (1 + 0.02 * rng.normal(size=3)), scale_atoms=True)
    atoms.rattle(0.1, rng=rng)
    return script.labelled(atoms)


def write_run(
    folder: Path, steps: int = 3, seed: int = 0, only: str | None = None, **troubles
) -> list[Atoms]:
    """Write a run of some steps, all files or one, and return its structures."""
    images = [copper(seed + k) for k in range(steps)]
    script.write_run(folder, script.Run(images, **troubles))
    for path in folder.iterdir() if only else ():
        if path.name != only:
            path.unlink()
    return images
