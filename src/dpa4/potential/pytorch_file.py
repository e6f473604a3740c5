"""Files of ``torch.save`` that anybody may have written."""

import io
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dpa4.parsing import first_line


def load_pytorch(path: Path) -> Any:
    """Read a file of ``torch.save`` onto the CPU: tensors and plain containers, never code.

    Raises:
        ValueError: If the file is damaged or not written by PyTorch, holds other objects, or would need more memory
            than its own size.
    """
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    if not zipped:
        raise ValueError(
            f"cannot read {path}: it is damaged, or in the format of PyTorch before 1.6, which has no checksums; "
            "load such a file with PyTorch and save it again"
        )
    _check_archive(path)
    try:
        return torch.load(_rewritten(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"cannot read {path}: it is damaged, or holds Python objects besides tensors, which are not read "
            f"because loading them could run foreign code ({first_line(error)})"
        ) from error
    except Exception as error:  # a damaged file raises errors of many kinds
        raise ValueError(
            f"cannot read {path}: it is damaged, incomplete or not a PyTorch checkpoint ({first_line(error)})"
        ) from error


def _check_archive(path: Path) -> None:
    """Compare the entries of a zip archive with the size of the file, and their content with their checksums.

    PyTorch stores its tensors uncompressed. It checks no checksums.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            frozen = _frozen_kind([entry.filename for entry in entries])
            damaged = None if frozen or packed or unpacked > size else archive.testzip()
            if damaged is None and not (frozen or packed or unpacked > size):
                _check_storages(archive)
    except Exception as error:  # a damaged archive raises errors of many kinds
        raise ValueError(
            f"cannot read {path}: it is damaged, incomplete or not a PyTorch checkpoint ({first_line(error)})"
        ) from error
    if frozen:
        raise ValueError(
            f"cannot read {path}: it is a frozen {frozen} model; use the checkpoint it was frozen from"
        )
    if packed or unpacked > size:
        raise ValueError(
            f"cannot read {path}: its {size:,} bytes would unpack to {unpacked:,} bytes; PyTorch stores its files "
            "uncompressed"
        )
    if damaged is not None:
        raise ValueError(
            f"cannot read {path}: it is damaged, the checksum of its part {damaged!r} is wrong; copy it again"
        )


def _frozen_kind(parts: list[str]) -> str | None:
    """Kind of a compiled model, by the names of the parts of its archive; None for tensors and containers."""
    if any(part.endswith("/constants.pkl") for part in parts):
        return "TorchScript"
    if any(part.endswith("/archive_format") or "data/aotinductor/" in part for part in parts):
        return "AOTInductor (.pt2)"
    return None


def _rewritten(path: Path) -> io.BytesIO:
    """Copy of an archive with new headers.

    PyTorch trusts other headers than Python's library does. Where they disagree, it returns uninitialised memory.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as clean:
        for entry in archive.infolist():
            clean.writestr(entry.filename, archive.read(entry))
    copy.seek(0)
    return copy


def _check_storages(archive: zipfile.ZipFile) -> None:
    """Compare the lengths of the tensors' data with the entries that hold them.

    PyTorch leaves memory uninitialised where an entry is too short.

    Raises:
        ValueError: If an entry has another length.
    """
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    pickles = [name for name in sizes if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} parts named data.pkl instead of one")
    (name,) = pickles
    finder = _StorageFinder(io.BytesIO(archive.read(name)))
    finder.load()
    for _, kind, key, _, count in finder.found:
        stored = sizes[f"{name.removesuffix('.pkl')}/{key}"]
        itemsize = _ITEM_SIZES[kind.__name__]
        if stored != count * itemsize:
            raise ValueError(f"part data/{key} has {stored} bytes instead of {count * itemsize}")


_ITEM_SIZES = {
    "UntypedStorage": 1,
    "BoolStorage": 1,
    "ByteStorage": 1,
    "CharStorage": 1,
    "ShortStorage": 2,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "IntStorage": 4,
    "FloatStorage": 4,
    "LongStorage": 8,
    "DoubleStorage": 8,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
}


class _Inert:
    """Replacement for every class and function that a pickle names, so that none of them runs."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _StorageFinder(pickle._Unpickler):  # in Python: the one in C allocates whatever a file says
    """Finds the storages that a file of ``torch.save`` refers to, without making anything else of it."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.found: list[Any] = []

    def find_class(self, module: str, name: str) -> Any:
        # A class of storages or tensors that is called would return uninitialised memory.
        return SimpleNamespace(__name__=name) if name.endswith(("Storage", "Tensor")) else _Inert

    def persistent_load(self, pid: Any) -> None:
        self.found.append(pid)
