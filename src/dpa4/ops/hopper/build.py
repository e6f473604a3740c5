"""Compilation and launch of CUDA C++ kernels, by the compiler that comes with PyTorch (NVRTC)."""

import ctypes
import hashlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dpa4 import code_cache

_SHARED_MEMORY_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Kernel:
    """CUDA kernel, loaded on the current device.

    Args:
        source: Source file.
        name: Name of the kernel, which is declared ``extern "C"``.
        threads: Threads per block.
        shared_memory: Bytes of dynamic shared memory per block.
    """

    def __init__(self, source: Path, name: str, threads: int, shared_memory: int):
        self.threads, self.shared_memory = threads, shared_memory
        self._function = ctypes.c_void_p()
        module = _module(source, torch.cuda.current_device())
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()))
        _check(_driver().cuFuncSetAttribute(self._function, _SHARED_MEMORY_SIZE, shared_memory))

    def __call__(self, blocks: int, arguments: Sequence[Any]) -> None:
        """Launch on the current stream; arguments are tensors, passed by address, and ctypes values."""
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(
            _driver().cuLaunchKernel(
                self._function, blocks, 1, 1, self.threads, 1, 1, self.shared_memory, stream, pointers, None
            )
        )


@cache
def _module(source: Path, device: int) -> ctypes.c_void_p:
    """Module with the kernels of a source file, loaded on the current device; ``device`` keys the cache."""
    torch.cuda.current_stream()  # creates the context of the device
    module = ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), _code(source)))
    return module


def _code(source: Path) -> bytes:
    """Machine code for Hopper GPUs, kept in the cache."""
    text = source.read_bytes()
    digest = hashlib.sha256(text + str(torch.version.cuda).encode()).hexdigest()[:32]
    file = code_cache.folder() / f"{source.stem}-{digest}.cubin"
    with code_cache.locked(file):
        if (code := code_cache.read(file)) is None:
            code = compile_cuda(text, source.name)
            with code_cache.write(file) as path:
                path.write_bytes(code)
    return code


def compile_cuda(text: bytes, name: str) -> bytes:
    """Compile a source text for sm_90a (compute capability 9.0, with instructions of this GPU only). Needs no GPU.

    Raises:
        RuntimeError: If compilation fails; the message is the compiler's log.
        OSError: If NVRTC is not found.
    """
    compiler, program = _compiler(), ctypes.c_void_p()
    compiler.nvrtcCreateProgram(ctypes.byref(program), text, name.encode(), 0, None, None)
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17"]
    failed = compiler.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    if failed:
        raise RuntimeError(_text_of(compiler, "ProgramLog", program).decode())
    return _text_of(compiler, "CUBIN", program)


def _text_of(compiler: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(compiler, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(compiler, f"nvrtcGet{what}")(program, text)
    return text.raw


@cache
def _compiler() -> ctypes.CDLL:
    name = f"libnvrtc.so.{str(torch.version.cuda).partition('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError:  # not loaded by PyTorch: look in the packages that PyTorch depends on
        packages = importlib.util.find_spec("nvidia")
        for folder in (packages.submodule_search_locations or []) if packages else []:
            for file in Path(folder).glob(f"*/lib/{name}"):
                for other in file.parent.glob("libnvrtc-builtins.so*"):  # NVRTC looks it up by name
                    ctypes.CDLL(str(other))
                return ctypes.CDLL(str(file))
        raise


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(result: int) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"CUDA: {text.value.decode() if text.value else f'error {result}'}")
