"""Constants of the network, which stay exact when a model changes its precision: tensors and sparse bilinear maps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn

from dpa4.ops.sparse_product import Terms, sparse_product

Arguments = ParamSpec("Arguments")
_skipped: ContextVar[bool] = ContextVar("skipped", default=False)


@contextmanager
def without_constants() -> Iterator[None]:
    """Build networks that lack constants within the context; such a network only shows its parameters."""
    token = _skipped.set(True)
    try:
        yield
    finally:
        _skipped.reset(token)


def of_constants(method: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Return a method that registers constants, or does nothing within `without_constants`.

    Some constants take seconds and gigabytes to compute. An unknown checkpoint must be compared with its
    configuration before that (`dpa4.model.shapes`).
    """

    @wraps(method)
    def compute(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        if not _skipped.get():
            method(*args, **kwargs)

    return compute


class ConstantModule(nn.Module):
    """Module whose constants are computed in float64 and held as buffers in the precision of the module.

    ``nn.Module.double`` would only widen the rounded float32 values. Here every change of precision or device starts
    from the float64 values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._exact: dict[str, Tensor] = {}

    def register_constant(self, name: str, value: Tensor) -> None:
        """Add a float64 constant under ``name``, outside of the state dict."""
        self._exact[name] = value.double()
        self.register_buffer(name, value.to(torch.get_default_dtype()), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "ConstantModule":
        super()._apply(fn, recurse)
        for name, value in self._exact.items():
            buffer = getattr(self, name)
            setattr(self, name, value.to(buffer.device, buffer.dtype))
        return self


class SparseProduct(ConstantModule):
    """Bilinear map with few non-zero coefficients, see `dpa4.ops.sparse_product`.

    The map has a kernel on a CPU only, so users also describe its plain form, see
    `dpa4.ops.sparse_product.sparse_or_dense`.
    """

    indices: Tensor
    scale: Tensor

    def __init__(self, terms: Terms):
        super().__init__()
        self.register_buffer("indices", terms.indices, persistent=False)
        self.register_constant("scale", terms.scale)

    def forward(self, a: Tensor, b: Tensor, size: int) -> Tensor:
        """Product of factors (n, A, c) and (n, B, c), of shape (n, size, c)."""
        return sparse_product(a, b, Terms(self.indices, self.scale), size)
