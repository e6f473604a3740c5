"""Files opened for reading, plain or compressed: unpacked as a stream and up to a limit, with any byte-order mark."""

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

# A small file can unpack to terabytes. Structures and results of the published benchmarks shrink by a factor of 3
# to 20, and deflate reaches 1,000 only with constant content.
HIGHEST_RATIO = 100
ALWAYS_ALLOWED = 2**26  # bytes, whatever the ratio
LONGEST_LINE = 2**25  # characters

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def name_without_compression(path: Path) -> Path:
    """Return the path without a suffix .gz, .bz2 or .xz."""
    return path.with_suffix("") if path.suffix.lower() in _OPENERS else path


def unpacked_limit(packed: int) -> int:
    """Largest allowed number of bytes that ``packed`` compressed bytes may unpack to."""
    return max(ALWAYS_ALLOWED, HIGHEST_RATIO * packed)


def size_limit(path: Path) -> int:
    """Largest allowed number of bytes of a file after unpacking; of a file that is not compressed its size."""
    size = path.stat().st_size
    return unpacked_limit(size) if path.suffix.lower() in _OPENERS else size


@contextmanager
def open_binary(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file that may be compressed with gzip, bzip2 or xz.

    Reading raises a ValueError beyond ``unpacked_limit`` of the file's size.
    """
    opener, limit = _OPENERS.get(path.suffix.lower()), size_limit(path)
    with (opener or open)(path, "rb") as file:
        yield _BoundedReader(_LimitedStream(file, str(path), limit), 2**20)


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a text file that may be compressed; the limits are those of ``open_binary``.

    The text is UTF-8, or as its byte-order mark says; the mark is removed.
    """
    with open_binary(path) as file:
        yield as_text(file)


def as_text(file: io.BufferedReader) -> io.TextIOWrapper:
    """Decode a binary stream as UTF-8, or as its byte-order mark says; the mark is removed."""
    return io.TextIOWrapper(file, encoding=encoding_of(file.peek(4)))


def encoding_of(start: bytes) -> str:
    """Encoding of a text that begins with these bytes: by its byte-order mark, otherwise UTF-8."""
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")


def lines_of(stream: TextIO) -> Iterator[str]:
    """Yield the lines of a text.

    Raises:
        ValueError: If a line is longer than ``LONGEST_LINE``, as in a file that is not a text.
    """
    while line := stream.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE:
            raise ValueError(
                f"a line is longer than {LONGEST_LINE:,} characters; this is no file of structures"
            )
        yield line


def archive_members(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, TextIO]]:
    """Yield name and text of the members of a zip archive whose names end with one of the suffixes.

    Nothing is written to the disk, so the name of a member may be anything. All members together must not exceed
    ``unpacked_limit`` of the size of the archive: members may overlap.
    """
    left = unpacked_limit(path.stat().st_size)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith(suffixes):
                with archive.open(member) as unpacked:
                    stream = _LimitedStream(unpacked, f"{path}, {member.filename}", left)
                    yield member.filename, as_text(_BoundedReader(stream, 2**20))
                    left -= stream.tell()


def inflate(packed: bytes, limit: int) -> bytes:
    """Unpack a value that was compressed with zlib.

    Raises:
        ValueError: If the unpacked value has more than ``limit`` bytes, or is incomplete.
        zlib.error: If the value is damaged.
    """
    engine = zlib.decompressobj()
    value = engine.decompress(packed, max(limit, 1))
    if not engine.eof:
        raise ValueError(
            f"its {len(packed):,} compressed bytes "
            + (f"unpack to more than {limit:,} bytes" if engine.unconsumed_tail else "are incomplete")
        )
    return value


def reason(error: Exception) -> str:
    """Message of an error in one line, preceded by the kind of error unless it is a ValueError."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 500 else text[:500] + "..."
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}".removesuffix(": ")


class _BoundedReader(io.BufferedReader):
    """Buffered reader that does not allocate more than its stream can have left, whatever size a file declares."""

    raw: "_LimitedStream"

    def read(self, size: int | None = -1, /) -> bytes:
        left = self.raw.limit - self.tell()
        return super().read(size if size is None or size < 0 else min(size, max(left, 1)))


class _LimitedStream(io.RawIOBase):
    """Binary stream of unpacked bytes, which raises a ValueError when more than ``limit`` bytes are read."""

    def __init__(self, unpacked: IO[bytes], name: str, limit: int):
        self._unpacked, self.name, self.limit = unpacked, name, limit

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._unpacked.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:  # unpacks everything at once
            raise io.UnsupportedOperation("a compressed file cannot be read from its end; unpack it first")
        return self._unpacked.seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._unpacked.read(len(buffer))
        if self.tell() > self.limit:
            raise ValueError(
                f"it unpacks to more than {self.limit:,} bytes, far more than structures do; if it is genuine, "
                "unpack it and read the unpacked file"
            )
        buffer[: len(data)] = data
        return len(data)
