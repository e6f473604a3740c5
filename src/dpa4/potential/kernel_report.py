"""Kernels that a model can use, given its configuration, its precision and the installed software."""

from importlib.metadata import PackageNotFoundError, version

import torch

from dpa4.kernels import cpp, so2_fused
from dpa4.kernels.gate import Rows
from dpa4.model import ModelConfig

_PLAIN_SO2 = {"mlp_bias": "biases", "layer_scale": "learned scales"}
"""Switches that prevent the SO(2) layers from being one fused operator, and the features they add."""


def _plain_switches(config: ModelConfig) -> dict[str, str]:
    """Entries of `_PLAIN_SO2` whose switch is set."""
    return {switch: what for switch, what in _PLAIN_SO2.items() if getattr(config, switch)}


def triton_version() -> str | None:
    """Version of the installed Triton, or None."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def unsupported(config: ModelConfig, dtype: torch.dtype = torch.float32) -> list[str]:
    """Reasons why a model runs plain operations on a GPU where other models have kernels; empty if there are none.

    Args:
        config: The model.
        dtype: Floating-point type of the network. Mixed precision in bfloat16 has the kernels of float32.
    """
    reasons = [
        f"{switch} = True: SO(2) layers with {what} are not fused; they run operation by operation"
        for switch, what in _plain_switches(config).items()
    ]
    if dtype == torch.float64:
        reasons.append("float64: only sums over edges have a Triton kernel")
    return reasons


def has_whole_stacks(config: ModelConfig) -> bool:
    """Return whether one kernel on Hopper GPUs computes all SO(2) layers of a block, for energies and forces."""
    rows = {Rows(degree, min(config.mmax, degree)) for degree in config.degrees}
    return (
        not unsupported(config)
        and rows == {so2_fused.ROWS}
        and (config.n_focus, config.focus_width) == (1, so2_fused.CHANNELS)
        and 1 <= config.mixing_layers <= so2_fused.MAX_GATES + 1
    )


def gpu_kernels(config: ModelConfig, triton: str | None) -> dict[str, str]:
    """Lines of the model card about GPUs.

    Args:
        config: The model.
        triton: Version of Triton, or None if it is not installed.
    """
    return {
        "Triton": triton or "not installed; without it no model runs on a GPU",
        "edges and nodes": "Triton kernels",
        "SO(2) layers": "; ".join(unsupported(config)) or "fused, Triton kernels",
        "energies and forces on H100, H200": "one CUDA kernel for all SO(2) layers of a block"
        if has_whole_stacks(config)
        else "SO(2) layers product by product",
        "with --dtype float64": "plain operations, not compiled",
    }


def cpu_kernels(config: ModelConfig) -> dict[str, str]:
    """Lines of the model card about the CPU of this machine."""
    widths = {"channels": config.channels, "channels of a focus": config.focus_width}
    odd = [f"{name} {width}" for name, width in widths.items() if width % cpp.LANES]
    plain = cpp.unavailable() or (f"{', '.join(odd)}: not a multiple of {cpp.LANES}" if odd else None)
    switches = [f"{name} = True" for name in _plain_switches(config)]
    layers = plain or (f"not with {', '.join(switches)}" if switches else None)
    return {
        "edges, nodes and grids": f"plain operations ({plain})" if plain else "C++ kernels",
        "layers of SO(2)": f"plain operations ({layers})" if layers else "C++ kernels, all layers at once",
    }
