"""Energies and forces as fast as the device allows."""

import logging
import warnings

from dpa4.graph import Graph
from dpa4.potential.potential import Potential, Prediction

COMPARED = 512
"""Atoms that are compared; eager mode may not have the memory for all."""

_log = logging.getLogger(__name__)


class Evaluator:
    """A potential in evaluation mode, compiled at its first call and replayed as a CUDA graph where it is small.

    The first call compares with eager mode, of large systems the first atoms. Code that deviates is replaced by code
    that keeps nothing for the derivatives: other kernels, which a fault of the compiler may not meet. If that
    deviates, too, or something fails, a warning says why and eager mode stays.

    Args:
        potential: On its device and in its precision.
        compile: Whether to compile.
    """

    def __init__(self, potential: Potential, compile: bool):
        self.potential = potential.eval()
        self._pending = compile
        self._call = potential.__call__

    def __call__(self, graph: Graph) -> Prediction:
        """Prediction for a graph of one structure, on the device."""
        if (
            self._pending and min(graph.num_atoms, graph.num_edges) > 1
        ):  # smaller ones run eagerly in any case
            self._pending = False
            self._compile(graph)
        return self._call(graph)

    def _compile(self, graph: Graph) -> None:
        from dpa4.potential import compiled  # takes a second to import
        from dpa4.potential.replay import Replay

        seconds: list[float] = []
        allowed = compiled.tolerance(self.potential)
        try:
            for max_kept in (compiled.MAX_KEPT, 0):
                compiled.compile_potential(self.potential, lambda name, s: seconds.append(s), max_kept)
                self.potential(graph)  # so that code is made for these sizes
                found = compiled.compare_with_eager(self.potential, first_atoms(graph, COMPARED))
                if all(deviation <= allowed for deviation in found.values()):
                    break
                _log.info("compiled with up to %d atoms kept: %s, allowed %s", max_kept, found, allowed)
            else:
                raise ArithmeticError(f"relative deviations from eager mode are {found}, allowed {allowed}")
        except Exception as error:
            compiled.restore_eager(self.potential)
            cause = f"{type(error).__name__}: {str(error)[:500]}"
            warnings.warn(
                f"compilation failed, so calculations go on in eager mode, right but slower ({cause}); "
                "compile=False leaves it out",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        _log.info("compiled in %.0f s; relative deviations from eager mode: %s", sum(seconds), found)
        if graph.positions.is_cuda:
            self._call = Replay(self.potential)


def first_atoms(graph: Graph, count: int) -> Graph:
    """The first atoms of a graph of one structure, with the edges between them."""
    keep = (graph.source < count) & (graph.destination < count)
    return graph._replace(
        atomic_numbers=graph.atomic_numbers[:count],
        positions=graph.positions[:count],
        structure=graph.structure[:count],
        source=graph.source[keep],
        destination=graph.destination[keep],
        shift=graph.shift[keep],
    )
