"""Make tests/data/parity: small models with the energies and forces that deepmd-kit 3.2.0 computes.

Run ``OMP_NUM_THREADS=1 python scripts/make_parity_data.py REFERENCE_FOLDER`` in an environment with torch 2.13,
deepmd-kit 3.2.0, numpy and safetensors; it takes about a minute. Where the compiled operators of deepmd-kit
(``deepmd/lib/libdeepmd_op_pt.so``) refuse the installed torch, rename that file: it is not needed. deepmd-kit is
called, never read: the script knows a few names of its Python interface and the names in its checkpoints.

REFERENCE_FOLDER is the large collection of models with randomised weights (``fixtures/<name>/model_f32.pt``,
``ref.npz`` and ``fixtures/index.json``, likewise in ``fixtures-gen3``). It is not part of the repository. For each
model chosen:

1. deepmd-kit evaluates the model in float64. The numbers must be those of the collection to 1e-9.
2. Weight tensors of at least 256 entries are rounded to ``float8_e5m2``, one byte per weight. The rounded values
   are exact in float32 and float64, so the stored model is a model like any other, only four times smaller.
3. deepmd-kit evaluates the rounded model in float64, for a few structures of the collection: energies, forces,
   virial and descriptors, and for two models the gradients of the parameters.

Three models have switches that no release of deepmd-kit reads (`NEWER`). For these, weights and results of the
collection are copied unchanged.

The last digit of a result of deepmd-kit can change from one process to the next and with the processor. A file
whose model is the same and whose results agree to 1e-11 is therefore left as it is: running the script again changes
nothing.

The choice: the published sizes mini and neo of generation 2 (SO(3) grid; neo has two foci), the switches of the
largest model of generation 1 at 16 channels (S2 grid, two foci, lmax 5), and small models of 16 channels that differ
from ``D_base`` in one option each: charge and spin, the SO(3) grid alone, the conventions of the first checkpoint
format, two foci, no radial mixing (as in the published nano), ZBL bridging, norms before convolution and
feed-forward network, and each of the three newer switches.
"""

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepmd.infer import DeepPot
from deepmd.pt.model.model import get_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from parity_files import (  # noqa: E402
    FOLDER,
    NAMES,
    Arrays,
    ParityFile,
    projections,
    read_parity_file,
    round_weights,
    write_parity_file,
)

STRUCTURES = ("nacl8", "ethanol", "fcc_prim", "prim2", "axis_cluster", "disconnected")
MORE_STRUCTURES = {"D_zbl_atten": ("zbl_cluster", "dimer_OH_0.60")}  # closer than the bridging radii
NEWER = ("E_edge_norm_FTF", "E_env_exp_5", "E_gauss_fix")
GRADIENTS = {"D_base": "prim2", "C_mini": "ethanol"}
INPUTS = ("pos", "cell", "pbc", "types", "Z")
RESULTS = ("energy", "forces", "virial", "atom_energy", "descriptor")
PREFIX = "model.Default."
TOLERANCE = 1e-9  # of the largest value, or of 1 where all values are smaller
SAME = 1e-11  # likewise; processes differ by 1e-14


