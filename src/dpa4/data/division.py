"""Division of batches among the processes of a run, balanced by edges."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Share(NamedTuple):
    """Share of one process in the batches of a run.

    Attributes:
        rank, size: Number of the process, from 0, and number of all processes.
        whole: True to divide the batches of an epoch, False to divide each batch.
    """

    rank: int
    size: int
    whole: bool = False


def balanced(items: Sequence[int], costs: NDArray[np.int64], size: int) -> list[list[int]]:
    """Divide items so that the sums of their costs are similar: from the costliest on, each to the smallest sum.

    The largest sum is at most 4/3 of the smallest possible one (R. L. Graham, SIAM J. Appl. Math. 17, 416, 1969).

    Args:
        items: The items, in any order.
        costs: Cost of every possible item, above zero.
        size: Number of parts.

    Returns:
        Items of each part, in the order in which they were given; some are empty if there are fewer items than parts.
    """
    owner: dict[int, int] = {}
    sums = np.zeros(size, dtype=np.int64)
    for item in sorted(items, key=lambda i: -int(costs[i])):
        owner[item] = int(sums.argmin())
        sums[owner[item]] += costs[item]
    parts: list[list[int]] = [[] for _ in range(size)]
    for item in items:
        parts[owner[item]].append(item)
    return parts


def least(parts: Sequence[Sequence[int]], costs: NDArray[np.int64]) -> int:
    """Number of the part with the smallest sum of costs, the first of them."""
    return int(np.argmin([costs[list(part)].sum() for part in parts]))
