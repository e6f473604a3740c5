"""Descriptors of atoms, also called embeddings: the invariant features that the energy network reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from rich.progress import track

from dpa4.data import (
    EpochBatches,
    FrameDataset,
    charges_and_spins,
    check_elements,
    frame_from_atoms,
    write_structures,
)
from dpa4.data.charge_spin import charge_spin_entries
from dpa4.output import atomic_write, check_writable
from dpa4.potential.potential import Potential
from dpa4.system import own_settings, user_path


@own_settings
def embeddings(
    potential: Potential, structures: Sequence[Atoms], *, max_atoms: int = 2000, progress: bool = False
) -> list[NDArray[Any]]:
    """Invariant features of every atom after the last block, the input of the energy network.

    Embeddings do not change when a structure is rotated, translated or wrapped, and they vary smoothly with the
    positions. They serve as descriptors to compare, select or cluster atomic environments. Charge and multiplicity
    are read as by the calculator; labels are ignored.

    Args:
        potential: The potential, on the device to compute on.
        structures: One or more structures.
        max_atoms: Maximum number of atoms evaluated at once.
        progress: Show a progress bar.

    Returns:
        One array (N, C) per structure, in the precision of the network and in the order of the atoms.

    Raises:
        ValueError: If there is no structure, one has no atoms or a position that is not finite, or an element,
            charge or spin is outside the model.
    """
    if not structures:
        raise ValueError("there are no structures to embed")
    frames = [frame_from_atoms(bare_structure(a), origin=f"structure {i}") for i, a in enumerate(structures)]
    config, device = potential.config, potential.device
    check_elements(frames, potential.elements)
    pairs = charges_and_spins(frames, config.charge_spin, config.default_charge_spin)
    dataset = FrameDataset(frames, config.cutoff, pairs, cache_bytes=0)
    batches = EpochBatches(dataset, max_atoms=max_atoms, shuffle=False)
    found: list[NDArray[Any]] = []
    total = batches.num_batches(0)
    with torch.no_grad():
        for batch in track(batches.batches(0), "embedding", total=total, disable=not progress):
            potential.check(batch.graph)
            features = potential.descriptor(batch.graph.to(device)).cpu()
            sizes = torch.bincount(batch.graph.structure, minlength=batch.graph.num_structures).tolist()
            found += [own.numpy() for own in features.split(sizes)]
    return found


def write_embeddings(
    potential: Potential,
    structures: Sequence[Atoms],
    path: str | Path,
    *,
    mean: bool = False,
    max_atoms: int = 2000,
    progress: bool = True,
) -> None:
    """Write the embeddings of structures to a file, in the format given by its suffix.

    ``.npz``: arrays ``embeddings`` (all atoms, C), ``structure`` (all atoms,), the index of the structure, and
    ``atomic_numbers`` (all atoms,); with ``mean`` the single array ``embeddings`` (structures, C). ``.xyz`` or
    ``.extxyz``: the structures with the array ``embedding``, or with ``mean`` the entry ``embedding`` of
    ``atoms.info``.

    Args:
        potential: The potential, on the device to compute on.
        structures: One or more structures.
        path: File to write; an existing one is replaced.
        mean: Write one vector per structure, the mean over its atoms, instead of one per atom.
        max_atoms: Maximum number of atoms evaluated at once.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If the suffix is not one of these, or as in ``embeddings``.
    """
    path = user_path(path)
    if path.suffix not in (".npz", ".xyz", ".extxyz"):
        raise ValueError(f"embeddings are written to .npz, .xyz or .extxyz, got {path.name!r}")
    check_writable(path)
    found = embeddings(potential, structures, max_atoms=max_atoms, progress=progress)
    with atomic_write(path) as temporary:
        means = [one.mean(axis=0) for one in found]
        if path.suffix == ".npz":
            with temporary.open("wb") as file:
                if mean:
                    np.savez(file, embeddings=np.stack(means))
                else:
                    np.savez(
                        file,
                        embeddings=np.concatenate(found),
                        structure=np.repeat(np.arange(len(found)), [len(one) for one in found]),
                        atomic_numbers=np.concatenate([atoms.numbers for atoms in structures]),
                    )
            return
        images = [atoms.copy() for atoms in structures]
        for image, atomwise, average in zip(images, found, means, strict=True):
            if mean:
                image.info["embedding"] = average
            else:
                image.arrays["embedding"] = atomwise
        write_structures(temporary, images)


def bare_structure(atoms: Atoms) -> Atoms:
    """Copy of a structure without labels, which need not be valid here."""
    info = charge_spin_entries(atoms.info)
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=info)
