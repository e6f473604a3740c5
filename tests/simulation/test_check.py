"""Check of a model: every check passes on a good model and fails on one with the fault that it looks for."""

import signal
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.model.config import Bridging
from dpa4.model.short_range import pair_bridging
from dpa4.ops.segments import segment_sum
from dpa4.potential import Potential, Prediction, save_potential
from dpa4.simulation import CheckResult, ModelCheck, check_model, write_check
from dpa4.simulation.check import Figure, contacts, cutoff, numerics, physics
from dpa4.simulation.check.drawing import Drawing, Line, draw
from dpa4.simulation.check.explanations import EXPLANATIONS
from dpa4.simulation.check.structures import built_in_structures, graph_of
from helpers import random_potential

ELEMENTS = ("H", "C", "O")
CUTOFF = 4.0
SCALAR = {"lmax": 0, "kmax": 0, "mmax": 0}


def good(**options) -> Potential:
    """Tiny potential with the walls of the default short range."""
    windows = {"bridging": pair_bridging({}, ELEMENTS, CUTOFF)} if "bridging" not in options else {}
    return random_potential(**({"n_blocks": 1, "lmax": 1} | windows | options))


class Faulty(nn.Module):
    """Short range with a further energy of every edge, or of every centre with several edges."""

    def __init__(self, potential: Potential, edge: Callable[[Tensor], Tensor], together: bool = False):
        super().__init__()
        self.right, self.edge, self.together = potential.short_range, edge, together

    def forward(self, vectors, source, destination, numbers):
        """Return the vectors unchanged, and the energies of the centres with the fault."""
        seen, energy = self.right(vectors, source, destination, numbers)
        each = self.edge(vectors)
        total = segment_sum(each, destination)
        if self.together:  # products of two different edges of a centre: zero for a pair alone
            total = total**2 - segment_sum(each**2, destination)
        return seen, energy + total


def with_energy(edge: Callable[[Tensor], Tensor], together: bool = False, **options) -> Potential:
    potential = good(**options)
    potential.short_range = Faulty(potential, edge, together)
    return potential


def with_result(change: Callable[[Prediction, object], Prediction]) -> Potential:
    """Good potential whose predictions are changed."""
    potential = good()
    right = potential.forward
    potential.forward = lambda graph: change(right(graph), graph)  # type: ignore[method-assign]
    return potential


def length(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=-1)


def bump(height: float, place: float, width: float) -> Callable[[Tensor], Tensor]:
    return lambda vectors: height * torch.exp(-(((length(vectors) - place) / width) ** 2) / 2)


@pytest.fixture(scope="module")
def structures():
    return built_in_structures(ELEMENTS)


def graphs_of(potential, structures):
    return {name: graph_of(potential, atoms) for name, atoms in structures.items()}


def verdicts(results: list[CheckResult]) -> dict[str, str]:
    return {result.name: result.verdict for result in results}


def judged_pairs(potential: Potential, elements, total: int) -> list[CheckResult]:
    return contacts.check_pairs([*contacts.scan_all_pairs(potential, elements)], total)


# --- structures and records


def test_built_in_structures_of_any_elements():
    names = " ".join(built_in_structures(ELEMENTS, conditioned=True))
    for word in ("molecule CH3CH2OH", "cluster", "crystal", "slab", "charged", "atom H"):
        assert word in names
    for elements in (["He"], ["W", "Xe"], [*map(str, Atoms(numbers=range(1, 119)).symbols)]):
        found = built_in_structures(elements)
        assert {symbol for atoms in found.values() for symbol in atoms.symbols} <= {*elements}
        assert all(0 < len(atoms) <= 16 for atoms in found.values())
        for atoms in found.values():  # the multiplicity fits the number of electrons
            assert (atoms.numbers.sum() - atoms.info["charge"] + atoms.info["spin"]) % 2
    assert len({s for a in found.values() for s in a.symbols}) > 20


