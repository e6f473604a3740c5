"""One process in which Triton interprets its kernels, for all tests of a session."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[..., Any]]:
    """Call a function of a module with arguments in that process; its result is returned, its exceptions are raised.

    Triton decides when it is imported whether it interprets kernels, so that this takes a process of its own.
    """
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()  # starts the process, which inherits the variable
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
