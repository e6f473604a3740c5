"""Parts of a network by their depth: parts that fine-tuning freezes, and learning rates that fall with depth."""

from collections.abc import Iterable, Sequence

from dpa4.model import DPA4

_INPUT = ("basis", "radial", "types", "charge_spin", "seed")
_OUTPUT = ("readout", "energy")


def parts_of(model: DPA4) -> list[str]:
    """Names of the parts of a network, from its input to its output: embedding, block1, block2, ..., readout."""
    return ["embedding", *(f"block{i + 1}" for i in range(len(model.blocks))), "readout"]


def part_of(name: str) -> str:
    """Part of a network that a parameter belongs to.

    Args:
        name: Name of the parameter, such as ``blocks.0.conv.pre_mix.weight``.
    """
    head, _, rest = name.partition(".")
    if head == "blocks":
        return f"block{int(rest.partition('.')[0]) + 1}"
    assert head in _INPUT + _OUTPUT, f"parameter {name} belongs to no part of the network"
    return "embedding" if head in _INPUT else "readout"


def check_parts(chosen: Iterable[str], model: DPA4) -> None:
    """Check the names in ``training.finetune.freeze``.

    Raises:
        ValueError: If the network has no such part, or nothing is left to train.
    """
    parts = parts_of(model)
    for name in chosen:
        if name not in (*parts, "blocks"):
            raise ValueError(
                f"training.finetune.freeze: the network has no part {name!r}; allowed are {', '.join(parts)}, and "
                "blocks for all blocks"
            )
    if not set(parts) - set(_expanded(chosen, parts)):
        raise ValueError(
            f"training.finetune.freeze = [{', '.join(chosen)}] leaves nothing to train; leave out readout, say"
        )


def freeze(chosen: Sequence[str], model: DPA4) -> None:
    """Exclude the parameters of some parts of a network from training.

    Args:
        chosen: Names of parts; "blocks" are all blocks.
        model: The network.

    Raises:
        ValueError: As `check_parts`.
    """
    check_parts(chosen, model)
    frozen = _expanded(chosen, parts_of(model))
    for name, parameter in model.named_parameters():
        if part_of(name) in frozen:
            parameter.requires_grad_(False)


def depth_rates(decay: float, model: DPA4) -> dict[str, float]:
    """Factor of the learning rate of every parameter: 1 in the read-out, times ``decay`` for each part before it.

    Args:
        decay: Factor from a part to the part before it.
        model: The network.
    """
    parts = parts_of(model)
    rate = {part: decay ** (len(parts) - 1 - depth) for depth, part in enumerate(parts)}
    return {name: rate[part_of(name)] for name, _ in model.named_parameters()}


def _expanded(chosen: Iterable[str], parts: Sequence[str]) -> list[str]:
    """Names of parts, with all blocks in place of "blocks"."""
    chosen = set(chosen)
    return [p for p in parts if p in chosen or ("blocks" in chosen and p.startswith("block"))]
