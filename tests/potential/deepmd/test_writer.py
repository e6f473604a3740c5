"""Exported checkpoints equal those of deepmd-kit itself, and give the same energies there."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dpa4.model import Bridging
from dpa4.model.presets import preset
from dpa4.potential.checkpoint import convert, load_potential
from dpa4.potential.deepmd.writer import deepmd_state, export_deepmd
from dpa4.potential.potential import Potential
from helpers import assert_close, graph_of, molecule, random_potential, randomize
from parity import collection, folder_of

INDEX = collection()
REFUSED = {"D_edge_cartesian", "D_node_wise_so3", "D_so2_attn_res_ind"}
NEWER = sorted(
    name for name in INDEX if name.startswith(("E_edge", "E_env", "E_gauss", "E_max", "E_ultra", "E_v0"))
)
# Models whose files have entries, or options, that differ from those of deepmd-kit 3.2.0.
OTHER_LAYOUT = {"E_june2026_mini", "E_pt_expt_layout", "E_product_grid_s2", "E_product_grid_s2_f64grid"}
EXPORTED = sorted(set(INDEX) - REFUSED - set(NEWER) - OTHER_LAYOUT)
STATISTICS = ("min_nbor_dist", "out_std", "dens_force_rmsd")

# Energies, forces and virials of one structure by every model, computed by deepmd-kit in its own process.
BLACK_BOX = """
import sys, numpy as np
from deepmd.infer import DeepPot
inputs = np.load(sys.argv[1])
results = {}
for path in sys.argv[3:]:
    model = DeepPot(path)
    types = [model.get_type_map().index(symbol) for symbol in inputs["symbols"]]
    box = inputs["cell"][None] if inputs["cell"].any() else None
    energy, force, virial = model.eval(inputs["positions"][None], box, types)
    results |= {f"{path}/energy": energy[0, 0], f"{path}/forces": force[0], f"{path}/virial": virial[0]}