def test_verdicts_of_figures():
    def verdict(*figures: Figure, warning: str = "") -> str:
        return CheckResult("a", "b", figures, "c", warning=warning).verdict

    assert verdict(Figure("energy", 1.0, "eV", 1.0), Figure("energy", 9.0, "eV")) == "pass"
    assert (
        verdict(Figure("energy", 1.1, "eV", 1.0, severe=False)) == "warn" == verdict(warning="not compiled")
    )
    assert (
        verdict(Figure("energy", float("nan"), "eV", 1.0), Figure("energy", 2, "eV", 1, severe=False))
        == "fail"
    )


def result_of(name: str, *figures: Figure) -> CheckResult:
    return CheckResult(name, "4 curves", figures, "reason")


def test_a_summary_that_counts_warnings_and_failures():
    fine = result_of("forces", Figure("differ by", 0.0, "eV/Å", 1e-6))
    warned = result_of("pairs: wells", Figure("pairs with several wells", 2, "", 0, severe=False))
    failed = result_of("pairs: wall", Figure("pairs without a wall", 1, "", 0))
    summaries = {
        "PASS: 1 of 1 checks passed": (fine,),
        "PASS WITH WARNINGS: 1 of 2 checks passed, 1 gave a warning (pairs: wells)": (warned, fine),
        "FAIL: 1 of 3 checks passed, 1 failed (pairs: wall), 1 gave a warning (pairs: wells)": (
            warned,
            failed,
            fine,
        ),
    }
    for summary, results in summaries.items():
        assert ModelCheck("m", results, 1.0).summary == summary
    interrupted = ModelCheck("m", (fine,), 1.0, finished=False)
    assert interrupted.summary == "INTERRUPTED, so far PASS: 1 of 1 checks passed"


def test_sentences_about_warnings_and_failures(capsys):
    results = [
        result_of(f"{what}: {name}", Figure(name, 2, "", 0, severe=False))
        for what in ("pairs", "triples")
        for name in ("wells", "spikes")
    ]
    failed = result_of("forces", Figure("differ by", 1.0, "eV/Å", 1e-6))
    check = ModelCheck("m", (*results, failed), 1.0)
    # Four warnings of one meaning are explained once, after the failure.
    assert [(verdict, len(group)) for verdict, group in check.findings] == [("fail", 1), ("warn", 4)]
    Console(width=100).print(check)
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "Found: differ by 1 eV/Å (allowed: ≤ 1e-06 eV/Å)." in text and "Found: wells: 2 (allowed: 0)" in text
    )
    assert "Forces are not the slope of the energy" in text and text.count("In dense matter") == 1
    assert "says nothing about accuracy" in text and "docs/checking.md" in text


# --- numbers


def test_numbers_of_a_good_model(structures):
    potential = good()
    graphs = graphs_of(potential, structures)
    finite, reference = numerics.check_finite(potential, graphs)
    single = good().float()
    results = [
        finite,
        numerics.check_batch(potential, graphs, reference),
        numerics.check_against("float32", single, single, graphs, reference, (1e-5, 1e-4), "rounding"),
    ]
    assert {*verdicts(results).values()} == {"pass"}
    shifted = with_result(lambda p, graph: p._replace(forces=p.forces + 1e-3))
    wrong = numerics.check_against("float32", shifted, shifted, graphs, reference, (1e-5, 1e-4), "rounding")
    assert wrong.verdict == "fail"


def test_a_structure_that_is_not_finite(structures):
    potential = with_result(lambda p, graph: p._replace(energy=p.energy / (graph.num_atoms != 8)))
    result, _ = numerics.check_finite(potential, graphs_of(potential, structures))
    assert result.verdict == "fail" and "crystal C8" in result.detail


def test_a_batch_that_differs(structures):
    def change(p, graph):
        return p._replace(atomic_energies=p.atomic_energies + 1e-6 * (graph.num_structures > 1))

    potential = with_result(change)
    graphs = graphs_of(potential, structures)
    _, reference = numerics.check_finite(potential, graphs)
    assert numerics.check_batch(potential, graphs, reference).verdict == "fail"


