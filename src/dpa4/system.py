"""Device, memory allocator, settings of PyTorch, optional packages and signals."""

import ctypes
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def user_path(path: str | os.PathLike[str]) -> Path:
    """Path that a user gave, with ~ or ~name at its start replaced by the home folder, as in a shell.

    Every path goes through this function where it enters: arguments of the commands, run files and the functions of
    the Python interface. A shell leaves ~ as it is behind an equals sign (``--output=~/run``).
    """
    return Path(os.path.expanduser(path))


def choose_device(name: str | torch.device) -> torch.device:
    """Return the device of this name; "auto" selects a GPU if there is one, "cuda:1" the second GPU.

    Raises:
        ValueError: If the name is neither "auto" nor the name of a CPU or CUDA device.
        RuntimeError: If a CUDA device is requested but none is available, or not so many.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None  # not a device of PyTorch
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or, for the second GPU, cuda:1; got {str(name)!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device = {name}, but no CUDA device is available; use device: cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise RuntimeError(f"device = {name}, but there are {count} GPUs: cuda:0 to cuda:{count - 1}")
    return device


_CAST_DEVICES = ("cpu", "cuda")

_RETAINED_BYTES = 2**30  # upper limit of the freed memory that the allocator retains


@cache
def keep_freed_memory(device: torch.device) -> None:
    """Make the allocator retain up to 1 GiB of freed memory on a CPU, as PyTorch does on a GPU.

    By default, glibc returns tensors of a few MB to the system at the end of every step, and the system has
    to allocate and clear tens of thousands of pages again in the next step (docs/adr/0019). The function does
    nothing on other devices and systems, or when called again.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    program = ctypes.CDLL(None)
    if hasattr(program, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # <malloc.h>
        for option in (trim_threshold, mmap_threshold):
            program.mallopt(option, _RETAINED_BYTES)


def peak_memory(device: torch.device) -> int | None:
    """Largest memory of this process so far, in bytes: of a GPU what PyTorch reserved there; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def naming_lack_of_memory(describe: Callable[[], str], device: torch.device, advice: str) -> Iterator[None]:
    """Replace PyTorch's message about lack of memory by one line, in an error of the same type.

    Args:
        describe: Function that returns what was computed, with its size.
        device: Device of the computation.
        advice: What the user can do.

    Raises:
        torch.OutOfMemoryError: If the block does.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.__traceback__ = None  # keeps the tensors of the failed attempt alive
        memory = ""
        if device.type == "cuda" and torch.cuda.is_available():
            memory = f" ({torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB)"
        text = f"out of memory: {describe()} do not fit into the memory of {device}{memory}; {advice}"
        raise torch.OutOfMemoryError(text) from None


def own_settings(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that the caller's settings of PyTorch do not change its results.

    These settings are autocast, inference mode, modes such as the one of `torch.set_default_device`, and the current
    GPU, on which kernels are launched: it becomes the one of the object whose method is called. Each belongs to one
    thread, and returns after the call. Inference mode becomes ``torch.no_grad``. The default dtype is another matter,
    see `float32_by_default`. Without any of the settings, a call takes a microsecond longer.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        modes = torch._C._len_torch_function_stack()
        cast = [device for device in _CAST_DEVICES if torch.is_autocast_enabled(device)]
        inference = torch.is_inference_mode_enabled()
        gpu = _other_gpu(args) if _several_gpus() else None
        if not (modes or cast or inference or gpu):
            return function(*args, **kwargs)
        with ExitStack() as settings:
            if gpu:
                settings.enter_context(torch.cuda.device(gpu))
            if modes:
                settings.enter_context(_without_function_modes())
            for device in cast:
                settings.enter_context(torch.autocast(device, enabled=False))
            if cast:
                # Casts of weights that autocast has cached would outlive changes of the weights.
                torch.clear_autocast_cache()
                settings.callback(torch.clear_autocast_cache)
            if inference:
                settings.enter_context(torch.inference_mode(False))
                settings.enter_context(torch.no_grad())
            return function(*args, **kwargs)

    return run


@cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def _other_gpu(args: Sequence[object]) -> torch.device | None:
    """GPU of the first argument, such as a potential, unless it is the current one."""
    device = getattr(args[0], "device", None) if args else None
    if not isinstance(device, torch.device) or device.type != "cuda" or device.index is None:
        return None
    return None if device.index == torch.cuda.current_device() else device


@contextmanager
def _without_function_modes() -> Iterator[None]:
    """Suspend all modes that intercept functions of PyTorch; the default device is one of them."""
    suspended = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(suspended):
            torch._C._push_on_torch_function_stack(mode)


_DTYPE_LOCK = threading.Lock()
_dtypes: list[
    torch.dtype
] = []  # the caller's default dtype, once for each open block of `float32_by_default`


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Run a block, or the decorated function, with float32 as PyTorch's default dtype.

    The default dtype is one for all threads. It is therefore changed only where networks are built, traced and
    trained, and the last block to end restores it. The computation of energies and forces does not depend on it.
    """
    with _DTYPE_LOCK:
        _dtypes.append(_dtypes[0] if _dtypes else torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        with _DTYPE_LOCK:
            before = _dtypes.pop()
            if not _dtypes:
                torch.set_default_dtype(before)


class Lock:
    """Lock that one thread can acquire several times. Copies, also those in other processes, are new locks."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["Lock"], tuple[()]]:
        return Lock, ()


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: Full name of the module.
        extra: Extra of dpa4 that installs the package; the error message names it.

    Raises:
        ImportError: If the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{module.partition('.')[0]} is not installed; {install_command(extra)}") from error


def install_command(extra: str) -> str:
    """Command that installs an extra, for messages.

    An installed wheel needs no source, since pip finds the extras in its metadata. In a checkout, which may not be
    installed at all, the command names the folder.
    """
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file() and checkout.joinpath("src", "dpa4").is_dir():
        return f"pip install --editable '{checkout}[{extra}]'"
    return f"pip install 'dpa4[{extra}]'"


caught_signals: list[int] = []
"""Numbers of all signals that ``stop_requests`` has caught in this process, for the exit status of a command."""


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yield a list to which SIGINT and SIGTERM append their number, so that a loop can stop after a step.

    A second signal has its usual effect at once. Outside the main thread, where Python does not handle
    signals, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request(number: int, _: Any) -> None:
        received.append(number)
        caught_signals.append(number)
        restore()

    for number in previous:
        signal.signal(number, request)
    try:
        yield received
    finally:
        restore()
