"""Write the data and crystals of docs/silicon.md from the silicon structures of the mlearn data set.

    python scripts/make_silicon_data.py DATA OUT

DATA is one of these folders:

* a folder with ``Si/training.json`` and ``Si/test.json``, or that folder ``Si``: the files of mlearn
  (https://github.com/materialsvirtuallab/mlearn, folder ``data``);
* a folder with ``mlearn/Si_train.xyz`` and ``mlearn/Si_test.xyz``, or that folder ``mlearn``: the same structures as
  extended XYZ, in eV and Angstrom, with the stress as in ASE.

OUT receives Si_train.xyz and Si_test.xyz, with energy, forces, stress and group, and the crystals si.xyz,
si-primitive.xyz and si64.xyz.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read

from dpa4.data.writers import write_structures

KILOBAR = 0.1 * units.GPa
VASP_ORDER = [0, 1, 2, 4, 5, 3]
"""Places of xx, yy, zz, yz, xz, xy in the order of VASP, which is xx, yy, zz, xy, yz, xz."""

NAMES = {"Si_train.xyz": "training.json", "Si_test.xyz": "test.json"}
"""Files to write, and their names in mlearn."""

CRYSTALS = {
    "si.xyz": bulk("Si", "diamond", 5.43, cubic=True),
    "si-primitive.xyz": bulk("Si", "diamond", 5.43),
    "si64.xyz": bulk("Si", "diamond", 5.4688, cubic=True).repeat(2),
}
"""Crystals of the commands of the page."""


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder to read")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to; created if it is missing")
    arguments = parser.parse_args()
    try:
        sets = read_sets(arguments.data)
    except FileNotFoundError as error:
        parser.error(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, structures in sets.items():
        write_structures(arguments.out / name, structures)
        print(f"{arguments.out / name}: {len(structures)} structures")
    for name, crystal in CRYSTALS.items():
        write_structures(arguments.out / name, [crystal])
    print(f"crystals in {arguments.out}: {', '.join(CRYSTALS)}")


def read_sets(data: Path) -> dict[str, list[Atoms]]:
    """Read the structures of each file to write.

    Raises:
        FileNotFoundError: If the folder has the files in neither form.
    """
    layouts: list[tuple[Path, dict[str, str], Callable[[Path], list[Atoms]]]] = [
        (folder, NAMES, read_json) for folder in (data / "Si", data)
    ]
    layouts += [(folder, {name: name for name in NAMES}, read_xyz) for folder in (data / "mlearn", data)]
    for folder, names, reader in layouts:
        if all((folder / source).is_file() for source in names.values()):
            return {name: reader(folder / source) for name, source in names.items()}
    raise FileNotFoundError(
        f"{data} has neither Si/training.json and Si/test.json nor mlearn/Si_train.xyz and mlearn/Si_test.xyz"
    )


def read_json(file: Path) -> list[Atoms]:
    """Read a JSON file of mlearn."""
    return [from_entry(entry) for entry in json.loads(file.read_text(encoding="utf-8"))]


def from_entry(entry: Mapping[str, Any]) -> Atoms:
    """Structure of an entry of mlearn, with energy (eV), forces (eV/Angstrom) and stress (eV/Angstrom^3).

    The stress of an entry is in kbar, positive under compression, in the order of VASP.
    """
    structure, outputs = entry["structure"], entry["outputs"]
    sites = structure["sites"]
    atoms = Atoms(
        [site["species"][0]["element"] for site in sites],
        [site["xyz"] for site in sites],
        cell=structure["lattice"]["matrix"],
        pbc=True,
        info={"group": entry["group"]},
    )
    atoms.calc = SinglePointCalculator(
        atoms,
        energy=outputs["energy"],
        forces=np.array(outputs["forces"]),
        stress=-KILOBAR * np.array(outputs["virial_stress"])[VASP_ORDER],
    )
    return atoms


def read_xyz(file: Path) -> list[Atoms]:
    """Read structures whose labels are in the units and with the signs of ASE already."""
    return list(read(file, ":"))


if __name__ == "__main__":
    main()
