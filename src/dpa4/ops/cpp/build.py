"""Kernels in C++ for a CPU, compiled when first needed by the compiler of the machine.

Where there is none, or on another machine than a Linux one with AVX2, plain operations run.
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
"""Instructions to compile for, by what PyTorch says the CPU can do."""

_LOG = logging.getLogger(__name__)


@cache
def compiles() -> bool:
    """Compile all sources, or load what was compiled before; return whether that worked, with a warning if not."""
    try:
        for source in _SOURCES:
            _library(source)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        _LOG.warning("the kernels for a CPU could not be compiled, slower operations run: %s", reason)
        return False
    return True


def is_supported_machine() -> bool:
    """Return whether the kernels are written for this operating system and processor."""
    return platform.system() == "Linux" and _architecture() is not None


def compiler() -> str | None:
    """Path of a C++ compiler, or None."""
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


_NAMES = {torch.float32: "float", torch.float64: "double"}


def function(source: str, name: str, dtype: torch.dtype) -> Callable[..., None]:
    """A function of a program, for tensors of a dtype of `_NAMES`."""
    found: Callable[..., None] = getattr(_library(source), f"{name}_{_NAMES[dtype]}")
    return found


def call(
    source: str, name: str, dtype: torch.dtype, sizes: ctypes.Structure, arguments: Sequence[Any]
) -> None:
    """Call a `function` with sizes and contiguous tensors, lists of them, or None."""
    addresses = [pointers(a) if isinstance(a, list) else _pointer(a) for a in arguments]
    function(source, name, dtype)(ctypes.byref(sizes), *addresses)


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def pointers(tensors: Sequence[Tensor]) -> ctypes.c_void_p:
    """Address of the addresses of contiguous tensors, which lives as long as it; null where there are no tensors."""
    array = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    return ctypes.cast(array, ctypes.c_void_p) if tensors else ctypes.c_void_p()


_SOURCES = ("edges.cpp", "so2_stack.cpp")


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
        _LOG.info("compiling %s for this CPU, once", source)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder, atomic_write(file) as path:
            made = str(Path(folder) / "made.o")
            _run([*command, "-c", str(_FOLDER / source), "-o", made])
            # Without a library of threads: PyTorch's own, which it has loaded for all, is to be the only one.
            _run([command[0], "-shared", made, "-o", str(path)])
    return ctypes.CDLL(str(file))


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


def _cache() -> Path:
    """Folder for what was compiled: in PyTorch's cache, as a rule ~/.cache/torch."""
    return Path(torch.hub.get_dir()).parent / "dpa4"
