"""Whether a device is a Hopper GPU (H100, H200)."""

from functools import cache

import torch


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is such a GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
