"""Published DPA4 models by name (arXiv:2606.02419, the released weights and the presets of deepmd-kit).

Generation 1 (``paper-*``, arXiv v1-v3) has its node non-linearity on the S2 grid and a read-out of scalars.
Generation 2 (arXiv v4, released weights) uses the SO(3) grid for both and multiplies messages with nodes.
Generation 3 (presets of deepmd-kit from September 2026) has other norms, and from v20260911 on another radial basis.
See docs/theory.md, "Published generations".
"""

import difflib
from typing import Any, NamedTuple

from ase.data import chemical_symbols

from dpa4.model.config import ModelConfig
from dpa4.model.switches import EdgeNorm
from dpa4.parsing import shown

ALL_ELEMENTS: tuple[str, ...] = tuple(chemical_symbols[1:])  # H to Og: the 118 of the published models

_GENERATION_1: dict[str, Any] = {"edge_norm": True, "ffn_on": "s2"}
_ON_SO3: dict[str, Any] = {"message_node_so3": True, "ffn_on": "so3", "ffn_grid": 1, "so3_readout": "mlp"}


def _sizes(
    channels: int, n_focus: int, n_blocks: int, mixing_layers: int, lmax: int, rank: int = 1
) -> dict[str, int]:
    return {
        "channels": channels,
        "n_focus": n_focus,
        "n_blocks": n_blocks,
        "mixing_layers": mixing_layers,
        "lmax": lmax,
        "radial_so2_rank": rank,
    }


# The numbers are channels, n_focus, n_blocks, mixing_layers and lmax.
_GRADES: dict[str, dict[str, Any]] = {
    "nano": _ON_SO3 | _sizes(32, 1, 2, 3, 1) | {"radial_so2_mode": "none"},
    "mini": _ON_SO3 | _sizes(32, 1, 2, 3, 2),
    "neo": _ON_SO3 | _sizes(32, 2, 2, 3, 3),
    "air": _ON_SO3 | _sizes(64, 1, 3, 4, 3),
    "plus": _ON_SO3 | _sizes(64, 1, 4, 4, 4, rank=2),
    "pro": _ON_SO3 | _sizes(64, 2, 6, 4, 5, rank=2) | {"so3_readout": "none"},
    "max": _ON_SO3 | _sizes(96, 2, 8, 4, 6, rank=4) | {"so3_readout": "none"},
    "ultra": {"ffn_on": "s2", "so3_readout": "mlp"} | _sizes(128, 3, 10, 4, 6, rank=4),
}


class _Version(NamedTuple):
    """Switches that all grades of a version share, and the grades it has."""

    grades: tuple[str, ...]
    switches: dict[str, Any]


_SIX_GRADES = ("nano", "mini", "neo", "air", "plus", "pro")
_NORMS_OF_GENERATION_3 = {
    "edge_norm": (False, True, True),
    "sandwich_norm": (True, False, True, False),
}
_VERSIONS = {
    "v20260820": _Version(_SIX_GRADES, {"edge_norm": True}),
    "v20260901": _Version(tuple(_GRADES), _NORMS_OF_GENERATION_3),
    "v20260911": _Version(tuple(_GRADES), _NORMS_OF_GENERATION_3 | {"env_exp": 5, "basis": "gaussian/fix"}),
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper-neo": _GENERATION_1 | _sizes(64, 1, 2, 3, 3),
    "paper-air": _GENERATION_1 | _sizes(64, 1, 3, 4, 3),
    "paper-plus": _GENERATION_1 | _sizes(64, 1, 4, 4, 4),
    "paper-pro": _GENERATION_1 | _sizes(64, 2, 6, 4, 5, rank=2),
    **{grade: _GRADES[grade] | {"edge_norm": grade != "nano"} for grade in _SIX_GRADES},
}
"""Options of the published models by the names of this package."""

DEEPMD_PRESETS: dict[str, dict[str, Any]] = {
    f"dpa4-{grade}-{name}": _GRADES[grade] | version.switches
    for name, version in _VERSIONS.items()
    for grade in version.grades
}
"""Options of the presets of deepmd-kit by its names, such as dpa4-mini-v20260911."""

NAMES = f"{', '.join(PRESETS)}, or dpa4-GRADE-VERSION as in deepmd-kit (docs/models.md)"
"""Names of all presets, for messages and descriptions."""


def preset(name: str, elements: tuple[str, ...] = ALL_ELEMENTS, **overrides: Any) -> ModelConfig:
    """Return the configuration of a published model.

    Args:
        name: One of ``PRESETS`` or ``DEEPMD_PRESETS``, in upper or lower case.
        elements: Chemical symbols of the model; the published models know all 118.
        **overrides: Fields of ``ModelConfig`` that replace the published values.

    Raises:
        ValueError: If the name is unknown or an override is invalid.
    """
    options = PRESETS | DEEPMD_PRESETS
    if name.lower() not in options:
        raise ValueError(f"unknown preset {shown(name)}; {_hint(name.lower())}")
    return ModelConfig(**({"elements": elements} | options[name.lower()] | overrides))


def _hint(name: str) -> str:
    """Advice about an unknown name: the grades and versions that exist, or the closest name and a list."""
    prefix, _, version = name.rpartition("-")
    grade = prefix.removeprefix("dpa4-")
    if version in _VERSIONS and grade in _GRADES:
        others = [other for other, found in _VERSIONS.items() if grade in found.grades]
        return (
            f"{version} has the grades {', '.join(_VERSIONS[version].grades)} only; {grade} exists as "
            + " and ".join(f"dpa4-{grade}-{other}" for other in others)
        )
    if name.startswith("dpa4-"):
        return (
            f"presets of deepmd-kit are dpa4-GRADE-VERSION with a grade of {', '.join(_GRADES)} and a version of "
            f"{', '.join(_VERSIONS)}"
        )
    close = difflib.get_close_matches(name, PRESETS, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Available: {NAMES}"


FREE_OPTIONS = frozenset(("elements", "bridging", "excluded_pairs", "float32_cutoff"))
"""Options that belong to the data, the user or the import rather than to a published architecture."""


class Match(NamedTuple):
    """Preset closest to a model, and the options in which the model differs, with the values of the model."""

    name: str
    changed: dict[str, Any]


def closest_preset(config: ModelConfig) -> Match:
    """Find the preset with the fewest other options; elements, excluded pairs and bridging do not count.

    Among equal ones, deepmd-kit's name is preferred, because it has a version.
    """
    own = config.model_dump(exclude=set(FREE_OPTIONS))
    matches = []
    for name in [*DEEPMD_PRESETS, *PRESETS]:
        published = preset(name, elements=("H",)).model_dump(exclude=set(FREE_OPTIONS))
        matches.append(Match(name, {key: own[key] for key in own if own[key] != published[key]}))
    return min(matches, key=lambda match: len(match.changed))


def generation(config: ModelConfig) -> int:
    """Return the generation of published models, 1, 2 or 3, that introduced the switches of a model."""
    one_edge_norm = config.edge_norm in (EdgeNorm(True, True, True), EdgeNorm(False, False, False))
    if not one_edge_norm or config.env_exp.basis is None or config.basis.endswith("/fix"):
        return 3
    on_so3 = config.message_node_so3 or config.ffn_on == "so3" or config.so3_readout != "none"
    return 2 if on_so3 else 1
