"""Helpers for the tests: reference data beside the checkout, small potentials and structures, comparisons."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from dpa4.graph import Graph, build_graph
from dpa4.model import ModelConfig
from dpa4.potential import Potential
from dpa4.tracing.stage import graph_of as graph_of_recipe

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(path: str) -> Path:
    """Return a file of the reference collection beside the checkout; skip the test where the file is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"the large reference collection is not part of the repository: {found} is absent")
    return found


def randomize(module: torch.nn.Module, seed: int = 0, scale: float = 0.15) -> None:
    """Add noise to every parameter, so that no layer that starts at zero or one hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            spread = scale if parameter.dim() < 2 else scale * min(1.0, 3 * parameter.shape[-2] ** -0.5)
            parameter += (spread * noise).to(parameter.dtype)


def random_potential(seed: int = 0, **options) -> Potential:
    """A small float64 potential in eval mode with random weights."""
    defaults = {
        "elements": ("H", "C", "O"),
        "channels": 8,
        "n_radial": 6,
        "n_blocks": 2,
        "lmax": 2,
        "cutoff": 4.0,
    }
    torch.manual_seed(seed)
    potential = Potential(ModelConfig(**(defaults | options)), {"H": -0.5, "C": -1.5}).double()
    randomize(potential.model, seed)
    return potential.eval()


def small_potential(seed: int = 0, **options) -> Potential:
    """The smallest potential with every compiled part; tests that compile it share its traces."""
    return random_potential(seed, **({"n_blocks": 1, "lmax": 1, "ffn_on": "s2"} | options))


def molecule(seed: int = 0, n: int = 9, elements: str = "HCO") -> Atoms:
    """Random cluster whose atoms are at least 0.9 Angstrom apart."""
    rng = np.random.default_rng(seed)
    positions: list[np.ndarray] = []
    while len(positions) < n:
        trial = rng.uniform(-2.2, 2.2, 3)
        if all(np.linalg.norm(trial - p) > 0.9 for p in positions):
            positions.append(trial)
    return Atoms([elements[i % len(elements)] for i in range(n)], positions=np.array(positions))


def crystal(seed: int = 0) -> Atoms:
    """Rattled, skewed cell of six atoms, smaller than twice the cutoff."""
    atoms = molecule(seed, 6)
    atoms.set_cell([[5.2, 0, 0], [0.9, 5.0, 0], [-0.7, 0.6, 4.8]])
    atoms.pbc = True
    return atoms


def graph_of(atoms: Atoms, cutoff: float = 4.0, charge_spin: tuple[int, int] = (0, 1)) -> Graph:
    """Graph of an ASE structure."""
    return build_graph(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, cutoff, charge_spin)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    """Compare to a tolerance relative to the largest entry, or to one where all are smaller."""
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    difference = float((actual - expected).detach().abs().max()) if expected.numel() else 0.0
    assert difference <= tolerance * scale, f"difference {difference:.2e} at values up to {scale:.2e}"


def assert_only_views_of_weights(program, fixed_inputs: int) -> None:
    """Check that stages compute nothing, except views, from constants and weights alone."""
    for stage in program.stages:
        nodes = list(graph_of_recipe(stage.recipe).nodes)
        placeholders = [n for n in nodes if n.op == "placeholder"]
        fixed = {
            n
            for n, spec in zip(placeholders, stage.recipe.arguments, strict=True)
            if all(isinstance(length, int) for length in spec.shape)
        }
        assert len(fixed) <= fixed_inputs + len(program.constants.recipe.results)
        for n in nodes:
            if n.op == "call_function" and n.all_input_nodes and fixed.issuperset(n.all_input_nodes):
                assert n.target.is_view, n.format_node()
                fixed.add(n)
