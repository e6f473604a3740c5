"""Vocabulary for the precision of matrix products, the same for inference and training."""

from typing import Literal

Precision = Literal["high", "fast"]
"""With "high", matrix products are as accurate as the dtype of the network. With "fast", the interaction blocks
multiply in bfloat16; weights, geometry, norms, softmax, residual stream, read-out and energies keep their dtype."""
