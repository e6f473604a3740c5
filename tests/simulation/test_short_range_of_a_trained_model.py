"""A model trained with the default options for a minute: its walls, compressed structures, and collisions.

`benchmarks/reliability.py` measures the same with thousands of structures.
"""

import importlib.util
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from rich.console import Console

from dpa4 import load_potential
from dpa4.execution.evaluator import Evaluator
from dpa4.simulation.close_contacts import CURVATURE
from dpa4.training import load_run_config, train

ROOT = Path(__file__).parents[2]
ORGANIC = ROOT / "examples" / "organic"
STEPS = 60  # the errors of the model are large then, and its short range is as safe as later


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reliability", ROOT / "benchmarks" / "reliability.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["reliability"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    options = (f"output={output}", f"training.steps={STEPS}", f"training.validation_interval={STEPS}")
    data = (f"data.train={ORGANIC / 'train.xyz'}", f"data.validation={ORGANIC / 'valid.xyz'}")
    small = ("model.channels=16", "training.batch_size=4", "device=cpu")
    return train(
        load_run_config(ORGANIC / "run.yaml", [*options, *data, *small]), console=Console(quiet=True)
    )


@pytest.fixture(scope="module")
def frames():
    return ase.io.read(ORGANIC / "valid.xyz", ":")


def test_every_pair_has_a_wall_without_spikes(script, model):
    for found in script.pairs(load_potential(model), step=0.02):
        assert found["monotonic"] and found["finite"], found
        assert found["largest excess curvature"] < CURVATURE, found
        assert found["lowest energy"] > -10, found


def test_forces_in_compressed_structures_are_those_of_nuclei(script, model, frames):
    ratios = script.compressed(load_potential(model), frames, count=80)
    assert len(ratios) > 70 and (ratios <= 10).all()


@pytest.mark.slow
def test_collisions_conserve_energy(script, model, frames):
    structures = script.one_of_each(frames)
    kinds = (("ethylene", 200.0), ("solid-CO2", 50.0))
    cases = [script.Collision(name, structures[name], energy, seed=0) for name, energy in kinds]
    script.collide(Evaluator(load_potential(model), compile=None), cases)
    assert all(c.worst < 1e-4 and c.closest < 0.9 and not c.running for c in cases), vars(cases[0])


def test_without_the_windows_the_same_network_has_no_walls(script, model):
    """The checks above can fail."""
    potential = load_potential(model)
    from dpa4.model.short_range import NetworkAlone

    potential.short_range = NetworkAlone()
    assert not all(found["monotonic"] for found in script.pairs(potential, step=0.02))
    assert np.isfinite([found["lowest energy"] for found in script.pairs(potential, step=0.1)]).all()
