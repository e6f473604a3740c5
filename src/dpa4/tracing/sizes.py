"""Sizes of tensors that traced code supports, and the sizes it is optimised for."""

COUNTED = ("node", "center", "edge")
"""Axes whose sizes vary from call to call."""

MIN_SIZE = 2
"""Smallest number of nodes, centres or edges for compiled code: compilers specialise sizes 0 and 1."""

INDEX_LIMIT = 2**31
"""Number of elements of a tensor from which on indices need 64 bits."""

HINTS = {"node": 20_001, "center": 20_005, "edge": 100_009}
"""Size hints for the compiler. Constant, so that code depends only on the model; odd, distinct and larger than any
fixed axis, so that no symbolic size equals a fixed one; with a hint of 221, Inductor specialised the node axis."""
