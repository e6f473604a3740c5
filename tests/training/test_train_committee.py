"""Training of committees: seeds, splits, the data that no member has seen, calibration, continuation."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from dpa4.potential import load_potential, model_card
from dpa4.potential.committee import member_files
from dpa4.training import RunConfig, committee, train_committee
from dpa4.training.committee import member_config
from dpa4.training.evaluation import batches_for, predict_committee
from dpa4.training.run_data import calibration_frames, read_data
from training_runs import SILENT, options

pytestmark = pytest.mark.usefixtures("no_figures")


def config(data, output, **training) -> RunConfig:
    return RunConfig.model_validate(
        options(data, output, **({"steps": 2, "validation_interval": 2} | training))
    )


def train(*arguments, **named) -> str:
    console = Console(file=io.StringIO(), record=True, width=200)
    train_committee(*arguments, **named, console=console)
    return console.export_text()


@pytest.fixture(scope="module")
def trained(argon_file, tmp_path_factory):
    """Committee of two members, what its training printed, and its options."""
    own = config(argon_file, tmp_path_factory.mktemp("committee") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "matplotlib.figure.Figure.savefig",
            lambda self, file, **_: None if hasattr(file, "write") else Path(file).touch(),
        )
        return own, train(own, 2)


def places(frames) -> set[bytes]:
    return {frame.positions.tobytes() for frame in frames}


def test_members_differ_in_seed_and_split_and_share_what_they_leave_out(argon_file, tmp_path):
    base = config(argon_file, tmp_path, seed=5)
    members = [member_config(base, number) for number in range(3)]
    assert [member.training.seed for member in members] == [5, 6, 7]
    assert [member.output.name for member in members] == ["member-0", "member-1", "member-2"]
    data = [read_data(member, SILENT) for member in members]
    assert len({frozenset(places(one.validation)) for one in data}) > 1
    held_out = places(calibration_frames(members[0]))
    assert len(held_out) == 3  # a fifth of thirteen
    for member, one in zip(members, data, strict=True):
        assert places(calibration_frames(member)) == held_out
        assert not held_out & (places(one.train) | places(one.validation))
        assert len(places(one.train) | places(one.validation) | held_out) == 13


def test_a_validation_file_calibrates_and_no_data_are_left_out(argon_file, tmp_path):
    base = config(argon_file, tmp_path)
    other = Path(shutil.copy(argon_file, tmp_path / "valid.xyz"))
    base = base.model_copy(update={"data": base.data.model_copy(update={"validation": (other,)})})
    member = member_config(base, 1)
    assert member.data.calibration_fraction == 0
    assert len(calibration_frames(member)) == len(read_data(member, SILENT).train) == 13


def test_calibration_is_that_of_the_trained_models_on_unseen_data(trained):
    own, printed = trained
    frames = calibration_frames(member_config(own, 0))
    potentials = [load_potential(file) for file in member_files(own.output)]
    found = predict_committee(potentials, batches_for(potentials, frames, 2000).batches(0))
    errors = [np.linalg.norm(p.forces - f.forces, axis=1) for f, p in zip(frames, found, strict=True)]
    spread = [np.linalg.norm(p.deviation.forces, axis=1) for p in found]
    factor = np.sqrt(np.mean(np.concatenate(errors) ** 2) / np.mean(np.concatenate(spread) ** 2))
    row = json.loads((own.output / "calibration.json").read_text())[0]
    assert row["quantity"] == "forces" and row["factor"] == pytest.approx(factor)
    assert f"calibration on {len(frames)} structures, forces: error {factor:.2f} x deviation" in printed


def test_model_card_of_every_member_has_the_calibration(trained):
    own, _ = trained
    row = json.loads((own.output / "calibration.json").read_text())[0]
    for number, file in enumerate(member_files(own.output), start=1):
        card = model_card(file).sections["Provenance"]
        assert card["committee"].startswith(f"member {number} of 2, calibrated on 3 structures")
        assert card["calibration, forces"].startswith(f"error {row['factor']:.2f} x deviation")
        assert "those that were written" in card["integrity"]


def test_a_committee_is_continued_and_enlarged(argon_file, tmp_path, trained):
    own = config(argon_file, tmp_path / "run")
    shutil.copytree(trained[0].output, own.output)
    with pytest.raises(FileExistsError, match="already holds a committee; continue it with --resume"):
        train(own, 2)
    printed = train(own, 3, resume=True)
    assert printed.count("resumed after step 2") == 2 and "member 3 of 3: seed 2" in printed
    assert len(member_files(own.output)) == 3
    card = model_card(member_files(own.output)[0]).sections["Provenance"]
    assert card["committee"].startswith("member 1 of 3")
    with pytest.raises(ValueError, match="holds a committee of 3 members; give --committee 3 or more"):
        train(own, 2, resume=True)


def test_a_signal_ends_the_committee_between_members(argon_file, tmp_path, monkeypatch):
    def interrupted(config, **_):
        committee.caught_signals.append(2)
        return config.output

    monkeypatch.setattr(committee, "train", interrupted)
    monkeypatch.setattr(committee, "caught_signals", [])
    printed = train(config(argon_file, tmp_path / "run"), 3)
    assert printed.count("member ") == 1 and "stopped; continue with --resume" in printed


def test_wrong_numbers_are_refused(argon_file, tmp_path):
    own = config(argon_file, tmp_path / "run")
    with pytest.raises(ValueError, match="at least 2 members, got 1"):
        train(own, 1)
    with pytest.raises(ValueError, match="at_once must be at least 1, got 0"):
        train(own, 2, at_once=0)
    with pytest.raises(FileNotFoundError, match="there is no committee to resume"):
        train(own, 2, resume=True)


@pytest.mark.slow
def test_members_trained_at_once_are_those_trained_one_by_one(argon_file, tmp_path, trained):
    own = config(argon_file, tmp_path / "run")
    printed = train(own, 2, at_once=2)
    assert printed.count("has finished") == 2 and "calibration on 3 structures" in printed
    for one, two in zip(member_files(own.output), member_files(trained[0].output), strict=True):
        a, b = load_potential(one).state_dict(), load_potential(two).state_dict()
        assert all((a[name] == b[name]).all() for name in b)
        assert "step       2" in (one.parent.parent / f"{one.parent.name}.log").read_text()


@pytest.mark.slow
def test_a_member_that_fails_is_named_and_the_others_end(argon_file, tmp_path):
    own = config(argon_file, tmp_path / "run")
    own = own.model_copy(update={"data": own.data.model_copy(update={"validation_fraction": 0.99})})
    with pytest.raises(RuntimeError, match=r"2 of 2 members failed; see .*member-0.log"):
        train(own, 2, at_once=2)
    assert "leaves none to train on" in (own.output / "member-0.log").read_text()


@pytest.mark.gpu
def test_members_are_trained_at_once_on_gpus(argon_file, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    own = config(argon_file, tmp_path / "run", compile=False).model_copy(update={"device": "cuda"})
    printed = train(own, 2, at_once=2)
    assert printed.count("has finished") == 2 and "calibration on 3 structures" in printed
    for member in (0, 1):
        assert "device cuda" in (own.output / f"member-{member}.log").read_text()
