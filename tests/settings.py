"""Settings of PyTorch in a user's program, as contexts by name."""

import torch


class default_dtype:
    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(self.before)


class Intercepting(torch.overrides.TorchFunctionMode):
    """Mode that rounds the result of every function."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_float = (
            isinstance(result, torch.Tensor) and result.is_floating_point() and not result.requires_grad
        )
        return result.bfloat16().to(result.dtype) if is_float else result


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "float16 by default": lambda: default_dtype(torch.float16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "on meta by default": lambda: torch.device("meta"),
    "a mode": Intercepting,
}