np.savez(sys.argv[2], **results)
"""


@pytest.mark.parametrize("name", EXPORTED or [pytest.param("", marks=pytest.mark.skip)])
def test_a_reference_checkpoint_survives_import_and_export(name):
    path = folder_of(name) / "model_f32.pt"
    original = torch.load(path, weights_only=True)["model"]
    exported = deepmd_state(load_potential(path))
    assert exported.keys() == original.keys()
    for key in original.keys() - {"_extra_state"}:
        if key.endswith(("out_bias", "bias_atom_e", "version_tensor", *STATISTICS)):
            continue
        assert exported[key].shape == original[key].shape, key
        torch.testing.assert_close(exported[key].double(), original[key].double(), rtol=1e-7, atol=0, msg=key)
    options = exported["_extra_state"]["model_params"]
    for section in ("descriptor", "fitting_net"):
        assert options[section].keys() == original["_extra_state"]["model_params"][section].keys()
    assert options.keys() >= original["_extra_state"]["model_params"].keys()


@pytest.mark.parametrize(
    "name", NEWER[:5] or [pytest.param("", marks=pytest.mark.skip)]
)  # with narrow networks
def test_reference_checkpoints_newer_than_the_release_are_not_exported(name):
    with pytest.raises(
        ValueError, match="deepmd-kit 3.2.0 cannot read models with .*; the version after 3.2.0 can"
    ):
        deepmd_state(load_potential(folder_of(name) / "model_f32.pt"))


@pytest.mark.parametrize(
    "name", sorted(OTHER_LAYOUT & set(INDEX)) or [pytest.param("", marks=pytest.mark.skip)]
)
def test_reference_checkpoints_of_another_layout_are_exported_to_that_of_the_release(tmp_path, name):
    potential = load_potential(folder_of(name) / "model_f32.pt")
    export_deepmd(potential, tmp_path / "model.pt")
    again = load_potential(tmp_path / "model.pt")
    assert again.config == potential.config
    for key, value in potential.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_export_and_import_are_inverse(tmp_path, dtype):
    potential = random_potential(bridging=Bridging(smooth_cutoff=False), so3_readout="mlp", mlp_bias=True).to(
        dtype
    )
    export_deepmd(potential, tmp_path / "model.pt")
    back = load_potential(tmp_path / "model.pt")
    assert back.config == potential.config
    assert back.dtype == dtype
    assert torch.equal(back.reference_energies, potential.reference_energies)
    assert torch.equal(back(graph_of(molecule())).energy, potential(graph_of(molecule())).energy)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    "grids",
    [
        {},
        {"ffn_on": "so3", "message_node_so3": True, "so3_readout": "mlp", "mlp_bias": True},
    ],
)
def test_models_of_symmetry_o3_have_zeros_in_deepmd_kit(tmp_path, grids):
    potential = random_potential(symmetry="O3", n_focus=2, mmax=2, lmax=3, kmax=2, edge_norm=True, **grids)
    export_deepmd(potential, tmp_path / "model.pt")
    back = load_potential(tmp_path / "model.pt")
    assert back.config == potential.config.model_copy(update={"symmetry": "SO3"})
    for atoms in (molecule(), molecule(1)):
        found, own = back(graph_of(atoms)), potential(graph_of(atoms))
        assert_close(found.energy, own.energy)
        assert_close(found.forces, own.forces)


@pytest.mark.parametrize(("cutoff", "rounded"), [(4.2, True), (4.5, False)])
def test_imported_models_have_the_cutoff_that_float32_holds(tmp_path, cutoff, rounded):
    """deepmd-kit weighs edges with a cutoff in float32; a model of this package has all digits."""
    own = random_potential(cutoff=cutoff, edge_norm=True)
    export_deepmd(own, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        imported = load_potential(tmp_path / name)
        assert imported.config == own.config.model_copy(update={"float32_cutoff": rounded})
        graph = graph_of(molecule(), cutoff)
        difference = float((imported(graph).forces - own(graph).forces).abs().max())
        assert 1e-7 < difference < 1e-5 if rounded else difference == 0


def test_smooth_repulsion_cannot_be_exported(tmp_path):
    potential = random_potential(bridging=Bridging(smooth_cutoff=True))
    with pytest.raises(ValueError, match="bridging.smooth_cutoff = True has no counterpart in deepmd-kit"):
        export_deepmd(potential, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_the_suffix_and_the_folder_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"deepmd-kit checkpoints end in \.pt, got 'model\.pth'"):
        export_deepmd(random_potential(), tmp_path / "model.pth")
    with pytest.raises(FileNotFoundError, match="there is no folder .*absent; create it first"):
        export_deepmd(random_potential(), tmp_path / "absent" / "model.pt")


def deepmd_python():
    """Interpreter of the environment whose ``dp`` command is on the search path."""
    if (command := shutil.which("dp")) is None:
        pytest.skip(
            "needs deepmd-kit: install deepmd-kit==3.2.0 in an environment of its own and append its bin "
            "folder to the search path: "
            "PATH=$PATH:/path/to/environment/bin pytest -m slow tests/potential/deepmd/test_writer.py"
        )
    return Path(command).parent / "python"


def exported_potentials():
    """One potential of each generation and several with rarer switches, all weights random."""
    elements = ("H", "C", "O")
    # The last six, all with norms on edges, are the presets of version 20260820 of deepmd-kit.
    for name in ("paper-neo", "nano", "mini", "neo", "air", "plus", "pro"):
        torch.manual_seed(1)
        config = preset(name, elements, edge_norm=True)
        potential = Potential(config, {"H": -13.6, "C": -1029.5, "O": -2041.25}).double()
        randomize(potential.model, scale=0.05)
        yield name, potential.eval()
    yield "cutoff that float32 rounds", random_potential(cutoff=4.2, float32_cutoff=True, edge_norm=True)
    yield "norms before", random_potential(sandwich_norm=(True, False, True, False), edge_norm=True)
    yield "bridging", random_potential(bridging=Bridging(smooth_cutoff=False))
    yield "no bridging, biases", random_potential(mlp_bias=True, layer_scale=True, n_focus=2, edge_norm=True)
    yield (
        "schedule",
        random_potential(l_schedule=(3, 2, 1), mmax=2, ffn_on="degrees", excluded_pairs=(("H", "O"),)),
    )
    yield (
        "charge",
        random_potential(charge_spin=True, default_charge_spin=(1, 2), so3_readout="glu", fitting=(16, 8)),
    )
    yield (
        "pre-release",
        random_potential(pre_release=True, basis="gaussian", n_atten_head=0, use_env_seed=False),
    )


@pytest.mark.slow
def test_deepmd_kit_computes_the_same_energies_forces_and_virials(tmp_path):
    python = deepmd_python()
    atoms = molecule()
    expected = {}
    for name, potential in exported_potentials():
        path = tmp_path / f"{name}.pt"
        export_deepmd(potential, path)
        charge_spin = potential.config.default_charge_spin or (0, 1)
        expected[str(path)] = potential(graph_of(atoms, potential.config.cutoff, charge_spin))
    inputs, results = tmp_path / "inputs.npz", tmp_path / "results.npz"
    np.savez(inputs, symbols=list(atoms.symbols), positions=atoms.positions, cell=atoms.cell.array)
    done = subprocess.run(
        [python, "-c", BLACK_BOX, inputs, results, *expected], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(results)
    for path, prediction in expected.items():
        np.testing.assert_allclose(
            found[f"{path}/energy"], prediction.energy.item(), rtol=1e-12, err_msg=path
        )
        np.testing.assert_allclose(
            found[f"{path}/forces"], prediction.forces.numpy(), atol=1e-9, err_msg=path
        )
        virial = prediction.virial.numpy().ravel()
        np.testing.assert_allclose(found[f"{path}/virial"], virial, atol=1e-9, err_msg=path)
