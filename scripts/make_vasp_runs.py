"""Write a folder of runs in the layout of VASP: copper crystals, surfaces and a free atom, with ASE's EMT potential.

Run ``python scripts/make_vasp_runs.py runs``; it takes seconds. Each run is a folder with POSCAR, INCAR, OUTCAR and
vasprun.xml, as ASE reads them. The numbers are those of the effective medium theory, not of VASP, and the files hold
only what readers of structures, energies, forces and stress need. All random numbers come from ``--seed``; another
seed yields other structures of the same kinds, for a test.

Two runs have the usual troubles: one ionic step whose electronic loop did not converge, and a run that was killed.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms, units
from ase.build import bulk, fcc100, fcc111
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta

ELEMENT = "Cu"
LATTICE = 3.59  # Angstrom, of EMT copper
NELM = 60  # allowed electronic steps
USED = 3  # electronic steps of a converged loop; a real one has about 10
TEMPERATURES = {"300K": 300, "700K": 700, "1100K": 1100, "1500K": 1500}
VOIGT = {"xx": 0, "yy": 1, "zz": 2, "yz": 3, "xz": 4, "xy": 5}


@dataclass(frozen=True)
class Run:
    """Ionic steps of one run, with energy, forces and stress, and its troubles."""

    images: Sequence[Atoms]
    unconverged: frozenset[int] = frozenset()  # numbers of the steps that used all electronic steps
    killed: bool = False  # the files end within the last step


def main() -> None:
    """Write all runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder to create")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    arguments = parser.parse_args()
    folder = arguments.folder
    if folder.exists():
        parser.error(f"{folder} exists; choose another name or remove it")
    count = 0
    for name, run in runs(arguments.seed):
        write_run(folder / name, run)
        count += len(run.images)
    (folder / "README").write_text(
        "Copper with ASE's EMT potential in the layout of VASP, by scripts/make_vasp_runs.py. No numbers of VASP.\n"
    )
    print(f"{count} ionic steps of copper in {folder}")


