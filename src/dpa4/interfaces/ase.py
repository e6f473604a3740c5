"""ASE calculator for one potential or a committee of them."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.outputs import Properties
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from dpa4.data import with_results
from dpa4.data.charge_spin import same_charge_spin, unused_names, warn_of_unused
from dpa4.execution.evaluator import Evaluator
from dpa4.graph import SKIN, Graph, SkinnedNeighbors, within_cutoff
from dpa4.interfaces.coverage_monitor import CoverageMonitor
from dpa4.interfaces.loading import Model, calculators_in, charge_spin_of, load_model, members_of
from dpa4.output import html_table
from dpa4.potential.committee import add_deviations, fingerprint_of_committee
from dpa4.potential.precision import Precision
from dpa4.system import Lock, choose_device, own_settings

Results = dict[str, Any]

_COMMITTEE = ("energy", "forces", "stress")


class DPA4Calculator(Calculator):
    """ASE calculator for a DPA4 potential or a committee of potentials.

    Results for N atoms:

    * ``energy`` and ``free_energy`` (identical): total energy, in eV.
    * ``energies`` (N,): atomic energies, in eV. Their sum is ``energy``.
    * ``forces`` (N, 3): in eV/Angstrom.
    * ``stress`` (6,): in eV/Angstrom^3, in the order xx, yy, zz, yz, xz, xy, positive under tension. Available if the
      structure is periodic along all three axes.
    * ``stresses`` (N, 6): atomic stresses, in eV/Angstrom^3 and in the same order. Their sum is ``stress``. Each edge
      contributes half of its virial to each of its two atoms, divided by the volume of the cell. Atomic stresses
      need a second evaluation and are computed only on request.
    * ``results["virial"]`` (3, 3): minus volume times stress, in eV. Available for every structure, also for
      molecules and slabs.

    Several models form a committee. The results are then means over the models. ``energy_std``, ``forces_std`` and
    ``stress_std`` are the standard deviations over the M models (normalised by M, not M - 1).

    Several threads may use one calculator; they take turns. ASE's methods return the results for the structure of the
    thread. The attribute ``results`` holds those of the last calculation of any thread.

    Models conditioned on charge and spin read the total charge from ``atoms.info["charge"]`` and the multiplicity
    2S + 1 from ``atoms.info["spin"]``; docs/conventions.md lists further names. Changing either triggers a new
    calculation.

    ``parameters`` holds the fingerprint of the model (``model``), ``dtype``, ``precision`` and ``branch``. ASE's
    databases store them with the results.

    If the model file describes its training data, the calculator warns once about elements absent from these data,
    and once about atoms closer together than in these data.

    Example:
        Energy and forces of a structure:

            atoms = ase.io.read("start.xyz")
            atoms.calc = DPA4Calculator("run/best.safetensors")
            energy = atoms.get_potential_energy()  # eV
            forces = atoms.get_forces()  # (N, 3) eV/Angstrom
    """

    # ASE's initial charges and magnetic moments of single atoms do not influence the results.
    ignored_changes = {"initial_charges", "initial_magmoms"}

    @own_settings
    def __init__(
        self,
        model: Model | Sequence[Model],
        device: str | torch.device = "auto",
        dtype: Literal["float32", "float64"] = "float32",
        branch: str | None = None,
        neighbor_skin: float = SKIN,
        compute_stress: bool = True,
        precision: Precision = "high",
        compile: bool | None = None,
    ):
        """Load the models.

        Args:
            model: Model file (of dpa4 or deepmd-kit) or a ``Potential``, which is copied. For a committee: a list
                of these, or the output folder of ``dpa4 train --committee``.
            device: Device for the computation, such as "cpu" or "cuda". "auto" selects a GPU if one is available.
            dtype: Precision of the network. Energies are summed in float64 in either case.
            branch: Branch of a multitask deepmd-kit checkpoint.
            neighbor_skin: Verlet skin, in Angstrom. The neighbour list extends to cutoff plus skin and is rebuilt
                only after an atom has moved by about half the skin, or the cell has changed by a similar amount.
                With 0 the list is rebuilt in every step. The results do not depend on the skin.
            compute_stress: Provide the stress of structures periodic along all three axes.
            precision: "high" has the accuracy of ``dtype``. "fast" uses bfloat16 matrix products in the interaction
                blocks. It suits screening but not dynamics: see the force errors in docs/running.md.
            compile: Compile the potential at the first calculation, which takes up to a minute once per machine. None
                compiles on a GPU in float32 only. If compilation fails, a warning is issued and eager mode is used.

        Raises:
            FileNotFoundError: If a model file does not exist.
            RuntimeError: If ``device`` is a GPU and none is available.
            ValueError: If an argument is not allowed or a model cannot be read.
        """
        super().__init__()
        self._lock = Lock()
        if not 0 <= neighbor_skin < np.inf:
            raise ValueError(f"neighbor_skin must be a distance >= 0 in Angstrom, got {neighbor_skin}")
        models = members_of(model)
        self.device = choose_device(device)
        self.potentials = [load_model(m, self.device, dtype, precision, branch) for m in models]
        self._evaluators = [Evaluator(potential, compile) for potential in self.potentials]
        self.cutoff = max(p.config.cutoff for p in self.potentials)
        self.neighbor_skin = neighbor_skin
        self.compute_stress = compute_stress
        self.implemented_properties = ["energy", "free_energy", "energies", "forces"]
        self.implemented_properties += ["stress", "stresses"] if compute_stress else []
        if len(self.potentials) > 1:
            deviations = [f"{name}_std" for name in _COMMITTEE if name in self.implemented_properties]
            self.implemented_properties += deviations
        self._neighbors = SkinnedNeighbors(self.cutoff, neighbor_skin, self.device)
        self._monitor = CoverageMonitor([p.coverage for p in self.potentials], self.device)
        self._checked: tuple[NDArray[np.int64], list[tuple[int, int]]] | None = None
        self._charge_spin: list[torch.Tensor] = []  # per model, (1, 2), for the checked structure
        self._conditioned = any(p.config.charge_spin for p in self.potentials)
        self._unused: set[str] = set()  # entries of atoms.info that were warned of
        # ASE's databases and trajectories store the parameters beside the results.
        self.parameters.update(fingerprint_of_calculator(self), branch=branch)

    def _get_name(self) -> str:
        """Name of the calculator in ASE's databases."""
        return "dpa4"

    def _repr_html_(self) -> str:
        """Description for a notebook: models, device and precision."""
        models = [
            {
                "elements": " ".join(potential.elements),
                "cutoff": f"{potential.config.cutoff:g} Å",
                "parameters": f"{sum(p.numel() for p in potential.model.parameters()):,}",
                "fingerprint": fingerprint,
            }
            for potential, fingerprint in zip(self.potentials, self.parameters["model"].split(), strict=True)
        ]
        run = {name: str(self.parameters[name]) for name in ("dtype", "precision", "branch")}
        run |= {"device": str(self.device), "results": ", ".join(self.implemented_properties)}
        names = [f"Model {number}" if len(models) > 1 else "Model" for number in range(1, len(models) + 1)]
        title = "DPA4 calculator" + (f", committee of {len(models)} models" if len(models) > 1 else "")
        return html_table(title, {**dict(zip(names, models, strict=True)), "Calculation": run})

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Names of the properties in which a structure differs from that of the last calculation; [] if none.

        ``"info"`` stands for charge or spin.

        Args:
            atoms: Structure.
            tol: Absolute tolerance of the comparison.
        """
        changes = super().check_state(atoms, tol=tol)
        if self.atoms is not None and not same_charge_spin(self.atoms, atoms):
            changes.append("info")
        return changes

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """Return a result for a structure, computed if necessary; ASE calls this method.

        Other threads wait, so that each gets the result for its own structure.
        """
        with self._lock:
            return super().get_property(name, atoms, allow_calculation)

    def calculate_properties(self, atoms: Atoms, properties: Sequence[str]) -> Properties:
        """Return several results for a structure; other threads wait."""
        with self._lock:
            return super().calculate_properties(atoms, properties)

    @own_settings
    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Compute all results, and ``stresses`` if requested; ASE calls this method.

        All results but ``stresses`` come from one evaluation, which costs little more than the energy alone.

        Args:
            atoms: Structure; None uses the structure of the last call.
            properties: Names of the requested results.
            system_changes: Properties that have changed since the last call; used by ASE only.

        Raises:
            ValueError: If the structure is empty; if an element, the charge or the spin is not supported by a model;
                if a position is not finite or atoms coincide; or if a periodic axis has no cell vector.
        """
        with self._lock:
            super().calculate(atoms, properties, system_changes)
            self._calculate(properties)

    def _calculate(self, properties: Sequence[str]) -> None:
        """Set the results for `atoms` of this calculator."""
        if len(self.atoms) == 0:
            raise ValueError("the structure has no atoms")
        with_stress = self.compute_stress and bool(self.atoms.pbc.all())
        graphs = self._graphs(self.atoms)
        members = [
            _results(evaluate(graph), self.atoms.get_volume() if with_stress else None)
            for evaluate, graph in zip(self._evaluators, graphs, strict=True)
        ]
        self._monitor.report()  # costs no time: the results above have already waited for the device
        if len(members) == 1:
            self.results = members[0]
        else:
            stacked = {name: np.array([m[name] for m in members]) for name in members[0]}
            self.results = {name: values.mean(axis=0) for name, values in stacked.items()}
            spread = {f"{n}_std": stacked[n].std(axis=0) for n in _COMMITTEE if n in stacked}
            self.results |= spread
        if with_stress and "stresses" in properties:
            self.results["stresses"] = self._stresses(graphs, self.atoms.get_volume())
        self.results["energy"] = float(self.results["energy"])
        self.results["free_energy"] = self.results["energy"]

    def _stresses(self, graphs: Sequence[Graph], volume: float) -> NDArray[np.float64]:
        """Atomic stresses (N, 6) in eV/Angstrom^3, averaged over the models."""
        virials = [p.atomic_virials(g).detach() for p, g in zip(self.potentials, graphs, strict=True)]
        return full_3x3_to_voigt_6_stress(-_numpy(torch.stack(virials).mean(dim=0)) / volume)

    def _graphs(self, atoms: Atoms) -> list[Graph]:
        """Build one graph per model on the device, and check the structure.

        Elements, charge and spin are checked only when they have changed since the last call.
        """
        pairs = [charge_spin_of(potential, atoms) for potential in self.potentials]
        if self._conditioned:
            self._warn_of_unused(atoms)
        graph = self._neighbors.graph(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
        known = self._checked
        if known is None or pairs != known[1] or not np.array_equal(atoms.numbers, known[0]):
            self._charge_spin = [torch.tensor([pair], device=self.device) for pair in pairs]
            for potential, own in zip(self.potentials, self._charge_spin, strict=True):
                potential.check(graph._replace(charge_spin=own))
            self._monitor.elements(graph.atomic_numbers)
            self._checked = atoms.numbers.copy(), pairs
        self._monitor.look(graph)
        graphs = [graph._replace(charge_spin=own) for own in self._charge_spin]
        cutoffs = [potential.config.cutoff for potential in self.potentials]
        return [g if c == self.cutoff else within_cutoff(g, c) for g, c in zip(graphs, cutoffs, strict=True)]

    def _warn_of_unused(self, atoms: Atoms) -> None:
        """Warn once of entries that look like a charge or a spin, but are not read by a conditioned model."""
        names = unused_names(atoms.info) - self._unused
        self._unused |= names
        if names:
            warn_of_unused(names, "atoms.info")


def labelled(atoms: Atoms) -> Atoms:
    """Copy a structure with its current energy, forces and, if available, stress, and without other labels.

    The copy of a structure with a committee has the standard deviations as well: ``energy_std``, ``stress_std`` and
    ``max_force_std``, the largest deviation of the force on an atom, in ``info``; ``forces_std`` in ``arrays``.
    """
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(apply_constraint=False)}
    if atoms.pbc.all() and "stress" in atoms.calc.implemented_properties:
        results["stress"] = atoms.get_stress(apply_constraint=False)
    copy = with_results(atoms, **results)
    if deviations := deviations_of(atoms.calc):
        add_deviations(copy, **deviations)
    return copy