class Reference:
    """One model in deepmd-kit, evaluated in float64."""

    def __init__(self, state: dict[str, Any], charge_spin: tuple[int, int] | None) -> None:
        """Load a state dict as deepmd-kit's training writes it."""
        state = copy.deepcopy(state)
        parameters = state["_extra_state"]["model_params"]
        parameters["descriptor"]["precision"] = parameters["fitting_net"]["precision"] = "float64"
        parameters["use_compile"] = False
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pt"
            torch.save({"model": state}, path)
            self.potential = DeepPot(path)
        self.model = self.potential.deep_eval.dp.model["Default"]
        # Constants of the architecture were rounded to float32 by the file; a new model has all their digits.
        exact = dict(get_model(copy.deepcopy(parameters)).named_buffers())
        for name, buffer in self.model.named_buffers():
            if name.endswith("balance_weight"):
                buffer.copy_(exact[name])
        self.options = {} if charge_spin is None else {"charge_spin": np.array([charge_spin], dtype=float)}

    def evaluate(self, structure: Arrays) -> Arrays:
        """Return the results for one structure."""
        self.model.train()
        self.model.eval()  # discards cached products of weights
        cell = structure["cell"].reshape(1, 9) if structure["pbc"].all() else None
        inputs = structure["pos"].reshape(1, -1), cell, structure["types"]
        energy, forces, virial, atomic, _ = self.potential.eval(*inputs, atomic=True, **self.options)
        return {
            "energy": energy.reshape(()),
            "forces": forces[0],
            "virial": virial.reshape(3, 3),
            "atom_energy": atomic.ravel(),
            "descriptor": self.potential.eval_descriptor(*inputs, **self.options)[0],
        }

    def gradients(self, structure: Arrays) -> Arrays:
        """Return projections of the gradients of the energy plus a weighted sum of the forces."""
        self.model.train()
        cell = torch.from_numpy(structure["cell"]).reshape(1, 9) if structure["pbc"].all() else None
        coordinates, types = (
            torch.from_numpy(structure["pos"])[None],
            torch.from_numpy(structure["types"])[None],
        )
        weights = np.cos(np.arange(1.0, structure["pos"].size + 1)).reshape(-1, 3)
        parameters = dict(self.model.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        result = self.model(coordinates, types, box=cell)
        loss = result["energy"].sum() + (torch.from_numpy(weights) * result["force"][0]).sum()
        found = torch.autograd.grad(
            loss, list(parameters.values()), materialize_grads=True, allow_unused=True
        )
        projected = {PREFIX + k: projections(v.numpy()) for k, v in zip(parameters, found, strict=True)}
        return {"c": weights, "L": np.array(loss.item())} | projected

    def parameters(self) -> set[str]:
        """Return the names of the parameters in the state dict."""
        return {PREFIX + name for name, _ in self.model.named_parameters()}

    def count(self) -> int:
        """Return the number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def collected(folder: Path, name: str) -> dict[str, Arrays]:
    """Read the structures and results of one model of the collection."""
    structures: dict[str, Arrays] = {}
    with np.load(folder / name / "ref.npz") as file:
        for key in file.files:
            structure, quantity = key.split("/")
            structures.setdefault(structure, {})[quantity] = file[key]
    return structures


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value or to 1 where all values are smaller."""
    difference = np.abs(found.ravel().astype(float) - expected.ravel()).max(initial=0.0)
    return float(difference / np.abs(expected).max(initial=1.0))


def check(name: str, structure: str, found: Arrays, expected: Arrays) -> None:
    """Exit where deepmd-kit here and the collection disagree."""
    for quantity in RESULTS:
        difference = deviation(found[quantity], expected[quantity])
        if difference > TOLERANCE:
            sys.exit(f"{name}, {structure}: {quantity} differs from the collection by {difference:.2e}")


def is_same(file: ParityFile, path: Path) -> bool:
    """Return whether ``path`` holds the same model and, but for rounding, the same results."""
    if not path.exists():
        return False
    old = read_parity_file(path)
    parameters = [each.state["_extra_state"]["model_params"] for each in (file, old)]
    if parameters[0] != parameters[1] or (file.charge_spin, file.n_params) != (old.charge_spin, old.n_params):
        return False
    old_arrays, arrays = arrays_of(old), arrays_of(file)
    return old_arrays.keys() == arrays.keys() and all(
        value.shape == old_arrays[key].shape
        and deviation(value, old_arrays[key]) <= (0 if key[0] == "state" else SAME)
        for key, value in arrays.items()
    )


def arrays_of(file: ParityFile) -> dict[tuple[str, ...], np.ndarray]:
    """Return weights, structures and results of a file."""
    found = {("state", k): v.numpy() for k, v in file.state.items() if k != "_extra_state"}
    for structures in (file.structures, file.gradients):
        for structure, arrays in structures.items():
            found |= {(structure, quantity): value for quantity, value in arrays.items()}
    return found


def reduced(fixtures: Path, name: str, entry: dict[str, Any]) -> ParityFile:
    """Round the weights of one model of the collection and evaluate it."""
    state = torch.load(fixtures / name / "model_f32.pt", map_location="cpu", weights_only=True)["model"]
    charge_spin = entry.get("charge_spin")
    given = None if charge_spin is None else (int(charge_spin[0]), int(charge_spin[1]))
    structures = collected(fixtures, name)
    chosen = {label: structures[label] for label in STRUCTURES + MORE_STRUCTURES.get(name, ())}
    if name in NEWER:
        kept = {label: {k: structure[k] for k in INPUTS + RESULTS} for label, structure in chosen.items()}
        return ParityFile(state, given, entry["n_params"], kept, {})
    original = Reference(state, given)
    for label, structure in chosen.items():
        check(name, label, original.evaluate(structure), structure)
    state = round_weights(state, original.parameters())
    reference = Reference(state, given)
    results = {
        label: {quantity: structure[quantity] for quantity in INPUTS} | reference.evaluate(structure)
        for label, structure in chosen.items()
    }
    gradients = {label: reference.gradients(chosen[label]) for n, label in GRADIENTS.items() if n == name}
    return ParityFile(state, given, reference.count(), results, gradients)


def main() -> None:
    """Make all files."""
    parser = argparse.ArgumentParser(
        description="Make tests/data/parity from the large reference collection."
    )
    parser.add_argument("reference", type=Path, help="folder of the collection, with fixtures/index.json")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write to")
    arguments = parser.parse_args()
    folders = [arguments.reference / folder for folder in ("fixtures", "fixtures-gen3")]
    indices = {folder: json.loads((folder / "index.json").read_text()) for folder in folders}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        path = arguments.output / f"{name}.safetensors"
        fixtures = next(folder for folder, index in indices.items() if name in index)
        file = reduced(fixtures, name, indices[fixtures][name])
        same = is_same(file, path)
        if not same:
            write_parity_file(file, path)
        print(
            f"{name}: {path.stat().st_size / 1000:.0f} kB, {'unchanged' if same else 'written'}", flush=True
        )


if __name__ == "__main__":
    main()
