"""Frames of dynamics on which a committee disagrees: saved for labelling, or the end of the run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from ase import Atoms

from dpa4.data import write_structures
from dpa4.interfaces.ase import deviations_of
from dpa4.output import flush_to_disk
from dpa4.potential.committee import largest_force_deviation

UNCERTAIN = "uncertain.xyz"


class UncertainFrames:
    """Thresholds of the largest deviation of the force on an atom, and the file of frames above one of them.

    Attributes:
        path: The file.
        exceeded: Deviation above ``stop_above`` that ended the run, in eV/Angstrom; None until then.
    """

    def __init__(self, folder: Path, save_above: float | None, stop_above: float | None, is_committee: bool):
        """Check the thresholds; no file is touched.

        Args:
            folder: Output folder of the run.
            save_above: Deviation in eV/Angstrom above which frames are written to the file; None: no frame.
            stop_above: Deviation in eV/Angstrom above which the run ends; None: never.
            is_committee: True if the calculator has deviations.

        Raises:
            ValueError: If a threshold is not positive, or there is no committee.
        """
        for name, value in (("save_above", save_above), ("stop_above", stop_above)):
            if value is not None and not is_committee:
                raise ValueError(
                    f"{name} = {value} eV/Angstrom compares the deviation of a committee, but there is one model; "
                    "give several"
                )
            if value is not None and not 0 < value < np.inf:
                raise ValueError(f"{name} must be a positive deviation in eV/Angstrom, got {value}")
        self.path = folder / UNCERTAIN
        self.exceeded: float | None = None
        self._save_above, self._stop_above = save_above, stop_above
        self._last_step = -1  # of the frames in the file

    @property
    def size(self) -> int:
        """Size of the file, in bytes; 0 if there is none."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def count(self) -> int:
        """Number of frames in the file, those before a restart included."""
        if not self.path.is_file():
            return 0
        with self.path.open(encoding="utf-8") as file:
            return sum("Properties=species" in line for line in file)

    def start_anew(self) -> None:
        """Remove the file of an earlier run."""
        self.path.unlink(missing_ok=True)

    def save(self, frame: Atoms) -> None:
        """Append a frame to the file if its deviation is above ``save_above``."""
        if self._save_above is not None and frame.info["max_force_std"] > self._save_above:
            self._append(frame)

    def watch(self, atoms: Atoms, frame: Callable[[], Atoms]) -> None:
        """Compare the current deviation with ``stop_above``; if it is larger, save the frame and note the deviation.

        Args:
            atoms: Structure with the calculator.
            frame: Function that returns the structure with its results.
        """
        if self._stop_above is None:
            return
        atoms.get_forces(
            apply_constraint=False
        )  # cached, unless the last results are those of another structure
        deviation = largest_force_deviation(deviations_of(atoms.calc)["forces_std"])
        if deviation > self._stop_above:
            self.exceeded = deviation
            self._append(frame())

    def flush_to_disk(self) -> None:
        """Wait until the file is on the disk."""
        if self.path.is_file():
            flush_to_disk(self.path)

    def _append(self, frame: Atoms) -> None:
        if frame.info["step"] > self._last_step:
            write_structures(self.path, frame, append=True)
            self._last_step = frame.info["step"]
