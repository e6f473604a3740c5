"""Fingerprint of a potential."""

import hashlib

from dpa4.potential.potential import Potential


def fingerprint_of(potential: Potential) -> dict[str, str]:
    """Fingerprint of a potential: everything its results depend on.

    Resumable runs compare it before they continue. The digest covers the configuration, the weights and the reference
    energies. Weights are converted to float32, so that the digest does not depend on the precision in which a model
    was loaded, nor on the format of its file.

    Returns:
        ``model``: the digest; ``dtype``: floating-point type of the network; ``precision``: "fast" if products are
        computed in bfloat16, else "high".
    """
    digest = hashlib.sha256(potential.config.model_dump_json().encode())
    tensors = {"reference_energies": potential.reference_energies}
    for name, tensor in potential.model.state_dict().items():
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return {
        "model": digest.hexdigest()[:16],
        "dtype": str(potential.dtype).removeprefix("torch."),
        "precision": potential.precision,
    }
