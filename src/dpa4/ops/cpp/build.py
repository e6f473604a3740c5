"""Compilation and calls of the C++ kernels for CPUs.

The kernels are compiled on first use by the C++ compiler of the machine. Without a compiler, and on machines other
than Linux with AVX2, plain operations run instead.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from dpa4 import code_cache
from dpa4.ops.operands import Operand, check

_FOLDER = Path(__file__).parent
_ARCHITECTURES = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}
"""Argument of -march by the capability of the CPU that PyTorch reports."""
_SOURCES = {
    "edges.cpp": ("edge_matmul", "scatter_matmul", "edge_outer", "bilinear"),
    "so2_stack.cpp": ("so2_value", "so2_vjp", "so2_tangent", "so2_joint"),
}
"""Functions of each source file, without the suffix for the dtype."""
TIME_LIMIT = 300.0
"""Longest run of the compiler in seconds; it takes about 10 s per file."""
_NAMES = {torch.float32: "float", torch.float64: "double"}  # suffix of a function by dtype

_CPU = torch.device("cpu")

_LOG = logging.getLogger(__name__)
_LOCK = threading.RLock()


def compiles() -> bool:
    """Compile all sources, or load them from the cache; return whether that worked, and log a warning if not.

    The first call does the work, and calls from other threads wait for it.
    """
    with _LOCK:
        return _all_compile()


@cache
def _all_compile() -> bool:
    try:
        for source in _SOURCES:
            _library(source)
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        _LOG.warning(
            "the C++ kernels for CPUs could not be compiled, slower operations run: %s", reason or error
        )
        return False
    return True


def forget() -> None:
    """Forget the libraries and the outcome of `compiles`, so that the next call reads the cache again."""
    _all_compile.cache_clear()
    _library.cache_clear()


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


Argument = Operand | Sequence[Operand] | None
"""Tensor, list of tensors, or nothing; C++ receives an address, an array of addresses, or a null pointer."""


def call(
    source: str, name: str, dtype: torch.dtype, sizes: ctypes.Structure, arguments: Sequence[Argument]
) -> None:
    """Call a function of a source file, after checking all tensors.

    Args:
        source: Name of the source file.
        name: Name of the function without its suffix for the dtype.
        dtype: float32 or float64.
        sizes: Structure that the function receives first, by address. Tensors must have the sizes that it states.
        arguments: Operands; None only where the function accepts a null pointer.

    Raises:
        ValueError: If an operand is not as described, see `dpa4.ops.operands.check`.
    """
    addresses = [pointer(name, argument) for argument in arguments]
    function(source, name, dtype)(ctypes.byref(sizes), *addresses)


def pointer(kernel: str, argument: Argument) -> ctypes.c_void_p:
    """Check an argument; return its address, that of an array of addresses, or a null pointer if there is no tensor.

    The returned object keeps the array alive, but not the tensors.

    Raises:
        ValueError: If an operand is not as described, see `dpa4.ops.operands.check`.
    """
    if not argument:
        return ctypes.c_void_p()
    if isinstance(argument, Operand):
        check(kernel, _CPU, (argument,))
        return ctypes.c_void_p(argument.tensor.data_ptr())
    check(kernel, _CPU, argument)
    array = (ctypes.c_void_p * len(argument))(*(operand.tensor.data_ptr() for operand in argument))
    return ctypes.cast(array, ctypes.c_void_p)


def _architecture() -> str | None:
    return _ARCHITECTURES.get(torch.backends.cpu.get_cpu_capability())


@cache
def _library(source: str) -> ctypes.CDLL:
    text = b"".join((_FOLDER / name).read_bytes() for name in ("small_matmul.h", source))
    command = [str(compiler()), "-std=c++17", "-O3", f"-march={_architecture()}", "-fopenmp", "-fPIC"]
    version = _run([command[0], "--version"])
    digest = hashlib.sha256((version + " ".join(command)).encode() + text).hexdigest()[:32]
    file = code_cache.folder() / f"{Path(source).stem}-{digest}.so"
    with code_cache.locked(file):
        if not _is_complete(file, source):
            _compile(command, source, file)
            if not _is_complete(file, source):
                raise OSError(f"{command[0]} has written a library without the functions of {source}")
        return ctypes.CDLL(str(file))


def _compile(command: Sequence[str], source: str, file: Path) -> None:
    _LOG.info("compiling %s for this CPU (first use)", source)
    with tempfile.TemporaryDirectory() as folder, code_cache.write(file) as path:
        compiled = str(Path(folder) / "kernels.o")
        _run([*command, "-c", str(_FOLDER / source), "-o", compiled])
        # Linked without -fopenmp: the process must have one OpenMP library, the one PyTorch has loaded globally.
        _run([command[0], "-shared", compiled, "-o", str(path)])


def _is_complete(file: Path, source: str) -> bool:
    """Return whether a library is intact and names all functions of a source file. Loading it could crash."""
    content = code_cache.read(file)
    names = (f"{name}_{suffix}\0".encode() for name in _SOURCES[source] for suffix in _NAMES.values())
    return content is not None and all(name in content for name in names)


def _run(command: Sequence[str]) -> str:
    """Return the output of a command, which is killed with its children after `TIME_LIMIT`."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # a compiler starts other programs, which end with their group
    ) as process:
        try:
            output, errors = process.communicate(timeout=TIME_LIMIT)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output, errors)
    return output
