"""One thread per test process: the suite runs in two processes, and threads that wait for each other are slow."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_other_processes(monkeypatch):
    """Code is compiled in the process of the test, however many processors there are."""
    monkeypatch.setattr("dpa4.potential.precompile._affordable", lambda device: 0)