def test_compiled_code_that_differs_or_fails(structures, monkeypatch):
    potential = good().float()
    graphs = graphs_of(potential, structures)
    reference = numerics.predict(potential, graphs)

    def evaluator(shift: float):
        def build(potential, compile):
            def call(graph):
                found = potential(graph)
                return found._replace(forces=found.forces + shift)

            return call

        return build

    monkeypatch.setattr(Potential, "is_compiled", True)
    for shift, verdict in ((0.0, "pass"), (1e-2, "fail")):
        monkeypatch.setattr(numerics, "Evaluator", evaluator(shift))
        assert numerics.check_compiled(potential, graphs, reference).verdict == verdict
    monkeypatch.setattr(Potential, "is_compiled", False)

    def failing(potential, compile):
        def call(graph):
            warnings.warn("compilation failed: no compiler", RuntimeWarning, stacklevel=1)
            return potential(graph)

        return call

    monkeypatch.setattr(numerics, "Evaluator", failing)
    result = numerics.check_compiled(potential, graphs, reference)
    assert result.verdict == "warn" and "no compiler" in result.warning


# --- symmetry and derivatives


def test_symmetry_and_derivatives_of_a_good_model(structures):
    potential = good()
    several = {name: atoms for name, atoms in structures.items() if len(atoms) > 1}
    results = [
        *physics.check_symmetry(potential, several),
        physics.check_forces(potential, several),
        physics.check_virial(potential, several),
    ]
    found = verdicts(results)
    assert found.pop("mirror images") in ("pass", "warn")  # reported, not promised
    assert {*found.values()} == {"pass"}
    for options in (SCALAR, {"symmetry": "O3"}):
        mirror = physics.check_mirror(good(**options), several)
        assert mirror.verdict == "pass"
        assert [figure.limit for figure in mirror.figures] == [physics.SYMMETRY_TOLERANCE] * 2


def test_broken_symmetries(structures):
    few = {name: atoms for name, atoms in structures.items() if name.startswith(("molecule", "crystal"))}

    def rotation(vectors):
        return 1e-3 * torch.exp(-vectors[:, 0].square())

    def translation(p, graph):
        return p._replace(forces=p.forces + 1e-3 * torch.sin(graph.positions))

    def permutation(p, graph):
        return p._replace(forces=p.forces * (1 + 1e-3 * torch.arange(graph.num_atoms))[:, None])

    for name, potential in {
        "rotation": with_energy(rotation),
        "translation": with_result(translation),
        "permutation": with_result(permutation),
    }.items():
        assert verdicts(physics.check_symmetry(potential, few))[name] == "fail", name


@pytest.mark.parametrize("options", [SCALAR, {"symmetry": "O3"}], ids=["scalars", "O3"])
def test_a_model_that_promises_mirror_symmetry_and_lacks_it(structures, options):
    # Odd functions of single edges cancel between the two directions; products of the edges of a centre do not.
    potential = with_energy(
        lambda v: torch.exp(-length(v)) * (1 + 0.1 * torch.tanh(v[:, 0])), together=True, **options
    )
    few = {name: atoms for name, atoms in structures.items() if name.startswith("cluster")}
    assert physics.check_mirror(potential, few).verdict == "fail"


def test_forces_and_virials_that_are_no_derivatives(structures):
    few = {name: atoms for name, atoms in structures.items() if name.startswith(("molecule", "slab"))}
    forces = with_result(lambda p, graph: p._replace(forces=1.0001 * p.forces))
    virial = with_result(lambda p, graph: p._replace(virial=0.5 * p.virial))
    assert physics.check_forces(forces, few).verdict == "fail"
    assert physics.check_virial(forces, few).verdict == "pass"
    assert physics.check_virial(virial, few).verdict == "fail"


# --- cutoff


def test_cutoff_of_a_good_model(structures):
    assert cutoff.check_crossing(good(), structures, ELEMENTS).verdict == "pass"
    result, shells = cutoff.check_amplification(good(), structures, ELEMENTS)
    assert result.verdict == "pass" and len(shells) == len(cutoff.INSIDE)


def test_a_jump_or_a_kink_at_the_cutoff(structures):
    for fault in (lambda v: 1e-3 + 0 * length(v), lambda v: 1e-3 * (CUTOFF - length(v))):
        result = cutoff.check_crossing(with_energy(fault), structures, ELEMENTS)
        assert result.verdict == "fail" and "molecule" in result.detail


