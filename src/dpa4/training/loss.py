"""Training loss on energy, forces and virial (arXiv:2606.02419; model-3 section 12.1)."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dpa4.data.dataset import Batch
from dpa4.kernels.incidence import Incidence
from dpa4.potential import Prediction

LossKind = Literal["mae", "mse", "huber"]


class Loss(NamedTuple):
    """Weighted sum of three terms, each the mean over what is labelled in the batch.

    * energy: error per atom, mean over structures;
    * forces: Euclidean norm of the error vector of an atom (``mse``: a third of its square), pooled over all
      atoms of the batch, so that an atom counts the same in a large structure as in a small one;
    * virial: error of a component per atom, mean over the nine components and the structures.

    ``huber`` is quadratic below ``huber_delta`` (eV/atom or eV/Angstrom) and linear above. A structure
    without a label does not enter that term's mean; a term without any label is exactly zero and still part
    of the graph. Weights of structures multiply their error; they are not divided out, so a batch of one
    structure feels its weight. Structures without atoms are allowed. Nothing waits for the device.
    """

    energy: float
    forces: float
    virial: float
    kind: LossKind = "mae"
    huber_delta: float = 0.01

    def __call__(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, a float64 scalar, and its detached unweighted terms by the name of the target."""
        penalty = self._penalty()
        structure = batch.graph.structure
        offsets = Incidence.of_sorted(structure, batch.graph.num_structures).offsets
        atoms = offsets.diff().clamp(min=1).to(batch.energy.dtype)

        energy = penalty((prediction.energy - batch.energy) / atoms)
        virial = penalty((prediction.virial - batch.virial) / atoms[:, None, None]).mean((-1, -2))
        difference = prediction.forces - batch.forces
        if self.kind == "mse":
            forces = difference.square().mean(-1)
        else:
            # vector_norm has the subgradient zero at a zero residual, where a square root would give NaN.
            forces = penalty(torch.linalg.vector_norm(difference, dim=-1))

        terms = {
            "energy": _masked_mean(energy, batch.has_energy, batch.weight),
            "forces": _masked_mean(forces, batch.has_forces[structure], batch.weight[structure]),
            "virial": _masked_mean(virial, batch.has_virial, batch.weight),
        }
        # Forces of a batch without edges are constants; the energy always has a graph to go backward through.
        loss = 0.0 * prediction.energy.sum()
        for name, term in terms.items():
            if weight := getattr(self, name):
                loss = loss + weight * term
        return loss, {name: term.detach() for name, term in terms.items()}

    def _penalty(self) -> Callable[[Tensor], Tensor]:
        if self.kind == "mae":
            return torch.abs
        if self.kind == "mse":
            return torch.square
        delta = self.huber_delta
        return lambda x: torch.where(x.abs() <= delta, 0.5 * x * x, delta * (x.abs() - 0.5 * delta))


def _masked_mean(error: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of the labelled entries over their number; zero without any."""
    kept = torch.where(mask, error * weight, 0.0)
    return kept.sum() / mask.sum().clamp(min=1)
