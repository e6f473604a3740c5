"""Rules for which kernels may run. Device, dtype, size, compiler and architecture are checked only here.

Operators call these functions and run plain operations where no kernel is available; `dpa4 info` prints the same
rules. A rule that depends on a compiler runs it once per process and remembers the outcome.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from dpa4.ops.cpp import build
from dpa4.ops.hopper import so2_stack, trial
from dpa4.ops.layout import EdgeLayout

LANES = 16
"""The number of channels must be a multiple of this for the C++ kernels: float32 numbers in a 512-bit register."""

_CPP_DTYPES = (torch.float32, torch.float64)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# C++ kernels for CPUs.


def cpp(width: int, *tensors: Tensor) -> bool:
    """Return whether the C++ kernels support tensors with ``width`` channels (per head or focus)."""
    return cpp_width(width) and _on_cpu(*tensors)


def cpp_width(width: int) -> bool:
    """Return whether the C++ kernels support a number of channels (per head or focus)."""
    return width % LANES == 0


def cpp_sparse_product(width: int, *tensors: Tensor) -> bool:
    """Return whether the C++ kernel of sparse products supports tensors whose last axis has ``width`` entries."""
    return (width == 1 or cpp_width(width)) and _on_cpu(*tensors)


def cpp_missing() -> str | None:
    """Reason why this machine cannot have C++ kernels; None if it can. Does not try the compiler."""
    if not build.is_supported_machine():
        return "the kernels need Linux and a processor with AVX2"
    return None if build.compiler() else "no C++ compiler (c++, g++ or clang++) was found"


def _on_cpu(*tensors: Tensor) -> bool:
    return all(t.device.type == "cpu" and t.dtype in _CPP_DTYPES for t in tensors) and cpp_compiled()


@cache  # asked by every operator call, and looking for a compiler reads the file system
def cpp_compiled() -> bool:
    """Return whether the C++ kernels can be used; the first call in a process compiles or loads them."""
    return cpp_missing() is None and build.compiles()


# Triton kernels for GPUs.


def triton(x: Tensor) -> bool:
    """Return whether the Triton kernels on edge features support a tensor. Sums over edges support all dtypes."""
    return x.is_cuda and triton_dtype(x.dtype)


def triton_dtype(dtype: torch.dtype) -> bool:
    """Return whether the Triton kernels on edge features support a dtype; tensor cores would not help in float64."""
    return dtype in _TRITON_DTYPES


GATE_CHANNELS = 128
"""Largest number of channels of a focus for the Triton kernels of gates: a program holds the square of the weights of
a degree in registers and in 96 KiB of shared memory, which every GPU since Ampere has."""


def triton_gate(u: Tensor, channels: int) -> bool:
    """Return whether the Triton kernels of gates support products u of layers with ``channels`` (per focus)."""
    return triton_gate_width(channels) and triton(u)


def triton_gate_width(channels: int) -> bool:
    """Return whether the Triton kernels of gates support a number of channels (per focus)."""
    return channels <= GATE_CHANNELS


def split_product(x: Tensor) -> bool:
    """Return whether matrix products with x use tensor cores with split operands, at float32 accuracy."""
    return x.is_cuda and x.dtype == torch.float32


def triton_version() -> str | None:
    """Version of the installed Triton, or None."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


# CUDA C++ kernels for Hopper GPUs.


@cache
def is_hopper(device: torch.device) -> bool:
    """Return whether a device is a Hopper GPU (H100, H200)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def whole_stack_misfits(
    layout: EdgeLayout, n_focus: int, channels: int, layers: int, separate: bool
) -> list[str]:
    """Return what the CUDA kernels for whole stacks of SO(2) layers lack for a shape of the network; [] if nothing.

    Args:
        layout: Rows of the edge frame.
        n_focus: Number of focus streams.
        channels: Channels per focus stream.
        layers: Layers of the stack, the last one included, which has no gate.
        separate: Whether the matrices act on the rows of -m and of +m separately, as with symmetry O3.
    """
    supported = {
        "symmetry": ("SO3", "O3" if separate else "SO3"),
        "focus streams": (1, n_focus),
        "channels": (so2_stack.CHANNELS, channels),
        "degree": (so2_stack.LAYOUT.lmax, layout.lmax),
        "order": (so2_stack.LAYOUT.mmax, layout.mmax),
    }
    misfits = [f"{name} {own} (here {here})" for name, (own, here) in supported.items() if own != here]
    if not 1 <= layers <= so2_stack.MAX_GATES + 1:
        misfits.append(f"layers 1 to {so2_stack.MAX_GATES + 1} (here {layers})")
    return misfits


def whole_stack(x: Tensor, layers: int, layout: EdgeLayout, separate: bool) -> bool:
    """Return whether the CUDA kernels for whole stacks support features x (F, E, W); tried once per device."""
    fits = not whole_stack_misfits(layout, x.shape[0], x.shape[2] // layout.total, layers, separate)
    return fits and x.dtype == torch.float32 and is_hopper(x.device) and trial.whole_stacks_work(x.device)
