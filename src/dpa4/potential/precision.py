"""Precision of the matrix products: one vocabulary for inference and training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from dpa4.potential.potential import Potential

Precision = Literal["high", "fast"]
"""With "high", matrix products are as accurate as the dtype of the network. With "fast", the interaction blocks
multiply in bfloat16; weights, geometry, norms, softmax, residual stream, read-out and energies keep their dtype."""


@contextmanager
def at_precision(potential: Potential, precision: Precision) -> Iterator[None]:
    """Run a potential at a precision within the block; the former precision returns afterwards."""
    before = potential.precision
    potential.precision = precision
    try:
        yield
    finally:
        potential.precision = before
