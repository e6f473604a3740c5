"""Training states: every entry is checked when a file is read."""

import gzip

import pytest
import torch

from dpa4.training.state import STATE_FORMAT, check_fits, load_state
from kept_files import state_file


@pytest.fixture
def state(tmp_path):
    """Content of a kept training state."""
    path = tmp_path / "kept.pt"
    path.write_bytes(gzip.decompress(state_file(STATE_FORMAT).read_bytes()))
    return load_state(path)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("step", -5, "its entry step is -5, not a number of steps"),
        ("step", 1e300, r"its entry step is 1e\+300, not of type"),
        ("step", True, "its entry step is True, not a number of steps"),
        ("epoch", 10**30, "its entry epoch is 10+, not a number of steps"),
        ("format", torch.zeros(2), "is a training state of format <Tensor>"),
        ("best_score", float("nan"), "its entry best_score is nan, not a number"),
        ("seconds", 10**400, "its entry seconds is an integer of 1329 bits, not a number"),
        ("options", None, "its entry options is None, not of type"),
        ("options", "[a", "its entry options is not valid YAML: line 1, column 3"),
        ("options", "5", "its entry options is '5', not a map of options"),
        ("labelled", {"energy": 1.5}, "its entry labelled.'energy' is 1.5, not a number of steps"),
        ("potential", {}, "its entry potential.reference_energies is not one energy per element"),
        ("optimizer", [], r"its entry optimizer is \[\], not of type"),
        ("average", 5, "its entry average is 5, not of type"),
        ("sums", [1.0], r"its entry sums is \[1.0\], not of type"),
        ("random", {}, "it has no entry random.cpu"),
        ("random", {"cpu": 3}, "its entry 'cpu' is 3, not a tensor"),
        ("potential", {"model.types.table": [1]}, r"its entry 'model.types.table' is \[1\], not a tensor"),
        ("potential", {3: torch.zeros(1)}, "its entry 3 is <Tensor>, not a tensor"),
        (
            "potential",
            {"reference_energies": torch.zeros(2), "model.x": torch.tensor([1.0, float("inf")])},
            "model.x is not finite: 1 of its 2 values",
        ),
        (
            "potential",
            {"reference_energies": torch.zeros(2), "model.x": torch.tensor([1])},
            "model.x has values of type int64",
        ),
    ],
)
def test_malformed_entries_are_refused_by_name(state, tmp_path, entry, value, message):
    path = tmp_path / "last.pt"
    torch.save(state | {entry: value}, path)
    with pytest.raises(ValueError, match=f"last.pt:? {message}"):
        load_state(path)


def test_every_missing_entry_is_named(state, tmp_path):
    path = tmp_path / "last.pt"
    for entry in [*state.keys() - {"coverage"}]:  # of earlier versions, not used
        torch.save({key: value for key, value in state.items() if key != entry}, path)
        message = "not a training state" if entry == "format" else f"it has no entry {entry}"
        with pytest.raises(ValueError, match=message):
            load_state(path)


def test_the_weights_of_another_model_are_told(state, tmp_path):
    weights = state["potential"]
    check_fits(state, weights, tmp_path / "last.pt")
    other = {key: value for key, value in weights.items() if key != "model.types.table"}
    other |= {"model.basis.frequencies": torch.zeros(9), "model.extra": torch.zeros(1)}
    with pytest.raises(
        ValueError,
        match=r"last.pt belongs to another model: model.extra is missing, model.types.table is unknown, "
        r"model.basis.frequencies has shape \(4,\) instead of \(9,\)",
    ):
        check_fits(state, other, tmp_path / "last.pt")


def test_a_damaged_file_is_told_by_its_checksum(state, tmp_path):
    path = tmp_path / "last.pt"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    at = content.index(state["potential"]["model.types.table"][0].numpy().tobytes())
    content[at + 1] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="last.pt: it is damaged, the checksum of its part"):
        load_state(path)
