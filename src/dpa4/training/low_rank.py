"""Low-rank adaptation (LoRA, arXiv:2106.09685) of the SO(3)- and SO(2)-equivariant linear layers.

The parameters of the network hold the merged weights, so that neither the network nor its compiled code knows of the
factors: a step differentiates the merged weights as usual, passes their gradients on to the factors by the chain
rule, updates the factors, and merges them again (docs/adr/0030).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpa4.model import DPA4
from dpa4.model.attention import EnvelopeGatedAttention, FocusCompetition
from dpa4.model.block import Block, GatedActivation
from dpa4.model.convolution import SO2Convolution
from dpa4.model.grid import MessageNodeProduct
from dpa4.model.layers import DegreeLinear, EquivariantRMSNorm, RMSNorm
from dpa4.model.network import EnergyNetwork
from dpa4.model.radial import RadialNetwork
from dpa4.model.seed import Embedding, EnvironmentSeed
from dpa4.model.so2 import Gate, SO2Linear, SO2Stack
from dpa4.training.routing import owner_of

Role = Literal["adapted", "whole", "frozen"]

_WHOLE = RadialNetwork, EnvironmentSeed, EnvelopeGatedAttention, FocusCompetition, EnergyNetwork
_VECTORS = RMSNorm, EquivariantRMSNorm, SO2Stack, Block  # modules whose own parameters are scales and biases


def role_of(model: DPA4, name: str) -> Role:
    """Role of a parameter in a low-rank adaptation, as in deepmd-kit.

    The weights of equivariant linear layers are adapted. Small parameters of other kinds are trained as a whole:
    norms, scales, biases, attention, radial network, environment seed and energy network. All others are frozen:
    embeddings of elements, frequencies, gates and grid networks.

    Args:
        model: The network.
        name: Name of the parameter.
    """
    owner, own = owner_of(model, name)
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts))]
    if isinstance(owner, Embedding) or any(isinstance(m, Gate | GatedActivation) for m in around):
        return "frozen"
    if own == "bias":
        return "whole"
    if isinstance(owner, SO2Linear):
        return "adapted"
    if isinstance(owner, DegreeLinear):
        return "frozen" if any(isinstance(m, MessageNodeProduct) for m in around) else "adapted"
    of_hidden = len(around) > 1 and isinstance(around[-2], SO2Convolution) and parts[-2] == "radial_hidden"
    whole = of_hidden or isinstance(owner, _VECTORS) or any(isinstance(m, _WHOLE) for m in around)
    return "whole" if whole else "frozen"


class LowRank:
    """Low-rank changes of the weights of a network: W = W0 + alpha/r down up, with factors of rank r.

    A weight (..., in, out) has the factors ``down`` (..., in, r), drawn from a normal distribution of standard
    deviation 1/sqrt(r), and ``up`` (..., r, out), which is zero at first. Parameters that `role_of` freezes are
    excluded from training.

    Args:
        model: The network, with the weights of the start; parts of it may be frozen already.
        rank: Rank r of the changes.
        alpha: Scale of the changes, relative to 1/r.

    Attributes:
        weights: Adapted parameters of the network by name; they hold the merged weights.
        factors: The factors ``down`` and ``up`` of each of them.

    Raises:
        ValueError: If the rank exceeds that of a weight, or no weight is left to adapt.
    """

    def __init__(self, model: DPA4, rank: int, alpha: float):
        self.scale = alpha / rank
        self.weights: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            role = role_of(model, name)
            if role == "frozen":
                parameter.requires_grad_(False)
            elif role == "adapted" and parameter.requires_grad:
                self.weights[name] = parameter
        if not self.weights:
            raise ValueError(
                "training.finetune.lora_rank has no effect: training.finetune.freeze leaves no equivariant linear "
                "layer to adapt; remove one of them"
            )
        full = {name: min(w.shape[-2:]) for name, w in self.weights.items()}
        if rank > (smallest := min(full.values())):
            raise ValueError(
                f"training.finetune.lora_rank = {rank} exceeds {smallest}, the rank of the smallest matrix; choose a "
                "lower one, or null to train the full weights"
            )
        self._base = {name: w.detach().clone() for name, w in self.weights.items()}
        self.factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, w in self.weights.items():
            *stack, width_in, width_out = w.shape
            down = torch.randn(*stack, width_in, rank, dtype=w.dtype) / rank**0.5
            up = torch.zeros(*stack, rank, width_out, dtype=w.dtype)
            self.factors[name] = nn.Parameter(down.to(w.device)), nn.Parameter(up.to(w.device))

    @torch.no_grad()
    def pass_on_gradients(self) -> None:
        """Replace the gradients of the weights by those of the factors; without the former there are none."""
        for name, weight in self.weights.items():
            down, up = self.factors[name]
            gradient, weight.grad = weight.grad, None
            down.grad = None if gradient is None else (gradient @ up.mT).mul_(self.scale)
            up.grad = None if gradient is None else (down.mT @ gradient).mul_(self.scale)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute the weights from the factors. The operations can be recorded as a CUDA graph."""
        for name, weight in self.weights.items():
            down, up = self.factors[name]
            weight.copy_(torch.matmul(down, up).mul_(self.scale).add_(self._base[name]))

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Use the present factors, such as averaged ones, within the block; restore the weights bit for bit."""
        own = [w.detach().clone() for w in self.weights.values()]
        self.merge()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(self.weights.values()), own)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Weights of the start and factors; with the merged weights, everything needed to continue exactly."""
        down, up = ({name: pair[i].detach() for name, pair in self.factors.items()} for i in range(2))
        return {"start": self._base, "down": down, "up": up}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore a `state_dict`; the merged weights belong to the network.

        Raises:
            LookupError: If an entry is missing.
            ValueError: If an entry has another shape.
        """
        with torch.no_grad():
            for part, own in self.state_dict().items():
                for name, tensor in own.items():
                    stored = state[part][name]
                    if stored.shape != tensor.shape:
                        raise ValueError(f"{part} of {name} has the shape {tuple(stored.shape)}")
                    tensor.copy_(stored)