def test_the_abrupt_end_of_an_imported_repulsion_is_a_warning(structures):
    abrupt = good(bridging=Bridging(r_inner=0.5, r_outer=0.8, smooth_cutoff=False))
    result = cutoff.check_crossing(abrupt, structures, ELEMENTS)
    assert result.verdict == "warn" and "ends abruptly" in result.warning
    abrupt.short_range = Faulty(abrupt, lambda v: 1e-3 + 0 * length(v))
    assert cutoff.check_crossing(abrupt, structures, ELEMENTS).verdict == "fail"


def test_a_curvature_just_inside_the_cutoff_amplifies(structures):
    sharp = with_energy(lambda v: 1e-8 * torch.exp(-(((CUTOFF - length(v)) / 1e-6) ** 2)))
    result, shells = cutoff.check_amplification(sharp, structures, ELEMENTS)
    assert result.verdict == "fail" and np.argmax(shells) < 3 and max(shells[5:]) < 1000


# --- short range


@pytest.fixture(scope="module")
def pairs():
    return [*contacts.scan_all_pairs(good(), ELEMENTS)]


def test_pairs_and_triples_of_a_good_model(pairs):
    triples = [*contacts.scan_triples(good(), ELEMENTS, 12)]
    results = [*contacts.check_pairs(pairs, 6), *contacts.check_triples(triples, pairs)]
    assert "fail" not in verdicts(results).values(), [r.measured for r in results]
    assert len(results) == 8 and "6 of 6 pairs" in results[0].tested
    assert judged_pairs(good(), ["H", "O"], 6)[0].tested.startswith("3 of 6")


@pytest.mark.parametrize(
    ("name", "fault"),
    {
        "wall": lambda v: -400 * torch.exp(-length(v) / 0.3),
        "wells": bump(-20.0, 2.0, 0.3),
        "spikes": lambda v: torch.where(length(v) < 2.017, 0.5, 0.0),
        "curvature": bump(1.0, 2.0, 0.02),
    }.items(),
)
def test_faults_of_pairs(name, fault):
    found = verdicts(judged_pairs(with_energy(fault), ["C"], 1))
    assert found[f"pairs: {name}"] == "fail", found


def test_a_pair_that_is_fine_until_a_third_atom_is_near(pairs):
    potential = with_energy(bump(5.0, 2.0, 0.02), together=True)
    alone = [*contacts.scan_all_pairs(potential, ELEMENTS)]
    assert "fail" not in verdicts(contacts.check_pairs(alone, 6)).values()
    # Triangles with two nearly equal sides meet the bumps of both at once.
    potential = with_energy(bump(8.0, 2.0, 0.15), together=True)
    results = contacts.check_triples([*contacts.scan_triples(potential, ELEMENTS, 24)], alone)
    found = verdicts(results)
    assert found["triples: curvature"] == "fail", [r.measured for r in results]
    assert "consist of pairs that are fine alone" in results[0].detail and not results[0].detail.startswith(
        "0 "
    )


def test_curves_that_are_not_finite():
    broken = with_energy(lambda v: torch.where(length(v) < 0.5, torch.nan, 0.0))
    results = judged_pairs(broken, ["C"], 1)
    assert verdicts(results)["pairs: wall"] == "fail" and "pairs not finite: 1" in results[0].measured


def test_many_curves_of_the_same_atoms_are_named_once():
    triples = [*contacts.scan_triples(with_energy(bump(-20.0, 2.0, 0.3)), ["C"], 8)]
    (wells,) = [r for r in contacts.check_triples(triples, []) if r.name == "triples: wells"]
    assert wells.verdict == "fail" and wells.detail.startswith("C-C-C up to "), wells.detail
    assert "eV (" in wells.detail and wells.detail.endswith(" times)") and wells.detail.count("C-C-C") == 1


def test_the_axis_of_energies_fits_the_wells():
    def limits(depth: float) -> tuple[float, float]:
        line = Line("Cu-Cu", np.array([0.2, 2.0, 5.0]), np.array([1e4, -depth, 0.0]), False)
        return draw(Drawing(pairs=[line])).axes[0].get_ylim()

    for depth, lowest in ((0.01, 1.0), (11.0, 11.0), (500.0, 30.0)):
        low, high = limits(depth)
        assert -1.2 * lowest < low < -lowest and 5 <= high <= 60


