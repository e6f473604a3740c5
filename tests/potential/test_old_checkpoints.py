"""Files of every format version that dpa4 has written still give the numbers they gave.

A new version without a file fails here: scripts/make_old_checkpoint.py makes it.
"""

import gzip
import json

import numpy as np
import pytest
from safetensors import safe_open

from dpa4.potential import load_potential
from dpa4.potential.checkpoint import FORMAT_VERSION
from dpa4.training.state import STATE_FORMAT, load_state
from kept_files import (
    ALL_STEPS,
    SAVED_STEPS,
    checkpoint_file,
    evaluate,
    read_results,
    state_file,
    training_run,
)


def assert_same_results(file, kept, tolerance):
    """Compare energy (to ``tolerance`` in eV) and forces (to ``tolerance`` of the largest) with stored ones."""
    expected = read_results(kept)
    found = evaluate(file, expected)
    assert found["energy"] == pytest.approx(expected["energy"], rel=0, abs=tolerance)
    largest = np.abs(expected["forces"]).max()
    np.testing.assert_allclose(found["forces"], expected["forces"], rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_checkpoints_of_every_version_give_their_numbers(version):
    path = checkpoint_file(version)
    assert path.is_file(), f"no file of format {version}; run scripts/make_old_checkpoint.py"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format_version"] == str(version)
    assert_same_results(path, path, tolerance=1e-9)
    potential = load_potential(path)
    assert list(potential.elements) == json.loads(metadata["elements"])
    assert potential.coverage is not None


def test_a_run_resumes_from_a_kept_state_and_ends_with_the_same_model(tmp_path):
    path = state_file(STATE_FORMAT)
    assert path.is_file(), f"no training state of format {STATE_FORMAT}; run scripts/make_old_checkpoint.py"
    (tmp_path / "run").mkdir()
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(gzip.decompress(path.read_bytes()))
    assert load_state(last)["step"] == SAVED_STEPS
    run = training_run(tmp_path, ALL_STEPS, resume=True)
    assert load_state(last)["step"] == ALL_STEPS
    # Training is in float32, where processors round differently: weights changed by 1e-7 move the energy by 3e-5 eV.
    # A run that loses the momenta of the optimiser ends 5e-2 eV and 4 % of the forces away.
    assert_same_results(run / "last.safetensors", path, tolerance=2e-3)
