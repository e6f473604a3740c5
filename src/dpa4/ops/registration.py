"""Registration of operators with PyTorch; the compiler treats a registered operator as one opaque call."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

_LIBRARY = torch.library.Library("dpa4", "FRAGMENT")


def register(schema: str, fake: Callable[..., Any], kernels: Mapping[str, Callable[..., Any]]) -> None:
    """Define an operator ``torch.ops.dpa4.<name>``, without derivatives.

    Args:
        schema: Name, arguments and results, in PyTorch's schema language.
        fake: Function that returns uninitialised results of the right shapes and dtypes. Tracing calls it.
        kernels: Implementation by dispatch key: "CPU", "CUDA", or "CompositeExplicitAutograd" for every device.
    """
    name = _LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])
    for key, kernel in kernels.items():
        _LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"dpa4::{name}", fake, lib=_LIBRARY)
