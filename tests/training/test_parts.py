"""Frozen parts of a network, and learning rates that fall with depth."""

import math

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from dpa4.model import DPA4
from dpa4.model.presets import preset
from dpa4.training.muon import HybridMuon, orthogonalize
from dpa4.training.options import RunConfig, TrainingOptions
from dpa4.training.parts import depth_rates, freeze, part_of, parts_of
from dpa4.training.trainable import trainable
from finetuning_runs import finetune, options, start_and_data
from helpers import random_potential
from training_runs import Killed, assert_same_run, kill_at

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("parts")
    start_and_data(path)
    return path


@pytest.mark.parametrize("name", ["nano", "paper-neo", "dpa4-neo-v20260911"])
def test_every_parameter_belongs_to_a_part(name):
    model = DPA4(preset(name, elements=("H", "O")))
    found = {part_of(n) for n, _ in model.named_parameters()}
    assert found == set(parts_of(model)) and len(found) == len(model.blocks) + 2


def test_a_charge_belongs_to_the_embedding():
    assert part_of("charge_spin.mix.weight") == "embedding"


def test_frozen_parts_are_bitwise_unchanged_and_all_others_train(folder, tmp_path):
    text = finetune(options(folder, tmp_path / "run", {"freeze": ["embedding", "block1"]}))
    assert "frozen: embedding, block1" in text
    before, after = (
        load_file(p) for p in (folder / "start.safetensors", tmp_path / "run" / "last.safetensors")
    )
    assert before.keys() == after.keys()
    names = [n for n in before if n.startswith("model.")]
    frozen = [n for n in names if part_of(n.removeprefix("model.")) in ("embedding", "block1")]
    assert 0 < len(frozen) < len(names)
    for n in frozen:
        assert torch.equal(before[n], after[n]), n
    moved = [n for n in names if n not in frozen and not torch.equal(before[n], after[n])]
    assert len(moved) > 0.9 * (len(names) - len(frozen))  # the router of one branch has no gradient


def test_frozen_parts_have_no_gradient():
    potential = random_potential()
    trained = trainable(TrainingOptions(finetune={"freeze": ["blocks"]}), potential.model, 1e-3)
    names = {id(p): n for n, p in potential.model.named_parameters()}
    assert {part_of(names[id(p)]) for p in trained.inputs} == {"embedding", "readout"}
    assert sum(len(g["params"]) for g in trained.optimizer.param_groups) == len(trained.inputs)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (("block3",), "no part 'block3'; allowed are embedding, block1, block2, readout, and blocks"),
        (("Embedding",), "no part 'Embedding'"),
        (("embedding", "blocks", "readout"), "leaves nothing to train"),
    ],
)
def test_parts_that_cannot_be_frozen(folder, tmp_path, chosen, message):
    with pytest.raises(ValueError, match=message):
        freeze(chosen, random_potential().model)
    with pytest.raises(ValueError, match=message):
        finetune(options(folder, tmp_path / "run", {"freeze": list(chosen)}))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("finetune", {"freeze": ["blocks"]}, r"training.finetune.freeze = \['blocks'\] is for fine-tuning"),
        (
            "finetune",
            {"depth_decay": 0.5},
            "training.finetune.depth_decay = 0.5 is for fine-tuning; give model.start",
        ),
        ("finetune", {"lora_rank": 2}, "training.finetune.lora_rank = 2 is for fine-tuning"),
        ("finetune", {"lora_alpha": 2}, "training.finetune.lora_alpha = 2 needs training.finetune.lora_rank"),
        ("replay", {"files": "old.xyz"}, r"data.replay.files = \['old.xyz'\] is for fine-tuning"),
        ("replay", {"share": 0.25}, "data.replay.share = 0.25 is for fine-tuning"),
    ],
)
def test_options_of_fine_tuning_need_a_start(section, values, message):
    data, training = {"train": "new.xyz"}, {}
    (training if section == "finetune" else data)[section] = values
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({"data": data, "training": training})


# --- learning rates by depth


def test_rates_fall_from_the_read_out_to_the_embedding():
    model = random_potential().model
    rates = depth_rates(0.5, model)
    assert rates.keys() == dict(model.named_parameters()).keys()
    expected = {"embedding": 0.125, "block1": 0.25, "block2": 0.5, "readout": 1.0}
    assert all(rate == expected[part_of(name)] for name, rate in rates.items())
    trained = trainable(TrainingOptions(finetune={"depth_decay": 0.5}), model, 1e-3)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in trained.optimizer.param_groups:
        assert group["rates"] == [rates[names[id(p)]] for p in group["params"]]


def test_the_update_has_the_rates():
    """First update, computed by hand: Adam moves by the rate, decay and Muon are proportional to it."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"adam": [(5,), (4,)], "adamw": [(6,), (2, 3)], "muon": [(8, 8), (3, 8, 8)]}
    rates = {"adam": [0.25, 1.0], "adamw": [0.5, 0.125], "muon": [0.5, 0.25]}
    groups = [
        {
            "params": [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes[route]],
            "route": route,
            "rates": rates[route],
        }
        for route in shapes
    ]
    lr, decay = 1e-2, 0.1
    before = [[p.detach().clone() for p in group["params"]] for group in groups]
    optimizer = HybridMuon(groups, lr, weight_decay=decay)
    for group in groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    gradients = [[p.grad.clone() for p in group["params"]] for group in groups]
    optimizer.step()
    score = 0.9 * 0.5 + 0.1 * 1.0  # of Magma: gradient and momentum agree
    for group, olds, grads in zip(groups, before, gradients, strict=True):
        for p, old, g, rate in zip(group["params"], olds, grads, group["rates"], strict=True):
            if group["route"] == "muon":
                direction = orthogonalize(g.reshape(-1, 8, 8)).float().view(p.shape)
                step = 0.18 * math.sqrt(8) * (0.1 + 0.9 * score) * direction
            else:
                step = g.sign()
            kept = 1 - lr * rate * (0 if group["route"] == "adam" else decay)
            # 5e-3 of a step: Muon rounds its steps to bfloat16. Adam only to float32.
            tolerance = lr * rate * (5e-3 if group["route"] == "muon" else 1e-4)
            torch.testing.assert_close(p.detach(), kept * old - lr * rate * step, rtol=0, atol=tolerance)


def test_rates_stay_with_their_parameters_when_some_have_no_gradient():
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 3, 4)]
    rates = [1.0, 0.5, 0.25]
    optimizer = HybridMuon([{"params": parameters, "route": "adam", "rates": rates}], 1e-2)
    for p in parameters[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(parameters[0], torch.zeros(2))
    for p, rate in zip(parameters[1:], rates[1:], strict=True):
        torch.testing.assert_close(p.detach(), torch.full_like(p, -1e-2 * rate))


def test_a_run_with_frozen_parts_and_rates_continues_bit_for_bit(folder, tmp_path, monkeypatch):
    chosen = {"freeze": ["embedding"], "depth_decay": 0.7}
    finetune(options(folder, tmp_path / "whole", chosen))
    part = options(folder, tmp_path / "part", chosen)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        finetune(part)
    finetune(part, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    with pytest.raises(ValueError, match="training.finetune.depth_decay: 0.7 -> 1.0"):
        finetune(options(folder, tmp_path / "part", {"freeze": ["embedding"]}), resume=True)
