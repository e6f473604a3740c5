"""Reader of LMDB data files, which trusts no number in them.

LMDB itself maps the file into memory and follows its page numbers and sizes unchecked: a copy that is cut off, or a
damaged page, ends the process with SIGBUS. Here every page and value is read from the file by offset and size, and a
read beyond the end is an error. Only what ASE's databases need is read: the entries of the main tree.

Layout of the file (LMDB 0.9, mdb.c): pages of equal size, the first two with meta data. A page has a header of 16
bytes; in a tree, the offsets of its nodes follow. A node has a header of 8 bytes, a key, and the number of a child
page (branch), or a value or the number of the first of the pages that hold the value (leaf).
"""

import os
import struct
from collections.abc import Iterator
from typing import IO, NamedTuple

# Header of a page, magic number, format version, address and size of the map, page size, other fields of the records
# of the two trees, root of the main tree, last page, number of the transaction.
_META = struct.Struct("<16x I I 16x I 84x Q Q Q")
_PAGE = struct.Struct("<10x H H 2x")  # flags, end of the offsets
_NODE = struct.Struct(
    "<H H H H"
)  # low and high half of the size or child, flags or third part of the child, key size
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF = 1, 2  # flags of a page
_BIG, _SUBTREES = 1, 6  # flags of a node: the value has pages of its own; it is not a value but a tree
_NO_PAGE = 2**64 - 1


class Place(NamedTuple):
    """Offset and size of a value in the file, in bytes."""

    offset: int
    size: int


class LmdbFile:
    """Keys and places of the values of an LMDB file that is open for reading."""

    def __init__(self, file: IO[bytes]):
        """Read the meta data.

        Raises:
            ValueError: If the file is not of LMDB 0.9, is damaged, or is shorter than its meta data say.
        """
        self._file = file.fileno()
        self._size = os.fstat(self._file).st_size
        self._page_size = _Meta.read(self._bytes(0, _META.size)).page_size
        metas = [_Meta.read(self._bytes(page * self._page_size, _META.size)) for page in (0, 1)]
        newest = max(metas, key=lambda meta: meta.transaction)
        needed = (newest.last_page + 1) * self._page_size
        if self._size < needed:
            raise ValueError(
                f"it has {self._size:,} bytes but should have {needed:,}; the copy is incomplete, repeat it"
            )
        self._root = newest.root

    def places(self) -> Iterator[tuple[bytes, Place]]:
        """Yield each key and the place of its value.

        Raises:
            ValueError: If a page is damaged.
        """
        pages = [] if self._root == _NO_PAGE else [self._root]
        seen: set[int] = set()
        while pages:
            number = pages.pop()
            if number in seen:
                raise ValueError(f"page {number} occurs twice; the file is damaged")
            seen.add(number)
            page = self._bytes(number * self._page_size, self._page_size)
            kind, end = _PAGE.unpack_from(page)
            if kind & ~0x10 not in (_BRANCH, _LEAF) or not _PAGE.size <= end <= len(page):
                raise ValueError(f"page {number} is no page of a tree; the file is damaged")
            for (node,) in struct.iter_unpack("<H", page[_PAGE.size : end - end % 2]):
                if node + _NODE.size > len(page):
                    raise ValueError(f"page {number} has a node beyond its end; the file is damaged")
                low, high, flags, key_size = _NODE.unpack_from(page, node)
                if kind & _BRANCH:
                    pages.append(low | high << 16 | flags << 32)
                    continue
                start = node + _NODE.size + key_size
                size = low | high << 16
                if flags & _SUBTREES:
                    continue
                if flags & _BIG:
                    first = int.from_bytes(page[start : start + 8], "little")
                    place = Place(first * self._page_size + _PAGE.size, size)
                else:
                    place = Place(number * self._page_size + start, size)
                yield page[node + _NODE.size : start], place

    def value(self, place: Place) -> bytes:
        """Read a value.

        Raises:
            ValueError: If it lies beyond the end of the file.
        """
        return self._bytes(*place)

    def _bytes(self, offset: int, size: int) -> bytes:
        if offset + size > self._size:
            raise ValueError(
                f"it has {self._size:,} bytes but refers to byte {offset + size:,}; the copy is incomplete, repeat it"
            )
        return os.pread(self._file, size, offset)


class _Meta(NamedTuple):
    page_size: int
    root: int
    last_page: int
    transaction: int

    @classmethod
    def read(cls, page: bytes) -> "_Meta":
        magic, version, *values = _META.unpack(page)
        if magic != _MAGIC:
            raise ValueError("it is no LMDB file, or a damaged one")
        if version != _VERSION:
            raise ValueError(
                f"it has version {version} of the LMDB format; only version {_VERSION} is supported"
            )
        meta = cls(*values)
        if not 256 <= meta.page_size <= 2**16:
            raise ValueError(f"its pages have {meta.page_size} bytes; the file is damaged")
        return meta
