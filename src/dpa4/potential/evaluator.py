"""Energies and forces as fast as the device allows."""

import logging
import time
import warnings
from collections.abc import Callable

import torch

from dpa4.graph import Graph, first_atoms
from dpa4.potential.potential import Potential, Prediction
from dpa4.system import keep_freed_memory

_log = logging.getLogger(__name__)


class Evaluator:
    """A potential in evaluation mode, compiled when first needed and replayed as a CUDA graph where it is small.

    There are three kinds of code: for small systems one that keeps results of the forward pass for the derivatives,
    for larger ones one that keeps only those of the last block, for large ones one that keeps nothing. The first call
    of each compares it with eager mode, on large systems for the first atoms. All take the code that keeps nothing if
    theirs deviates: those are other kernels, which a fault of the compiler may not meet. If that deviates, too, or
    something fails, a warning says why and eager mode stays. Graphs of several structures are compiled, too, but not
    replayed: their sizes keep changing, and together they keep the device busy.

    Args:
        potential: On its device and in its precision.
        compile: Whether to compile; None does so on a GPU in float32.
    """

    def __init__(self, potential: Potential, compile: bool | None):
        self.potential = potential.eval()
        keep_freed_memory(potential.reference_energies.device)
        if compile is None:
            compile = potential.reference_energies.is_cuda and potential.dtype == torch.float32
        self._compile = compile
        self._keep_results = True  # unless that deviated
        self._compared: set[int] = set()  # kinds of code
        self._call: Callable[[Graph], Prediction] = potential.__call__

    def __call__(self, graph: Graph) -> Prediction:
        """Prediction for a graph on the device."""
        # smaller ones run eagerly in any case
        if self._compile and min(graph.num_atoms, graph.num_edges) > 1:
            self._prepare(graph)
        return self._call(graph) if graph.num_structures == 1 else self.potential(graph)

    def _prepare(self, graph: Graph) -> None:
        """Compile the code that a graph takes and compare it with eager mode, unless that is done."""
        from dpa4.potential import compiled  # takes a second to import
        from dpa4.potential.precompile import Mode, precompile
        from dpa4.potential.replay import Replay, replayed_size

        atoms = graph.num_atoms
        if graph.positions.is_cuda and graph.num_structures == 1:
            atoms = replayed_size(atoms) or atoms
        nothing = len(compiled.KINDS) - 1  # the kind that keeps none
        kind = compiled.kind_of(atoms) if self._keep_results else nothing
        if kind in self._compared:
            return
        start = time.monotonic()
        allowed = compiled.tolerance(self.potential)
        try:
            if not self._compared:
                compiled.compile_potential(self.potential)
            while True:
                compiled.keep_results(self.potential, compiled.KINDS[kind])
                precompile(self.potential, [Mode(False, self.potential.model.block_autocast)], graph)
                self.potential(graph)  # so that code is made for these sizes
                found = compiled.compare_with_eager(self.potential, first_atoms(graph, compiled.COMPARED))
                if all(deviation <= allowed for deviation in found.values()):
                    break
                if kind == nothing:
                    raise ArithmeticError(
                        f"relative deviations from eager mode are {found}, allowed {allowed}"
                    )
                _log.info("code that keeps results deviates by %s, allowed %s", found, allowed)
                kind, self._keep_results = nothing, False
        except torch.OutOfMemoryError:  # no fault of the compiler: a smaller graph may come
            raise
        except Exception as error:
            self._compile = False
            self._call = self.potential.__call__
            compiled.restore_eager(self.potential)
            cause = f"{type(error).__name__}: {str(error)[:500]}"
            warnings.warn(
                f"compilation failed, so calculations go on in eager mode, right but slower ({cause}); "
                "compile=False leaves it out",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        compiled.keep_results(self.potential, compiled.KINDS[0 if self._keep_results else -1])
        self._compared.add(kind)
        _log.info(
            "compiled and compared in %.0f s; relative deviations from eager mode: %s",
            time.monotonic() - start,
            found,
        )
        if graph.positions.is_cuda and not isinstance(self._call, Replay):
            self._call = Replay(self.potential)