def deviations_of(calculator: Calculator) -> Results:
    """Standard deviations in the last results of a committee: ``energy_std``, ``forces_std``, ``stress_std``.

    A correction that is added to a committee, such as D3, does not change them. Other calculators have none: {}.
    """
    for part in calculators_in(calculator):
        if isinstance(part, DPA4Calculator) and len(part.potentials) > 1:
            return {f"{n}_std": part.results[f"{n}_std"] for n in _COMMITTEE if f"{n}_std" in part.results}
    return {}


def has_deviations(calculator: Calculator) -> bool:
    """Return whether a calculator is a committee, or the sum of one and a correction."""
    parts = [part for part in calculators_in(calculator) if isinstance(part, DPA4Calculator)]
    return any(len(part.potentials) > 1 for part in parts)


def fingerprint_of_calculator(calculator: Calculator) -> dict[str, str]:
    """Fingerprint of a calculator, from those of its models: everything its results depend on.

    Resumable runs compare fingerprints before they continue.

    Returns:
        The entries of ``fingerprint_of``; the digests of a committee are joined by spaces. Other calculators have no
        fingerprint: returns {}.
    """
    return fingerprint_of_committee(calculator.potentials) if isinstance(calculator, DPA4Calculator) else {}


def _results(prediction: Any, volume: float | None) -> Results:
    """Convert a prediction for one structure to arrays; includes the stress if ``volume`` (Angstrom^3) is given."""
    results: Results = {
        "energy": prediction.energy.item(),
        "energies": _numpy(prediction.atomic_energies),
        "forces": _numpy(prediction.forces),
        "virial": _numpy(prediction.virial[0]),
    }
    if volume is not None:
        results["stress"] = full_3x3_to_voigt_6_stress(-results["virial"] / volume)
    return results


def _numpy(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.cpu().numpy()
