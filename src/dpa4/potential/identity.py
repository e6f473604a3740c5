"""What tells the results of one potential from those of another."""

import hashlib

from dpa4.potential.potential import Potential


def identify(potential: Potential) -> dict[str, str]:
    """What results depend on of a potential, for runs that keep results and go on after an interruption.

    The digest is that of the configuration, the weights and the reference energies. Weights count as float32, so
    that a model has the same digest in whatever precision it was loaded, and from whatever file.

    Returns:
        ``model``, the digest; ``dtype`` of the network; ``precision``, "fast" with products in bfloat16 or "high".
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
        "precision": "fast" if potential.model.block_autocast else "high",
    }
