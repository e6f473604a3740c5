"""Fingerprint of a potential."""

import hashlib
from collections.abc import Mapping

from torch import Tensor

from dpa4.model import ModelConfig
from dpa4.potential.potential import Potential

_ADDED = {"float32_cutoff": False, "symmetry": "SO3"}
"""Options added since the first fingerprints, with the values that left all models as they were."""


def fingerprint_of(potential: Potential) -> dict[str, str]:
    """Fingerprint of a potential: everything its results depend on.

    Resumable runs compare it before they continue. The digest covers the configuration, the weights and the reference
    energies. Weights are converted to float32, so that the digest does not depend on the precision in which a model
    was loaded, nor on the format of its file. New options do not change the digest of a model that does not use them,
    so that runs can be resumed after an update.

    Returns:
        ``model``: the digest; ``dtype``: floating-point type of the network; ``precision``: "fast" if products are
        computed in bfloat16, else "high".
    """
    return {
        "model": model_digest(potential.config, potential.model.state_dict(), potential.reference_energies),
        "dtype": str(potential.dtype).removeprefix("torch."),
        "precision": potential.precision,
    }


def model_digest(config: ModelConfig, weights: Mapping[str, Tensor], reference_energies: Tensor) -> str:
    """Digest of configuration, weights by name, and reference energies: 16 hexadecimal digits."""
    unused = {name for name, value in _ADDED.items() if getattr(config, name) == value}
    digest = hashlib.sha256(config.model_dump_json(exclude=unused).encode())
    tensors = {"reference_energies": reference_energies}
    for name, tensor in weights.items():
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
