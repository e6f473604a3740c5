"""Published DPA4 models by name (arXiv:2606.02419 and the released weights).

Generation 1 (``paper-*``, arXiv v1-v3) has its node non-linearity on the S2 grid and a read-out of scalars.
Generation 2 (arXiv v4, released weights) uses the SO(3) grid for both and multiplies messages with nodes. See
docs/theory.md, "Published generations".
"""

import difflib
from typing import Any

from ase.data import chemical_symbols

from dpa4.model.config import ModelConfig
from dpa4.parsing import shown

ALL_ELEMENTS: tuple[str, ...] = tuple(chemical_symbols[1:])  # H to Og: the 118 of the published models

_GENERATION_1: dict[str, Any] = {"edge_norm": True, "ffn_on": "s2"}
_GENERATION_2: dict[str, Any] = {
    "edge_norm": True,
    "message_node_so3": True,
    "ffn_on": "so3",
    "ffn_grid": 1,
    "so3_readout": "mlp",
}


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
PRESETS: dict[str, dict[str, Any]] = {
    "paper-neo": _GENERATION_1 | _sizes(64, 1, 2, 3, 3),
    "paper-air": _GENERATION_1 | _sizes(64, 1, 3, 4, 3),
    "paper-plus": _GENERATION_1 | _sizes(64, 1, 4, 4, 4),
    "paper-pro": _GENERATION_1 | _sizes(64, 2, 6, 4, 5, rank=2),
    "nano": _GENERATION_2 | _sizes(32, 1, 2, 3, 1) | {"radial_so2_mode": "none", "edge_norm": False},
    "mini": _GENERATION_2 | _sizes(32, 1, 2, 3, 2),
    "neo": _GENERATION_2 | _sizes(32, 2, 2, 3, 3),
    "air": _GENERATION_2 | _sizes(64, 1, 3, 4, 3),
    "plus": _GENERATION_2 | _sizes(64, 1, 4, 4, 4, rank=2),
    "pro": _GENERATION_2 | _sizes(64, 2, 6, 4, 5, rank=2) | {"so3_readout": "none"},
}


def preset(name: str, elements: tuple[str, ...] = ALL_ELEMENTS, **overrides: Any) -> ModelConfig:
    """Return the configuration of a published model.

    Args:
        name: One of ``PRESETS``.
        elements: Chemical symbols of the model; the published models know all 118.
        **overrides: Fields of ``ModelConfig`` that replace the published values.

    Raises:
        ValueError: If the name is unknown or an override is invalid.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown preset {shown(name)}; {hint}Available: {', '.join(PRESETS)}")
    return ModelConfig(**({"elements": elements} | PRESETS[name] | overrides))
