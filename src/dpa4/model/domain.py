"""Which of the nodes of a network a process computes itself."""

from torch import Tensor


class Domain:
    """All atoms are here.

    A code that distributes its atoms over processes derives from it: the nodes of a process are then its own atoms,
    which are the centres of its edges, followed by ghosts, which are copies of atoms of any process. What messages
    need of their sources is computed where the atom is and copied to its ghosts, and derivatives with respect to
    ghosts are added to those of the atom. Own atoms and edges are complete: every own atom has all its edges.
    """

    def own(self, x: Tensor) -> Tensor:
        """Values of the own atoms (n, ...) among those of all nodes (N, ...)."""
        return x

    def with_ghosts(self, x: Tensor) -> Tensor:
        """Values of all nodes (N, ...) from those of the own atoms (n, ...)."""
        return x


WHOLE = Domain()
