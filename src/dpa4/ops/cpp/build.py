"""Compilation and calls of the C++ kernels for CPUs.

The kernels are compiled on first use by the C++ compiler of the machine. Without a compiler, and on machines other
than Linux with AVX2, plain operations run instead.
"""

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpa4.output import atomic_write

_FOLDER = Path(__file__).parent
_ARCHITECTURES = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}
"""Argument of -march by the capability of the CPU that PyTorch reports."""
_SOURCES = ("edges.cpp", "so2_stack.cpp")
_NAMES = {torch.float32: "float", torch.float64: "double"}  # suffix of a function by dtype

_LOG = logging.getLogger(__name__)


def compiles() -> bool:
    """Compile all sources, or load them from the cache; return whether that worked, and log a warning if not."""
    try:
        for source in _SOURCES:
            _library(source)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        _LOG.warning("the C++ kernels for CPUs could not be compiled, slower operations run: %s", reason)
        return False
    return True


def is_supported_machine() -> bool:
    """Return whether the kernels support this operating system and processor."""
    return platform.system() == "Linux" and _architecture() is not None


def compiler() -> str | None:
    """Path of the first C++ compiler found, or None."""
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def function(source: str, name: str, dtype: torch.dtype) -> Callable[..., None]:
    """Look up a function of a compiled source file, for float32 or float64."""
    found: Callable[..., None] = getattr(_library(source), f"{name}_{_NAMES[dtype]}")
    return found


def call(
    source: str, name: str, dtype: torch.dtype, sizes: ctypes.Structure, arguments: Sequence[Any]
) -> None:
    """Call a function of a source file.

    Args:
        source: Name of the source file.
        name: Name of the function without its suffix for the dtype.
        dtype: float32 or float64.
        sizes: Structure that the function receives first, by address.
        arguments: Contiguous tensors, lists of contiguous tensors, or None; passed by address.
    """
    addresses = [pointers(a) if isinstance(a, list) else _pointer(a) for a in arguments]
    function(source, name, dtype)(ctypes.byref(sizes), *addresses)


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def pointers(tensors: Sequence[Tensor]) -> ctypes.c_void_p:
    """Pointer to an array of the tensors' addresses, or a null pointer if there are no tensors.

    The returned object keeps the array alive, but not the tensors.
    """
    array = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    return ctypes.cast(array, ctypes.c_void_p) if tensors else ctypes.c_void_p()


def _architecture() -> str | None:
    return _ARCHITECTURES.get(torch.backends.cpu.get_cpu_capability())


@cache
def _library(source: str) -> ctypes.CDLL:
    text = b"".join((_FOLDER / name).read_bytes() for name in ("small_matmul.h", source))
    command = [str(compiler()), "-std=c++17", "-O3", f"-march={_architecture()}", "-fopenmp", "-fPIC"]
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(text + version + " ".join(command).encode()).hexdigest()[:32]
    file = _cache() / f"{Path(source).stem}-{digest}.so"
    if not file.exists():
        _LOG.info("compiling %s for this CPU (first use)", source)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder, atomic_write(file) as path:
            compiled = str(Path(folder) / "kernels.o")
            _run([*command, "-c", str(_FOLDER / source), "-o", compiled])
            # Linked without -fopenmp: the process must have one OpenMP library, the one PyTorch has loaded globally.
            _run([command[0], "-shared", compiled, "-o", str(path)])
    return ctypes.CDLL(str(file))


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


def _cache() -> Path:
    """Folder of compiled kernels in PyTorch's cache folder, usually ~/.cache/torch/dpa4."""
    return Path(torch.hub.get_dir()).parent / "dpa4"
