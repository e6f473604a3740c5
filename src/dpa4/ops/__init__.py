"""Operators of the network: formula, derivatives and plain version, one file per operator.

Backends are files of the same name in `cpp`, `triton` and `hopper`; `available` decides which one may run. Importing
this package registers every operator with PyTorch, which a process that compiles or loads traced code relies on.
"""

from dpa4.ops import edge_products, segments, so2_stack, sparse_product, split_matmul  # noqa: F401
