"""Training loss on energy, forces and virial (arXiv:2606.02419; docs/theory.md, "Loss")."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dpa4.data.batch import Batch
from dpa4.ops.incidence import Incidence
from dpa4.potential import Prediction

LossKind = Literal["mae", "mse", "huber"]


class Loss(NamedTuple):
    """Weighted sum of an energy, a force and a virial term, each a mean over the labels in the batch.

    * energy: error per atom, averaged over structures;
    * forces: Euclidean norm of the error vector of an atom (``mse``: a third of its square), averaged over all
      atoms of the batch, so that an atom counts the same in a large structure as in a small one;
    * virial: error per component and atom, averaged over the nine components and the structures.

    Structures without a label are excluded from the mean of that term. A term without any label is exactly zero
    and still part of the autograd graph. The weight of a structure multiplies its errors. Means are not divided
    by the sum of the weights, so a weight also acts in a batch of one structure. Structures without atoms are
    allowed. No operation waits for the device. The losses of the parts of a batch add up to that of the batch, since
    the numbers of labels, ``Batch.counts``, are those of the whole batch.

    Forces on atoms with a bound (`dpa4.training.fragments`) add ``bound`` times the mean of log(1 + excess), with the
    excess over the bound in eV/Angstrom. The logarithm lets the gradients of the labels prevail, however large a
    force is.

    Attributes:
        energy: Weight of the energy term (eV/atom).
        forces: Weight of the force term (eV/Angstrom).
        virial: Weight of the virial term (eV/atom).
        kind: Error measure. ``huber`` is quadratic up to ``huber_delta`` and linear above.
        huber_delta: Error above which ``huber`` is linear, in eV/atom and eV/Angstrom.
        bound: Weight of forces above their bound.
    """

    energy: float
    forces: float
    virial: float
    kind: LossKind = "mae"
    huber_delta: float = 0.01
    bound: float = 0.1

    def __call__(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss, a float64 scalar, and its detached, unweighted terms by name."""
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
            # At a zero residual the subgradient of vector_norm is zero; the derivative of a square root is NaN.
            forces = penalty(torch.linalg.vector_norm(difference, dim=-1))

        counts = batch.counts.clamp(min=1).unbind()
        terms = {
            "energy": _masked_mean(energy, batch.has_energy, batch.weight, counts[0]),
            "forces": _masked_mean(forces, batch.has_forces[structure], batch.weight[structure], counts[1]),
            "virial": _masked_mean(virial, batch.has_virial, batch.weight, counts[2]),
        }
        # Without edges the forces are constants. The energy always provides an autograd graph for the backward pass.
        loss = 0.0 * prediction.energy.sum()
        for name, term in terms.items():
            if weight := getattr(self, name):
                loss = loss + weight * term
        loss = loss + self.bound * _excess(prediction.forces, batch.max_force, counts[3])
        return loss, {name: term.detach() for name, term in terms.items()}

    def _penalty(self) -> Callable[[Tensor], Tensor]:
        if self.kind == "mae":
            return torch.abs
        if self.kind == "mse":
            return torch.square
        delta = self.huber_delta
        return lambda x: torch.where(x.abs() <= delta, 0.5 * x * x, delta * (x.abs() - 0.5 * delta))


def absolute_errors(prediction: Prediction, batch: Batch) -> Tensor:
    """Sums of the absolute errors of a batch, and the numbers of values: rows of a tensor (2, 3), float64.

    The columns are energy per atom (eV), components of forces (eV/Angstrom) and components of the virial per atom
    (eV), as in the tables of `dpa4.training.errors`. Weights of structures do not count, and no operation waits for
    the device.
    """
    structure = batch.graph.structure
    offsets = Incidence.of_sorted(structure, batch.graph.num_structures).offsets
    atoms = offsets.diff().clamp(min=1).to(batch.energy.dtype)
    with torch.no_grad():
        energy = ((prediction.energy - batch.energy) / atoms)[:, None]
        virial = ((prediction.virial - batch.virial) / atoms[:, None, None]).flatten(1)
        errors = (
            (energy, batch.has_energy),
            (prediction.forces - batch.forces, batch.has_forces[structure]),
            (virial, batch.has_virial),
        )
        sums = [torch.where(mask[:, None], e.double().abs(), 0.0).sum() for e, mask in errors]
        values = [mask.sum() * e.shape[1] for e, mask in errors]
    return torch.stack([torch.stack(sums), torch.stack(values).double()])


def _masked_mean(error: Tensor, mask: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Weighted sum of the labelled entries divided by their number in the whole batch; zero without labels."""
    return torch.where(mask, error * weight, 0.0).sum() / count


def _excess(forces: Tensor, bound: Tensor, count: Tensor) -> Tensor:
    """Mean of log(1 + excess) over the atoms of the whole batch with a bound; zero if there is none."""
    excess = torch.where(bound > 0, torch.linalg.vector_norm(forces, dim=-1) - bound, 0.0).clamp(min=0)
    return excess.log1p().sum() / count
