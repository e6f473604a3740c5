"""Numbers of deepmd-kit: the models in data/parity, on any checkout.

No test here is skipped: without the files, all fail.
"""

import pytest
import torch

from parity import ParityCase, assert_float32, assert_float64, assert_parameter_gradients
from parity_files import FOLDER, NAMES, projections, read_parity_file

SIZE_LIMIT = 5_000_000  # bytes, of a clone


@pytest.fixture
def shipped(tmp_path):
    """Read a file and write its weights as the checkpoint that deepmd-kit's training writes."""

    def read(name):
        file = read_parity_file(FOLDER / f"{name}.safetensors")
        checkpoint = tmp_path / "model.pt"
        torch.save({"model": file.state}, checkpoint)
        return ParityCase(name, checkpoint, file.structures, file.charge_spin), file

    return read


def test_the_folder_holds_all_files_and_is_small():
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(NAMES)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < SIZE_LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_float64(shipped, name):
    case, _ = shipped(name)
    assert_float64(case)


@pytest.mark.parametrize("name", NAMES)
def test_float32(shipped, name):
    case, _ = shipped(name)
    assert_float32(case)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts(shipped, name):
    case, file = shipped(name)
    assert sum(parameter.numel() for parameter in case.load().parameters()) == file.n_params


@pytest.mark.parametrize("name,structure", [("D_base", "prim2"), ("C_mini", "ethanol")])
def test_parameter_gradients_of_a_force_loss(shipped, name, structure):
    case, file = shipped(name)
    assert_parameter_gradients(case, structure, file.gradients[structure], projections)
