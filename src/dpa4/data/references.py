"""Atomic reference energies: the part of the total energy that depends on composition alone."""

from collections.abc import Mapping, Sequence

import numpy as np
from ase.data import chemical_symbols

from dpa4.data.composition_fit import element_counts, fit_composition
from dpa4.data.frame import Frame
from dpa4.data.summary import check_elements
from dpa4.messages import warn

ISOLATED_GROUPS = ("isolatedatom", "isolatedatoms")


def is_isolated_atom(frame: Frame) -> bool:
    """Return whether a frame is a free atom: one atom, non-periodic or with config_type IsolatedAtom."""
    return len(frame) == 1 and (is_group_of_atoms(frame.group) or not frame.pbc.any())


def is_group_of_atoms(name: str) -> bool:
    """Return whether a config_type or folder is that of free atoms, such as IsolatedAtom."""
    return name.lower().replace("_", "") in ISOLATED_GROUPS


def without_isolated_atoms(frames: Sequence[Frame]) -> list[Frame]:
    """Return the frames to fit. As in MACE, free atoms only define reference energies and are not fitted."""
    return [frame for frame in frames if not is_isolated_atom(frame)]


def reference_energies(
    source: str | Mapping[str, float], frames: Sequence[Frame], elements: Sequence[str]
) -> dict[str, float]:
    """Determine the reference energy of each element, in eV (docs/theory.md, "Readout and energy").

    Args:
        source: One of

            * a map from chemical symbols to energies in eV;
            * "isolated": the energies of the free atoms among the frames;
            * "least_squares": minimum-norm fit of compositions to the energies of all other frames but gross
              outliers, which are warned of; elements that do not occur get 0;
            * "auto": "isolated" if every element has a free atom, otherwise "least_squares", or zeros if no
              frame has an energy.
        frames: Training frames, including free atoms.
        elements: Chemical symbols of the elements of the model.

    Raises:
        ValueError: If the source is unknown, an element has no energy, or no frame has an energy to fit.
    """
    if isinstance(source, Mapping):
        return _given(source, elements)
    if source not in ("auto", "isolated", "least_squares"):
        raise ValueError(
            "reference_energies must be auto, isolated, least_squares or a map such as {H: -13.6}, "
            f"got {source!r}"
        )
    isolated = _isolated(frames)
    missing = [e for e in elements if e not in isolated]
    if source == "isolated" and missing:
        raise ValueError(
            f"reference_energies = isolated, but no frame is a free atom of {missing} with an energy; "
            "add one with config_type=IsolatedAtom, or use least_squares"
        )
    if source == "isolated" or (source == "auto" and not missing):
        return {e: isolated[e] for e in elements}
    fitted = [f for f in without_isolated_atoms(frames) if f.energy is not None]
    if source == "auto" and not fitted:
        return dict.fromkeys(elements, 0.0)
    if source == "auto" and isolated:
        warn(
            f"reference energies are fitted by least squares, because no frame is a free atom of {missing}",
        )
    return _least_squares(fitted, elements)


def undetermined_elements(
    source: str | Mapping[str, float], frames: Sequence[Frame], elements: Sequence[str]
) -> list[str]:
    """Elements whose reference energies are arbitrary, because other values describe the data equally well.

    A fit determines the energy of an element if the compositions of the structures can be combined to one atom of the
    element. Structures of a single composition, for example, determine the sum over their atoms only.

    Args:
        source: As for ``reference_energies``.
        frames: Training frames, including free atoms.
        elements: Chemical symbols of the elements of the model.
    """
    if isinstance(source, Mapping) or not _is_fitted(source, frames, elements):
        return []
    fitted = [f for f in without_isolated_atoms(frames) if f.energy is not None]
    compositions = np.unique(element_counts(fitted, elements), axis=0)
    # An element is determined if its unit vector is in the row space, so that the projector leaves it as it is.
    projector = np.linalg.pinv(compositions) @ compositions
    return [e for e, share in zip(elements, projector.diagonal(), strict=True) if share < 1 - 1e-8]


def undetermined_text(undetermined: Sequence[str]) -> str:
    """Explain that reference energies are arbitrary, and how to determine them."""
    names = ", ".join(undetermined)
    which = f"energy of {names} is" if len(undetermined) == 1 else f"energies of {names} are"
    return (
        f"the reference {which} arbitrary: the compositions of the training structures do not "
        "determine them, so energy differences between compositions mean nothing. Add a free atom of every element "
        f"of the model (config_type=IsolatedAtom), or structures with other proportions of {names}, or give the "
        "energies as a map in data.reference_energies"
    )


def _is_fitted(source: str, frames: Sequence[Frame], elements: Sequence[str]) -> bool:
    return source != "isolated" and not (source == "auto" and set(elements) <= set(_isolated(frames)))


def _given(source: Mapping[str, float], elements: Sequence[str]) -> dict[str, float]:
    if missing := [e for e in elements if e not in source]:
        raise ValueError(
            f"reference_energies has no value for {missing}; every element of the model needs one"
        )
    energies = {e: float(source[e]) for e in elements}
    if broken := [e for e, value in energies.items() if not np.isfinite(value)]:
        raise ValueError(f"reference_energies of {broken} are not finite numbers")
    return energies


def _isolated(frames: Sequence[Frame]) -> dict[str, float]:
    """Energies of the free atoms among the frames, in eV.

    Raises:
        ValueError: If two free atoms of an element have different energies.
    """
    found: dict[str, tuple[float, str]] = {}
    for frame in frames:
        if not is_isolated_atom(frame) or frame.energy is None:
            continue
        element = chemical_symbols[frame.atomic_numbers[0]]
        energy, origin = found.setdefault(element, (frame.energy, frame.origin))
        if abs(energy - frame.energy) > 1e-6:
            raise ValueError(
                f"free atoms of {element} have different energies: {energy} eV in {origin}, "
                f"{frame.energy} eV in {frame.origin}; keep one"
            )
    return {element: energy for element, (energy, _) in found.items()}


def _least_squares(frames: Sequence[Frame], elements: Sequence[str]) -> dict[str, float]:
    """Minimum-norm solution of counts @ energies = total energies, in float64, without gross outliers."""
    if not frames:
        raise ValueError(
            "reference energies cannot be fitted, because no frame has an energy; give them as a map such as "
            "reference_energies: {H: 0.0}"
        )
    check_elements(frames, elements)
    energies = np.array([frame.energy for frame in frames], dtype=np.float64)
    fit = fit_composition(element_counts(frames, elements), energies)
    if fit.outliers.any():
        worst = int(np.abs(fit.deviations).argmax())
        warn(
            f"the fit of reference energies leaves out {fit.outliers.sum()} of {len(frames)} energies far from the "
            f"others, such as that of {frames[worst].origin} ({fit.deviations[worst]:+.4g} eV/atom); the structures "
            "stay in the training data",
        )
    return dict(zip(elements, fit.energies.tolist(), strict=True))