def runs(seed: int = 0) -> Iterator[tuple[str, Run]]:
    """Yield folder and content of each run: hot and strained crystals, a free atom, two surfaces."""
    for number, (name, temperature) in enumerate(TEMPERATURES.items()):
        crystal = bulk(ELEMENT, cubic=True, a=LATTICE * (1 + 1.8e-5 * temperature)) * (2, 2, 2)
        unconverged = frozenset({4}) if name == "1100K" else frozenset()
        images = list(dynamics(crystal, temperature, 8, 100 * seed + number))
        yield f"bulk/{name}", Run(images, unconverged, killed=name == "1500K")
    rng = np.random.default_rng(100 * seed)
    for number in range(12):
        crystal = bulk(ELEMENT, cubic=True, a=LATTICE) * (2, 2, 1)
        strain = rng.normal(scale=0.02, size=(3, 3))
        crystal.set_cell(crystal.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
        crystal.rattle(0.08, rng=rng)
        yield f"strained/{number:02d}", Run([labelled(crystal)])
    yield f"isolated_atom/{ELEMENT}", Run([labelled(Atoms(ELEMENT, cell=[12, 12, 12]))])
    slabs: dict[str, Callable[..., Atoms]] = {"100": fcc100, "111": fcc111}
    for number, (name, build) in enumerate(slabs.items()):
        slab = build(ELEMENT, (3, 3, 4), a=LATTICE, vacuum=6.0, periodic=True)
        yield f"surface-{name}", Run(list(dynamics(slab, 600, 6, 100 * seed + 10 + number)))


def dynamics(start: Atoms, temperature: float, frames: int, seed: int) -> Iterator[Atoms]:
    """Yield structures of Langevin dynamics, 100 fs apart."""
    rng = np.random.default_rng(seed)
    atoms = start.copy()
    atoms.calc = EMT()
    thermalize_momenta(atoms, 2 * temperature, rng=rng)
    motion = Langevin(
        atoms, 5 * units.fs, friction=0.02 / units.fs, fixcm=False, temperature_K=temperature, rng=rng
    )
    for _ in range(frames):
        motion.run(20)
        yield labelled(atoms)


def labelled(atoms: Atoms) -> Atoms:
    """Copy of a structure as the files state it, with energy, forces and stress of EMT."""
    copy = Atoms(atoms.symbols, np.round(atoms.positions, 5), cell=np.round(atoms.cell.array, 9), pbc=True)
    copy.wrap()
    copy.calc = EMT()
    results = {
        "energy": copy.get_potential_energy(),
        "forces": copy.get_forces(),
        "stress": copy.get_stress(),
    }
    copy.calc = SinglePointCalculator(copy, **results)
    return copy


def write_run(folder: Path, run: Run) -> None:
    """Write the files of one run."""
    folder.mkdir(parents=True)
    ase.io.write(folder / "POSCAR", run.images[0], format="vasp", direct=True)
    (folder / "INCAR").write_text(
        f"NELM = {NELM}\nISIF = 2\nNSW = {len(run.images) if len(run.images) > 1 else 0}\n"
    )
    for name, text in (("OUTCAR", outcar(run)), ("vasprun.xml", vasprun(run))):
        (folder / name).write_text(text)


def outcar(run: Run) -> str:
    """Text of an OUTCAR."""
    first = run.images[0]
    symbol, count = str(first.symbols[0]), len(first)
    head = [
        " vasp.6.0.0 layout; numbers of ASE's EMT potential, by scripts/make_vasp_runs.py",
        f" POTCAR:    EMT {symbol}",
        f" POTCAR:    EMT {symbol}",
        f"   ions per type = {count:15d}",
        "   ISPIN  =      1    spin polarized calculation?",
        f"   NELM   = {NELM:6d};   NELMIN=  2; NELMDL= -5     # of ELM steps",
    ]
    steps = [_outcar_step(k, image, k in run.unconverged) for k, image in enumerate(run.images)]
    if run.killed:
        steps[-1] = steps[-1].partition(" POSITION")[0]
    return "\n".join([*head, *steps]) + "\n"


def _outcar_step(number: int, atoms: Atoms, unconverged: bool) -> str:
    used = NELM if unconverged else USED
    line = "-" * 39
    lines = [f"{line} Iteration {number + 1:6d}({k + 1:4d})  {line}" for k in range(used)]
    end = "EDIFF was not reached (unconverged)" if unconverged else "because EDIFF is reached"
    lines.append(f"{line[:24]} aborting loop {end} {line}")
    stress = -atoms.get_stress() / (0.1 * units.GPa)  # kB, compressive positive
    kilobar = "".join(f"{stress[VOIGT[name]]:12.5f}" for name in ("xx", "yy", "zz", "xy", "yz", "xz"))
    lines += ["  FORCE on cell =-STRESS in cart. coord.  units (eV):", f"  in kB  {kilobar}"]
    lines.append("      direct lattice vectors                 reciprocal lattice vectors")
    inverse = atoms.cell.reciprocal()
    for direct, reciprocal in zip(atoms.cell.array, inverse.array, strict=True):
        lines.append("    " + "".join(f"{x:13.9f}" for x in (*direct, *reciprocal)))
    lines.append(" POSITION                                       TOTAL-FORCE (eV/Angst)")
    lines.append(" " + "-" * 83)
    for position, force in zip(atoms.positions, atoms.get_forces(), strict=True):
        lines.append("".join(f"{x:13.5f}" for x in position) + "".join(f"{x:14.6f}" for x in force))
    energy = atoms.get_potential_energy()
    lines += [
        " " + "-" * 83,
        "  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)",
        "  " + "-" * 51,
        f"  free  energy   TOTEN  = {energy:18.8f} eV",
        "",
        f"  energy  without entropy={energy:18.8f}  energy(sigma->0) ={energy:18.8f}",
        "",
    ]
    return "\n".join(lines)


def vasprun(run: Run) -> str:
    """Text of a vasprun.xml."""
    first = run.images[0]
    atoms = "".join(f"<rc><c>{symbol}</c><c>1</c></rc>\n" for symbol in first.symbols)
    head = f"""<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <generator><i name="program" type="string">scripts/make_vasp_runs.py, numbers of ASE's EMT potential</i></generator>
 <kpoints>
  <generation param="Gamma"><v type="int" name="divisions">1 1 1</v></generation>
  <varray name="kpointlist"><v>0.0 0.0 0.0</v></varray>
  <varray name="weights"><v>1.0</v></varray>
 </kpoints>
 <parameters><i type="int" name="NELM">{NELM:6d}</i></parameters>
 <atominfo>
  <atoms>{len(first)}</atoms>
  <array name="atoms"><dimension dim="1">ion</dimension>
   <field type="string">element</field><field type="int">atomtype</field>
   <set>
{atoms}   </set>
  </array>
 </atominfo>
 <structure name="initialpos">
{_structure(first)} </structure>
"""
    steps = [_vasprun_step(image, k in run.unconverged) for k, image in enumerate(run.images)]
    if run.killed:
        return head + "".join(steps[:-1]) + steps[-1].partition(" <structure>")[0]
    final = f' <structure name="finalpos">\n{_structure(run.images[-1])} </structure>\n'
    return head + "".join(steps) + final + "</modeling>\n"


def _vasprun_step(atoms: Atoms, unconverged: bool) -> str:
    energy = atoms.get_potential_energy()
    energies = (
        f'<energy><i name="e_fr_energy">{energy:16.8f}</i><i name="e_wo_entrp">{energy:16.8f}</i>'
        f'<i name="e_0_energy">{energy:16.8f}</i></energy>\n'
    )
    stress = -atoms.get_stress(voigt=False) / (0.1 * units.GPa)
    return (
        " <calculation>\n"
        + f" <scstep>{energies}</scstep>\n" * (NELM if unconverged else USED)
        + f" <structure>\n{_structure(atoms)} </structure>\n"
        + _varray("forces", atoms.get_forces())
        + _varray("stress", stress)
        + f" {energies} </calculation>\n"
    )


def _structure(atoms: Atoms) -> str:
    cell = f"  <crystal>\n{_varray('basis', atoms.cell.array)}  </crystal>\n"
    return cell + _varray("positions", atoms.get_scaled_positions())


def _varray(name: str, rows: np.ndarray) -> str:
    lines = "".join(f"   <v>{' '.join(f'{x:16.8f}' for x in row)}</v>\n" for row in rows)
    return f'  <varray name="{name}">\n{lines}  </varray>\n'


if __name__ == "__main__":
    main()
