"""Cell list in torch operations: candidate pairs on any device, with memory linear in the number of atoms.

Periodic images that can have a neighbour in the cell are added as points of their own, so that the search itself
needs no periodicity. Atoms and images, here called places, are binned along the Cartesian axes and sorted by bin
number. The bins of one column along z around an atom are therefore one range of the sorted list, found by
bisection, and no array has one entry per bin.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpa4.graph.lattice import completed

REACH = (2, 2, 4)  # bins per search radius along x, y and z; finer bins along z cost nothing
FARTHEST_BIN = 2**40  # all places beyond this bin are put into it
MOST_BINS = 2**62  # so that a bin number fits into int64
ATOMS_AT_ONCE = 2**14  # limits the memory of the candidate pairs


def candidate_pairs(
    positions: Tensor,
    lattice: NDArray[np.float64],
    periodic: NDArray[np.bool_],
    structure: Tensor,
    radius: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find pairs within the radius, up to rounding, sorted by destination, source and shift.

    Args:
        positions: Finite positions (N, 3) float64 of at least one atom, in Angstrom.
        lattice: Cell vectors of each structure as rows (B, 3, 3), in Angstrom; zero for non-periodic axes.
        periodic: Periodicity of the axes of each structure (B, 3).
        structure: Index of the structure of each atom (N,) int64.
        radius: Search radius, in Angstrom.

    Returns:
        Destination (E,) int64, source (E,) int64, and shift in whole cell vectors (E, 3) float64.

    Raises:
        ValueError: If a periodic cell vector is zero or nearly in the plane of the others.
    """
    source, image, places, turns = _images(positions, lattice, periodic, structure, radius)
    home = (image == 0).all(1).nonzero().squeeze(1)  # one per atom, in the order of the atoms
    number, strides = _bin_numbers(places, structure[source], radius)
    found = _near_pairs(places, home, number, strides, radius)
    destination = found.div(len(source), rounding_mode="floor")
    found -= destination * len(source)
    neighbor = source[found]
    if len(lattice) > 1:  # enlarged bins may hold atoms of several structures
        same = (structure[neighbor] == structure[destination]).nonzero().squeeze(1)
        found, neighbor, destination = found[same], neighbor[same], destination[same]
    return destination, neighbor, image[found] - turns[neighbor] + turns[destination]


def _images(
    positions: Tensor,
    lattice: NDArray[np.float64],
    periodic: NDArray[np.bool_],
    structure: Tensor,
    radius: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Wrap atoms into their cells and add all images that lie within the radius of the cell.

    The G places (atoms and images) are sorted by atom and image. Edges sorted by the index of the place are
    therefore sorted by source and shift.

    Returns:
        Atom (G,), image in whole cell vectors (G, 3) and position (G, 3) of each place, and the number of
        cell vectors by which each atom was wrapped (N, 3).
    """
    device = positions.device
    full, heights = completed(lattice, periodic)
    inverse = _on(np.linalg.inv(full), device)
    margins = np.where(periodic, radius / heights, 0.0)
    rows, margin, is_periodic = _on(lattice, device), _on(margins, device), _on(periodic, device)

    fraction = torch.einsum("na,nab->nb", positions, inverse[structure])
    turns = torch.where(is_periodic[structure], fraction.floor(), 0.0)
    fraction = fraction - turns
    source = torch.arange(len(positions), device=device)
    columns: list[Tensor] = []
    for axis in range(3):
        most = int(1 + margins[:, axis].max()) if periodic[:, axis].any() else 0
        steps = torch.arange(-most, most + 1, device=device, dtype=torch.float64)
        own = structure[source]
        moved = fraction[source, axis, None] + steps
        beside = margin[own, axis, None]
        inside = torch.where(
            is_periodic[own, axis, None], (moved >= -beside) & (moved <= 1 + beside), steps == 0
        )
        row, column = inside.nonzero(as_tuple=True)
        source = source[row]
        columns = [c[row] for c in columns] + [steps[column]]
    image = torch.stack(columns, 1)
    wrap = torch.einsum("ga,gab->gb", image - turns[source], rows[structure[source]])
    return source, image, positions[source] + wrap, turns


def _bin_numbers(places: Tensor, structure: Tensor, radius: float) -> tuple[Tensor, tuple[int, int]]:
    """Bin number of each place (G,), with z running fastest, and the strides along x and y.

    Along every axis, the bins are padded at both ends with the empty bins that the search can reach.
    """
    reach = torch.tensor(REACH, device=places.device, dtype=torch.float64)
    bins = ((places - places.amin(0)) * (reach / radius)).clamp(max=FARTHEST_BIN).long()
    bins[:, 0] += structure * (bins[:, 0].max() + REACH[0] + 1)  # structures side by side
    for axis in range(3):  # shorten gaps, which may be astronomic, to the smallest width out of reach
        values, which = torch.unique(bins[:, axis], return_inverse=True)
        steps = values.diff().clamp(max=REACH[axis] + 1)
        bins[:, axis] = torch.cat((steps.new_zeros(1), steps.cumsum(0)))[which]
    most = bins.amax(0).tolist()
    widths = [m + 1 + 2 * r for m, r in zip(most, REACH, strict=True)]
    while widths[0] * widths[1] * widths[2] >= MOST_BINS and max(most) > 0:
        bins = bins.div(2, rounding_mode="floor")  # larger bins: places within reach remain so
        most = [m // 2 for m in most]
        widths = [m + 1 + 2 * r for m, r in zip(most, REACH, strict=True)]
    strides = (widths[1] * widths[2], widths[2])
    number = (
        (bins[:, 0] + REACH[0]) * strides[0] + (bins[:, 1] + REACH[1]) * strides[1] + bins[:, 2] + REACH[2]
    )
    return number, strides


def _near_pairs(
    places: Tensor, home: Tensor, number: Tensor, strides: tuple[int, int], radius: float
) -> Tensor:
    """Find pairs within the radius, each encoded as atom * G + place, in ascending order.

    Args:
        places: Positions of atoms and images (G, 3), in Angstrom.
        home: Index of each atom among the places (N,).
        number: Bin number of each place (G,).
        strides: Strides of the bin numbers along x and y.
        radius: Search radius, in Angstrom.
    """
    device, total = places.device, len(places)
    key, order = number.sort()
    x, y = (torch.arange(-r, r + 1, device=device) for r in REACH[:2])
    columns = (x[:, None] * strides[0] + y * strides[1]).flatten()
    sorted_places = places[order]
    pairs = []
    for atoms in torch.arange(len(home), device=device).split(ATOMS_AT_ONCE):
        middle = number[home[atoms], None] + columns
        # Each column within reach is one range of the sorted places. The ranges differ in length and are expanded
        # into one flat list: `begin` is the start of a range minus the position of the range in that list.
        first = torch.searchsorted(key, middle - REACH[2])
        count = (torch.searchsorted(key, middle + REACH[2], right=True) - first).flatten()
        end = count.cumsum(0)
        size = int(end[-1])
        begin = first.flatten() - (end - count)
        column = torch.repeat_interleave(torch.arange(len(count), device=device), count, output_size=size)
        image = torch.arange(size, device=device) + begin[column]
        centre = column.div(len(columns), rounding_mode="floor")
        distance = sorted_places[image] - places[home[atoms]][centre]
        near = (distance.square().sum(1) <= radius * radius).nonzero().squeeze(1)
        centre, image = atoms[centre[near]], order[image[near]]
        other = image != home[centre]  # an atom is no neighbour of itself, but its images are
        pairs.append((centre * total + image)[other].sort().values)
    return torch.cat(pairs)


def _on(values: NDArray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
