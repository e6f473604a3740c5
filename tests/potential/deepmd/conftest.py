"""A small potential, its deepmd-kit checkpoint, and its import."""

import copy

import pytest
import torch

from dpa4.potential.checkpoint import load_potential
from dpa4.potential.deepmd.writer import deepmd_state
from helpers import random_potential


@pytest.fixture(scope="module")
def potential():
    """Float64 potential; the options of its checkpoint do not matter for these tests."""
    return random_potential(fitting=(24, 40))


@pytest.fixture
def state(potential):
    """deepmd-kit checkpoint of ``potential``, to be changed."""
    return copy.deepcopy(deepmd_state(potential))


@pytest.fixture
def load(tmp_path):
    """Save a state and import it."""

    def save_and_import(state, **options):
        path = tmp_path / "model.pt"
        torch.save({"model": state}, path)
        return load_potential(path, **options)

    return save_and_import
