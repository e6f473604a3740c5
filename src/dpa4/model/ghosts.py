"""Own atoms and ghosts of a process when atoms are distributed over processes."""

from torch import Tensor


class Domain:
    """Domain of a single process, which owns all atoms.

    A code that distributes its atoms over processes derives from this class. The nodes of a process are then its own
    atoms, which are the centres of its edges, followed by ghosts, which are copies of atoms of any process. Features
    that messages read from their source are computed by the process that owns the atom and copied to its ghosts.
    Derivatives with respect to ghosts are added to those of the atom. Every own atom must have all its edges.
    """

    def own(self, x: Tensor) -> Tensor:
        """Select the values of the own atoms (n, ...) from those of all nodes (N, ...)."""
        return x

    def with_ghosts(self, x: Tensor) -> Tensor:
        """Extend the values of the own atoms (n, ...) to all nodes (N, ...)."""
        return x


WHOLE = Domain()
"""Domain without ghosts."""
