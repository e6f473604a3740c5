"""Process in which Triton interprets its kernels, shared by all tests of a session."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[..., Any]]:
    """Function that calls a module-level function in that process; returns results, raises exceptions.

    Triton decides whether it interprets kernels when it is imported, so the kernels need a process of their own.
    """
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()  # starts the process, which inherits the variable
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
