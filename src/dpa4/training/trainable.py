"""Parameters that a run trains: all of a network, or what the options of fine-tuning choose; and their optimiser."""

from typing import NamedTuple

from torch import nn

from dpa4.model import DPA4
from dpa4.training.finetuning_options import FinetuneOptions
from dpa4.training.low_rank import LowRank
from dpa4.training.muon import HybridMuon
from dpa4.training.optimizer import optimizer_of
from dpa4.training.options import TrainingOptions
from dpa4.training.parts import depth_rates, freeze
from dpa4.training.routing import parameter_groups


class Trainable(NamedTuple):
    """Parameters that a run trains.

    Attributes:
        inputs: Parameters of the network that the loss is differentiated with respect to.
        parameters: Parameters that the optimiser updates: the inputs, with factors in place of adapted weights.
        low_rank: Factors of the adapted weights, if any.
        optimizer: Optimiser of the parameters.
    """

    inputs: list[nn.Parameter]
    parameters: list[nn.Parameter]
    low_rank: LowRank | None
    optimizer: HybridMuon


def trainable(options: TrainingOptions, model: DPA4, rate: float) -> Trainable:
    """Choose what a run trains, and exclude all other parameters of the network from training.

    Args:
        options: Options of the run.
        model: The network, on its device, with its first weights.
        rate: Learning rate, which a schedule changes later.

    Raises:
        ValueError: If the network lacks a part to freeze, nothing is left to train, or the rank of the factors is too
            high.
    """
    chosen = options.finetune
    freeze(chosen.freeze, model)
    low_rank = None
    if chosen.lora_rank is not None:
        low_rank = LowRank(model, chosen.lora_rank, chosen.lora_alpha or chosen.lora_rank)
    inputs = [p for p in model.parameters() if p.requires_grad]
    factors = {} if low_rank is None else low_rank.factors
    groups = parameter_groups(
        model,
        adam_for_basis=options.adam_for_basis,
        factors=factors,
        rates=depth_rates(chosen.depth_decay, model) if chosen.depth_decay != 1 else None,
    )
    adapted = {id(w) for w in low_rank.weights.values()} if low_rank else set()
    parameters = [p for p in inputs if id(p) not in adapted] + [p for pair in factors.values() for p in pair]
    return Trainable(inputs, parameters, low_rank, optimizer_of(options, groups, rate))


def text_of(chosen: FinetuneOptions, trained: Trainable, model: DPA4) -> str:
    """Describe what is trained, for the terminal.

    Args:
        chosen: Options of fine-tuning.
        trained: What is trained.
        model: The network.
    """
    count, total = (sum(p.numel() for p in ps) for ps in (trained.parameters, model.parameters()))
    text = f"trained: {count:,} parameters; the network has {total:,}"
    if chosen.freeze:
        text += f"; frozen: {', '.join(chosen.freeze)}"
    if trained.low_rank is not None:
        text += f"; factors of rank {chosen.lora_rank} in place of {len(trained.low_rank.weights)} weights"
    if chosen.depth_decay != 1:
        first = chosen.depth_decay ** (len(model.blocks) + 1)
        text += f"; learning rate of the embedding {first:.3g} times that of the read-out"
    return text
