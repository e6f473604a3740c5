"""Single rows of an LMDB database of ASE, read at their place in the file by any process."""

import os
from pathlib import Path
from typing import IO

from dpa4.data.ase_json import decode
from dpa4.data.databases import LARGEST_ROW, atoms_of
from dpa4.data.frame import Frame
from dpa4.data.labels import LabelKeys, frame_from_atoms
from dpa4.data.lmdb_file import LmdbFile, Place
from dpa4.data.unpacking import inflate, reason


class LmdbRows:
    """Rows of one ``.aselmdb`` file.

    A process opens the file when it first reads a row, also after a fork and after it received this object.
    """

    def __init__(self, path: Path, group: str, keys: LabelKeys):
        self.path, self.group, self.keys = path, group, keys
        self._opened: tuple[int, IO[bytes], LmdbFile] | None = None

    def __getstate__(self) -> tuple[Path, str, LabelKeys]:
        """Everything but the open file."""
        return self.path, self.group, self.keys

    def __setstate__(self, state: tuple[Path, str, LabelKeys]) -> None:
        """Restore what ``__getstate__`` returned."""
        self.__init__(*state)  # type: ignore[misc]

    def frame(self, number: int, place: Place) -> Frame:
        """Structure and labels of a row, the same as ``read_frames`` returns.

        Raises:
            ValueError: If the row is damaged, would fill the memory, or has a malformed label; the message names it.
        """
        origin = f"{self.path}, row {number}"
        try:
            atoms = atoms_of(decode(self.text(place)) | {"id": number})
        except Exception as error:  # the decoders raise many kinds of errors
            raise ValueError(f"{origin} cannot be read as an ASE database: {reason(error)}") from error
        return frame_from_atoms(atoms, self.keys, self.group, origin)

    def text(self, place: Place) -> str:
        """JSON text of a row."""
        return inflate(self.packed(place), LARGEST_ROW).decode()

    def packed(self, place: Place) -> bytes:
        """Value of a row as it is in the file."""
        return self._file().value(place)

    def places(self) -> "LmdbFile":
        """The open file, whose ``places`` are those of the rows."""
        return self._file()

    def _file(self) -> LmdbFile:
        if self._opened is None or self._opened[0] != os.getpid():
            file = self.path.open("rb")
            self._opened = os.getpid(), file, LmdbFile(file)
        return self._opened[2]
