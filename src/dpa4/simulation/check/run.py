"""Check of a model: all checks, one after another."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch

from dpa4.graph import Graph
from dpa4.interfaces.loading import Model, load_model
from dpa4.potential import Potential, Prediction, model_card
from dpa4.progress import ProgressBar
from dpa4.simulation.check import contacts, cutoff, numerics, physics
from dpa4.simulation.check.drawing import Drawing
from dpa4.simulation.check.result import CheckResult, ModelCheck
from dpa4.simulation.check.structures import built_in_structures, graph_of
from dpa4.simulation.close_contacts import CURVATURE
from dpa4.simulation.pair_curves import element_pairs
from dpa4.system import choose_device, own_settings, stop_requests

FLOAT32 = (numerics.FLOAT32_ENERGY, numerics.FLOAT32_FORCE)
STAGES = {
    "numbers": 3,
    "precision": 4,
    "symmetry": 8,
    "forces": 8,
    "virial": 8,
    "crossing the cutoff": 2,
    "response near the cutoff": 6,
}
"""Time of every stage before the curves, relative to a curve.

Between those of the presets nano and mini on one CPU core (2026-12-01).
"""
FAST = (numerics.FAST_ENERGY, numerics.limits.FAST_TOLERANCE)


@own_settings
def check_model(
    model: Model,
    *,
    elements: Sequence[str] | None = None,
    gpu: bool = False,
    compile: bool = True,
    branch: str | None = None,
    progress: bool = True,
) -> ModelCheck:
    """Check numbers, symmetry, derivatives, cutoff and short range of a model.

    `docs/checking.md` lists the checks and their tolerances. `write_check` writes the results as a page. Ctrl-C ends
    the check after the current step, or at once if it is pressed again; the results so far are returned.

    Args:
        model: Model file, or a potential, which is copied.
        elements: Elements of the structures, pairs and triples; None selects all elements of the model.
        gpu: Also compute on a GPU, and scan pairs and triples there.
        compile: Compile the model and compare; this takes a minute on a CPU.
        branch: Branch of a multitask checkpoint of deepmd-kit.
        progress: Show the progress.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read, an element is outside the model, or there is no GPU.

    Example:
        Failures of a model:

            check = check_model("model.safetensors", elements=["Si", "O"])
            print([result.name for result in check.results if result.verdict == "fail"])
    """
    start = time.monotonic()
    device = choose_device("cuda") if gpu else torch.device("cpu")
    exact = load_model(model, torch.device("cpu"), "float64", "high", branch)
    chosen = _chosen(exact, elements)
    structures = built_in_structures(chosen, exact.config.charge_spin)
    several = {name: atoms for name, atoms in structures.items() if len(atoms) > 1}
    pairs_of_model = element_pairs(exact)
    count = sum(set(pair) <= set(chosen) for pair in pairs_of_model)
    results: list[CheckResult] = []
    pairs: list[contacts.Shape] = []
    triples: list[contacts.Shape] = []
    shells: list[float] = []
    with _Steps(sum(STAGES.values()) + count + contacts.TRIPLES, progress) as steps:
        steps.begin("numbers")
        results.append(_opened(model, exact, branch))
        graphs = {name: graph_of(exact, atoms) for name, atoms in structures.items()}
        finite, reference = numerics.check_finite(exact, graphs)
        results += [finite, numerics.check_batch(exact, graphs, reference)]
        if gpu:
            results.append(_gpu(model, device, graphs, reference, branch))
        steps.begin("precision")
        single = load_model(model, device, "float32", "high", branch)
        results += _precisions(single, graphs, reference)
        steps.begin("symmetry")
        results += physics.check_symmetry(exact, several)
        steps.begin("forces")
        results.append(physics.check_forces(exact, several))
        steps.begin("virial")
        results.append(physics.check_virial(exact, several))
        steps.begin("crossing the cutoff")
        results.append(cutoff.check_crossing(exact, structures, chosen))
        steps.begin("response near the cutoff")
        amplification, shells = cutoff.check_amplification(exact, structures, chosen)
        results.append(amplification)
        steps.begin("pairs")
        for shape in contacts.scan_all_pairs(single, chosen):
            pairs.append(shape)
            steps.advance()
        steps.begin("triples")
        for shape in contacts.scan_triples(single, chosen, contacts.TRIPLES):
            triples.append(shape)
            steps.advance()
        if compile:
            steps.begin("compilation, about a minute more")
            eager = numerics.predict(single, graphs, device)
            compiled = numerics.check_compiled(single, graphs, eager)
    if pairs:
        results += contacts.check_pairs(pairs, len(pairs_of_model))
    if triples:
        results += contacts.check_triples(triples, pairs)
    if compile and steps.finished:
        results.append(compiled)
    drawing = Drawing(
        contacts.drawn_lines(pairs, contacts.PAIR_DEPTH),
        contacts.drawn_lines(triples, contacts.TRIPLE_DEPTH),
        cutoff.INSIDE.tolist() if shells else (),
        shells,
        CURVATURE,
    )
    name = "potential" if isinstance(model, Potential) else Path(model).name
    return ModelCheck(name, tuple(results), time.monotonic() - start, drawing, steps.finished)


class _Interrupted(Exception):
    """A signal asks to end the check."""


class _Steps:
    """Progress through the steps of a check, whose number is a measure of time: a curve is one step.

    A context manager. SIGINT or SIGTERM ends its block at the next step, a second SIGINT at once; ``finished`` is
    false then.
    """

    def __init__(self, total: int, show: bool):
        self.finished = False
        self._bar = ProgressBar("step", total, show=show)
        self._stack = ExitStack()
        self._stage = ""

    def __enter__(self) -> Self:
        self._stopped = self._stack.enter_context(stop_requests())
        self._stack.enter_context(self._bar)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self.finished = kind is None
        self._stack.close()
        return kind is not None and issubclass(kind, _Interrupted | KeyboardInterrupt)

    def begin(self, stage: str) -> None:
        """End a stage and begin another one."""
        done, self._stage = STAGES.get(self._stage, 0), stage
        self._update(done)

    def advance(self) -> None:
        """Count a curve."""
        self._update(1)

    def _update(self, done: int) -> None:
        self._bar.update(self._bar.task_ids[0], advance=done, status=self._stage)
        if self._stopped:
            raise _Interrupted


def _chosen(potential: Potential, elements: Sequence[str] | None) -> list[str]:
    """Elements to check, in the order of the model.

    Raises:
        ValueError: If an element is outside the model.
    """
    if unknown := [e for e in elements or () if e not in potential.elements]:
        raise ValueError(
            f"elements: {unknown[0]} is not in the model, which knows {', '.join(potential.elements)}"
        )
    return [e for e in potential.elements if elements is None or e in elements]


def _opened(model: Model, potential: Potential, branch: str | None) -> CheckResult:
    """Result of opening the file: the model card without warnings has no more to say."""
    if isinstance(model, Potential):
        detail = f"{sum(p.numel() for p in potential.parameters()):,} parameters"
    else:
        card = model_card(model, branch)
        origin, known = card.sections["Provenance"], card.sections["Model"]
        entries = {**known, **origin}
        detail = ", ".join(
            f"{key} {entries[key]}"
            for key in ("format", "fingerprint", "trainable parameters")
            if key in entries
        )
    return CheckResult(
        "file",
        f"elements: {len(potential.elements)}, cutoff {potential.config.cutoff:g} Å",
        (),
        "opens",
        detail,
    )


def _gpu(
    model: Model,
    device: torch.device,
    graphs: dict[str, Graph],
    reference: dict[str, Prediction],
    branch: str | None,
) -> CheckResult:
    potential = load_model(model, device, "float64", "high", branch)
    tolerance = numerics.GPU_TOLERANCE
    reason = "float64 rounds at 1e-16, sums in another order amplify it"
    return numerics.check_against(
        "GPU and CPU, float64", potential, potential, graphs, reference, (tolerance, tolerance), reason
    )


def _precisions(
    single: Potential, graphs: dict[str, Graph], reference: dict[str, Prediction]
) -> list[CheckResult]:
    """Compare float32 at both precisions with float64."""
    reason = "well below the errors of any model, 1 meV/atom and 10 meV/Å"
    high = numerics.check_against('float32, "high"', single, single, graphs, reference, FLOAT32, reason)
    reason = "bfloat16 rounds at 0.4 %; for screening, not for energy conservation"
    with single.at_precision("fast"):
        fast = numerics.check_against(
            'float32, "fast"', single, single, graphs, reference, FAST, reason, severe=False
        )
    return [high, fast]
