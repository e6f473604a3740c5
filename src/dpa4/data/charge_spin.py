"""Total charge and spin multiplicity of a structure: names, meaning and conversion to whole numbers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from dpa4.data.frame import Frame, file_of
from dpa4.messages import warn

CHARGE_NAMES = ("charge", "total_charge")
"""Names of the total charge, in e."""

SPIN_NAMES = ("spin", "multiplicity", "spin_multiplicity", "total_spin", "mult")
"""Names of the spin multiplicity 2S + 1, the meaning in fairchem, Orb, MACE-POLAR, TorchSim and AIMNet2."""

NAMES = (*CHARGE_NAMES, *SPIN_NAMES)
LARGEST_ROUNDING = 1e-4
"""Distance from a whole number that counts as a rounding error."""

_LOOK_ALIKE = re.compile(r"charge|spin|multiplicit|unpaired|^(chg|q|qtot|totq|uhf|nelect(rons)?)$")


def charge_spin_entries(info: Mapping[Any, Any]) -> dict[str, Any]:
    """Entries of ``atoms.info`` whose name and value look like a total charge or a spin, used or not."""
    return {
        name: value
        for name, value in info.items()
        if isinstance(name, str)
        and value is not None
        and (name in NAMES or (_looks_alike(name) and is_number(value)))
    }


def charge_and_spin(
    entries: Mapping[str, Any], default: tuple[int, int] | None, origin: str = ""
) -> tuple[int, int]:
    """Total charge (e) and spin multiplicity 2S + 1 for a model that is conditioned on them.

    Args:
        entries: ``atoms.info``, or those of its entries that state charge and spin.
        default: Charge and multiplicity of a structure that does not state them; None if there are none.
        origin: Source of the structure, for messages.

    Raises:
        ValueError: If a value is not a whole number, the multiplicity is below 1, two names disagree, or a value
            without a default is missing.
    """
    charge = _stated(entries, CHARGE_NAMES, origin)
    spin = _stated(entries, SPIN_NAMES, origin)
    if default is not None:
        return default[0] if charge is None else charge, default[1] if spin is None else spin
    if charge is None or spin is None:
        missing = "charge" if charge is None else "spin"
        raise ValueError(
            f"{_prefix(origin)}the model is conditioned on charge and spin without a default; set "
            f"atoms.info[{missing!r}] (charge in e, spin as the multiplicity 2S + 1), or train with "
            "model.default_charge_spin"
        )
    return charge, spin


def whole_numbers(values: Any, name: str, origin: str = "") -> NDArray[np.int64]:
    """Convert total charges or multiplicities to integers; values within 1e-4 of a whole number are rounded.

    Args:
        values: A number, or an array of numbers.
        name: Name of the values, of ``CHARGE_NAMES`` or ``SPIN_NAMES``.
        origin: Source of the values, for messages.

    Raises:
        ValueError: If a value is not a whole number, or a multiplicity is below 1.
    """
    multiplicity = name in SPIN_NAMES
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.array(np.nan)
    whole = np.round(numbers)
    with np.errstate(invalid="ignore"):
        near = (np.abs(numbers - whole) <= LARGEST_ROUNDING) & (np.abs(whole) < 2**31)
    if not near.all() or (multiplicity and (whole < 1).any()):
        allowed = "the spin multiplicity 2S + 1, 1 or more" if multiplicity else "the total charge in e"
        hint = "; a singlet is 1, a doublet 2" if multiplicity else ""
        raise ValueError(
            f"{_prefix(origin)}{name} must be a whole number, {allowed}{hint}; got {_shown(values)}"
        )
    return whole.astype(np.int64)


def charges_and_spins(
    frames: Sequence[Frame], conditioned: bool, default: tuple[int, int] | None
) -> list[tuple[int, int]] | None:
    """Charge and multiplicity of each frame, as input of a model; warns of entries that are not used.

    Args:
        frames: The structures.
        conditioned: The model is conditioned on charge and spin.
        default: Charge and multiplicity of frames that do not state them; None if the model has no default.

    Returns:
        One pair per frame; None for a model that is not conditioned, which ignores the entries of the frames.

    Raises:
        ValueError: As in ``charge_and_spin``; the message names the frame.
    """
    if not conditioned:
        return None
    found = [charge_and_spin(frame.charge_spin, default, frame.origin) for frame in frames]
    unused: dict[str, set[str]] = {}
    for frame in frames:
        if names := unused_names(frame.charge_spin):
            unused.setdefault(file_of(frame.origin), set()).update(names)
    for file, every in unused.items():
        warn_of_unused(every, file)
    return found


def unused_names(entries: Mapping[Any, Any]) -> set[str]:
    """Names of entries that look like a charge or a spin, but are not read."""
    return set(charge_spin_entries(entries)) - set(NAMES)


def is_look_alike(name: str) -> bool:
    """Return whether a name looks like that of a charge or a spin, but is not read."""
    return name not in NAMES and _looks_alike(name)


def warn_of_unused(names: Iterable[str], origin: str = "") -> None:
    """Warn that entries that look like a charge or a spin are not used."""
    warn(
        f"{_prefix(origin)}not used, although the name looks like a charge or a spin: {', '.join(sorted(names))}; "
        f"a total charge (e) is read from {' or '.join(CHARGE_NAMES)}, a multiplicity 2S + 1 from "
        f"{' or '.join(SPIN_NAMES)}",
    )


def same_charge_spin(first: Atoms, second: Atoms) -> bool:
    """Return whether two structures have the same entries for charge and spin; values are not checked."""
    return all(_same(first.info.get(name), second.info.get(name)) for name in NAMES)


def is_number(value: Any) -> bool:
    """Return whether a value is one number or an array of one number; texts and truth values are none."""
    array = np.asarray(value)
    return array.size == 1 and array.dtype.kind in "iuf"


def _same(first: Any, second: Any) -> bool:
    return first is second or bool(np.array_equal(np.ravel(first), np.ravel(second)))


def _stated(entries: Mapping[str, Any], names: Sequence[str], origin: str) -> int | None:
    """The value that one or several names agree on; None if there is none."""
    found = {
        name: _whole_number(entries[name], name, origin) for name in names if entries.get(name) is not None
    }
    if len(set(found.values())) > 1:
        both = ", ".join(f"{name} = {value}" for name, value in found.items())
        raise ValueError(f"{_prefix(origin)}{both} disagree; remove all but one of them")
    return next(iter(found.values()), None)


def _whole_number(value: Any, name: str, origin: str) -> int:
    # The usual case, quickly, because a calculator asks in every step.
    if type(value) is int and (name in CHARGE_NAMES or value >= 1) and abs(value) < 2**31:
        return value
    values = whole_numbers(value, name, origin)
    if values.size != 1:
        raise ValueError(f"{_prefix(origin)}{name} must be one number, got {values.size}")
    return int(values.item())


@cache
def _looks_alike(name: str) -> bool:
    return _LOOK_ALIKE.search(re.sub(r"[^a-z]", "", name.lower())) is not None


def _shown(values: Any) -> str:
    return repr(values.tolist() if isinstance(values, np.ndarray | np.generic) else values)


def _prefix(origin: str) -> str:
    return f"{origin}: " if origin else ""
