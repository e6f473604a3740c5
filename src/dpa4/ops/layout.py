"""Layout of edge features in the edge frame."""

from typing import NamedTuple


class EdgeLayout(NamedTuple):
    """Rows of the edge frame in the last axis of an edge tensor.

    Rows of order 0 come first, then those of orders -m and +m for m = 1..mmax; each order has degrees m..lmax. A row
    has one entry per channel, so an edge tensor has `total` times as many columns as channels.
    """

    lmax: int
    mmax: int

    @property
    def total(self) -> int:
        """Number of rows, M."""
        return sum(count for _, count in self.orders())

    def orders(self) -> list[tuple[int, int]]:
        """First row and number of rows of each order |m|, both signs together."""
        sizes = [self.lmax + 1] + [2 * (self.lmax - m + 1) for m in range(1, self.mmax + 1)]
        return [(sum(sizes[:m]), size) for m, size in enumerate(sizes)]

    def copies(self, order: int, width: int, channels: int) -> int:
        """Number of blocks of columns of an order |m| that a matrix with ``width`` columns multiplies.

        The number is 1 for a matrix of all rows of the order, and 2 for a matrix of half of the size, which acts on
        the rows of -m and of +m separately.
        """
        return self.orders()[order][1] * channels // width

    def degrees(self) -> list[int]:
        """Degree of each row."""
        degrees = [*range(self.lmax + 1)]
        for m in range(1, self.mmax + 1):
            degrees += 2 * [*range(m, self.lmax + 1)]
        return degrees

    def runs(self, width: int) -> list[tuple[slice, slice]]:
        """Columns of each signed order in an edge tensor with ``width`` columns, and the columns of its gates.

        Gates have C columns per degree 0..lmax. Rows of order ±m start at degree m, and their gates at column m C.
        """
        c, gates = width // self.total, slice(0, (self.lmax + 1) * width // self.total)
        found = [(gates, gates)]
        for m, (first, count) in enumerate(self.orders()[1:], start=1):
            for half in (first, first + count // 2):
                found.append((slice(half * c, (half + count // 2) * c), slice(m * c, gates.stop)))
        return found