# --- all checks, the page and the command


def test_an_interrupted_check_has_the_results_so_far(quick, tmp_path, monkeypatch):
    scan = contacts.scan_all_pairs

    def interrupted(potential, elements):
        for number, shape in enumerate(scan(potential, elements)):
            if number == 2:
                signal.raise_signal(signal.SIGINT)
            yield shape

    monkeypatch.setattr(contacts, "scan_all_pairs", interrupted)
    save_potential(good(), tmp_path / "model.safetensors")
    status, output = run(tmp_path / "model.safetensors", "-o", tmp_path / "check.html")
    assert status == 130 and "interrupted: the page holds the checks done so far" in output, output
    text = (tmp_path / "check.html").read_text(encoding="utf-8")
    assert "INTERRUPTED, so far " in text and "3 of 6 pairs" in text and "triples: wall" not in text


@pytest.fixture
def quick(monkeypatch):
    """Fewer triples, directions and distances."""
    monkeypatch.setattr(contacts, "TRIPLES", 6)
    monkeypatch.setattr(physics, "DIRECTIONS", 1)
    monkeypatch.setattr(cutoff, "INSIDE", cutoff.INSIDE[::6])
    monkeypatch.setattr(cutoff, "MAX_PROBES", 2)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["check", *map(str, arguments), "--no-compile"])
    return result.exit_code, result.output


def test_a_page_that_says_pass(quick, tmp_path):
    save_potential(good(), tmp_path / "model.safetensors")
    status, output = run(tmp_path / "model.safetensors", "--output", tmp_path / "check.html")
    assert (status, "PASS" in output) == (0, True), output
    text = (tmp_path / "check.html").read_text(encoding="utf-8")
    assert "of 21 checks passed" in text and text.count("<img") == 1 and "reason for the tolerance" in text
    for name in ("float32, &quot;fast&quot;", "amplification", "triples: curvature", "mirror images"):
        assert name in text


def test_a_page_that_says_what_is_wrong(quick, tmp_path):
    save_potential(random_potential(n_blocks=1, lmax=1), tmp_path / "model.safetensors")
    status, output = run(tmp_path / "model.safetensors", "-o", tmp_path / "check.html", "--elements", "C,O")
    assert status == 1 and "FAIL: " in output and "pairs: wall" in output
    text = (tmp_path / "check.html").read_text(encoding="utf-8")
    assert 'class="missing">fail' in text and "3 of 6 pairs" in text


def test_errors_before_the_work(tmp_path):
    save_potential(good(), tmp_path / "model.safetensors")
    for arguments, message in (
        ((tmp_path / "model.safetensors", "--elements", "Si"), "elements: Si is not in the model"),
        ((tmp_path / "model.safetensors", "-o", tmp_path / "absent" / "check.html"), "there is no folder"),
        ((tmp_path / "absent.pt",), "absent.pt"),
    ):
        page = () if "-o" in arguments else ("-o", tmp_path / "c.html")
        status, output = run(*arguments, *page)
        assert status == 1 and message in output.replace("\n", " "), output
    assert not (tmp_path / "c.html").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_a_check_on_a_gpu_without_one(tmp_path):
    save_potential(good(), tmp_path / "model.safetensors")
    status, output = run(tmp_path / "model.safetensors", "-o", tmp_path / "c.html", "--gpu")
    assert status == 1 and output.startswith("error:") and "cuda" in output.lower(), output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_check_on_a_gpu(quick):
    found = check_model(good(), gpu=True, compile=False, progress=False)
    assert found.passed and "GPU and CPU, float64" in verdicts([*found.results]), found.summary


def test_from_python_with_charge_and_spin(quick, tmp_path):
    potential = good(charge_spin=True)
    found = check_model(potential, elements=["H", "O"], compile=False, progress=False)
    assert isinstance(found, ModelCheck) and found.passed, found.summary
    assert "charged molecule H2O" in found.results[1].tested
    names = {result.name for result in found.results} | {"compiled", "GPU and CPU, float64"}
    assert names == {*EXPLANATIONS}  # every check is explained
    assert write_check(found, tmp_path / "check.html").is_file()
