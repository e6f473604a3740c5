"""Options of a DPA4 model: one frozen, validated object that every checkpoint stores."""

import struct
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Annotated, Literal

from ase.data import atomic_numbers
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from dpa4.model.switches import (
    EdgeNorm,
    EdgeNormOption,
    EnvelopeExponents,
    EnvelopeOption,
    Symmetry,
    frame_orders,
)
from dpa4.ops.layout import EdgeLayout
from dpa4.parsing import shown

MAX_DEGREE = 10
MAX_BLOCKS = 64
MAX_GRID = 400
"""Coefficients of a field on the grids, (lmax + 1)^2 times the frames. The couplings of a grid have its cube."""

Degree = Annotated[int, Field(le=MAX_DEGREE)]
Charge = Annotated[int, Field(ge=-100, le=99)]  # limits of `dpa4.model.seed.ChargeSpinEmbedding`
Multiplicity = Annotated[int, Field(ge=0, le=99)]
Width = Annotated[int, Field(ge=0, le=4096)]
GridOperation = Literal["glu", "mlp"] | Annotated[PositiveInt, Field(le=64)]


class Bridging(BaseModel):
    """ZBL zone bridging: below ``r_inner`` only the analytic nuclear repulsion varies.

    See docs/theory.md, "ZBL bridging".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    r_inner: float = Field(
        0.5, gt=0, description="Below this distance the learned part is frozen, in Angstrom."
    )
    r_outer: float = Field(
        0.8, gt=0, description="Above this distance the learned part is untouched, in Angstrom."
    )
    smooth_cutoff: bool = Field(
        True,
        description="Multiply the ZBL energy by the cutoff envelope. deepmd-kit ends it abruptly at the cutoff "
        "(1 meV for O-O at 6 Angstrom); false reproduces this and is set for imported models.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "Bridging":
        if self.r_inner >= self.r_outer:
            raise ValueError(f"bridging.r_inner must be below r_outer = {self.r_outer}, got {self.r_inner}")
        return self


def pair_names(elements: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the unordered pairs of elements by name, such as "C-H"; elements in the order given."""
    return {f"{a}-{b}": (a, b) for a, b in combinations_with_replacement(elements, 2)}


class PairBridging(BaseModel):
    """ZBL bridging with a window per pair of elements, which ends where the training data begin.

    Above its window a pair is described by the network alone. Within, the analytic nuclear repulsion sets in, and the
    network sees distances that change less and less. See docs/theory.md, "ZBL bridging".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    outer: Mapping[str, float] = Field(
        description="Upper end of the window of every pair of elements, such as C-H: 0.81, in Angstrom."
    )
    frozen: float = Field(
        gt=0, lt=1, description="Below this fraction of the upper end the network sees a fixed distance."
    )
    full: Mapping[str, float] = Field(
        description="Distance of every pair of elements below which the repulsion is complete, in Angstrom."
    )

    @property
    def text(self) -> str:
        """Upper ends in ascending order, such as "H-O 0.669, C-C 1.038 Å"; at most twelve pairs."""
        ascending = sorted(self.outer.items(), key=lambda entry: entry[1])
        ends = ", ".join(f"{name} {end:.3f}" for name, end in ascending[:12])
        more = f" and {len(ascending) - 12} more pairs" if len(ascending) > 12 else ""
        return f"repulsion of nuclei from {ends} Å{more} inwards, alone from {self.frozen:g} of that"


class ModelConfig(BaseModel):
    """Architecture of one DPA4 model (arXiv:2606.02419).

    Names follow the paper and the published input files. Every switch but ``symmetry`` (docs/adr/0025) is used by a
    published model or by an ablation of the paper; ``dpa4.model.presets`` holds the published combinations. The upper
    limits are far above the published models (128 channels, 10 blocks, degree 6, 3 focus streams). They refuse
    damaged files and slips of the pen before memory is allocated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    elements: tuple[str, ...] = Field(
        max_length=118, description="Chemical symbols the model knows; their order is the type index."
    )
    cutoff: float = Field(6.0, ge=0.5, le=30, description="Cutoff radius, in Angstrom.")

    channels: PositiveInt = Field(
        64, le=1024, description="Channels per spherical-harmonic coefficient of a node."
    )
    lmax: int = Field(3, ge=0, le=MAX_DEGREE, description="Highest degree of the node features.")
    n_blocks: PositiveInt = Field(3, le=MAX_BLOCKS, description="Interaction blocks.")
    l_schedule: tuple[Degree, ...] | None = Field(
        None,
        max_length=MAX_BLOCKS,
        description="Degree of each block, non-increasing; replaces lmax and n_blocks.",
    )
    mmax: int = Field(
        1,
        ge=0,
        le=MAX_DEGREE,
        description="Highest order kept in the edge frame (at most the block's degree).",
    )
    kmax: int = Field(
        1,
        ge=0,
        le=MAX_DEGREE,
        description="Highest frame order of the SO(3) grids (at most the block's degree).",
    )

    symmetry: Symmetry = Field(
        "SO3",
        description="SO3: equivariant under rotations, as published models are; O3: also under reflections, so that "
        "mirror images have equal energies, with half of the weights of orders above zero, and with kmax + 1 "
        "frames of the SO(3) grids instead of 2 kmax + 1.",
    )

    n_radial: PositiveInt = Field(16, le=512, description="Radial basis functions.")
    basis: Literal["bessel", "gaussian", "bessel/fix", "gaussian/fix"] = Field(
        "bessel", description="Radial basis; with /fix its frequencies or centres are not trained."
    )
    radial_mlp: tuple[Width, ...] = Field(
        (0,), max_length=16, description="Hidden widths of the radial network; 0 means channels."
    )
    env_exp: EnvelopeOption = Field(
        EnvelopeExponents(7, 5),
        description="Exponents p of the cutoff envelopes of the radial basis and of the edge weight; a single "
        "number is that of the edge weight and leaves the radial basis without an envelope.",
    )
    use_env_seed: bool = Field(
        True, description="Initialise nodes from their environment (FiLM and l > 0 features)."
    )
    edge_norm: EdgeNormOption = Field(
        EdgeNorm(False, False, False),
        description="Normalise quantities that vanish at the cutoff (radial features, FiLM logits, focus scalars; "
        "docs/theory.md): true, false, or one of these for each. Published models use true or [false, true, true]; "
        "radial features without a norm keep the curvature smooth at the cutoff.",
    )

    mixing_layers: int = Field(4, ge=0, le=32, description="SO(2) layers per convolution.")
    n_focus: PositiveInt = Field(1, le=16, description="Parallel focus streams of the convolution.")
    focus_dim: int = Field(0, ge=0, le=1024, description="Channels of a focus stream; 0 means channels.")
    n_atten_head: int = Field(
        1, ge=0, le=64, description="Attention heads per focus; 0 sums with the envelope as weight."
    )
    radial_so2_mode: Literal["none", "degree", "degree_channel"] = Field(
        "degree_channel",
        description="Edge-node product: elementwise, a degree matrix, or one per channel of low rank.",
    )
    radial_so2_rank: PositiveInt = Field(1, le=64, description="Rank of the degree_channel product.")
    message_node_so3: bool = Field(False, description="Multiply messages with their node on the SO(3) grid.")
    message_grid: GridOperation = Field(
        "glu", description="Operation of the message-node grid: glu, mlp, or a number of routed branches."
    )
    layer_scale: bool = Field(False, description="Learned scale on each SO(2) layer and FFN.")

    ffn_blocks: PositiveInt = Field(1, le=16, description="Feed-forward networks per block.")
    ffn_neurons: Width = Field(0, description="Hidden channels of the feed-forward networks; 0 is automatic.")
    ffn_on: Literal["s2", "so3", "degrees"] = Field(
        "s2",
        description="Where the feed-forward non-linearity acts: S2 grid, SO(3) grid, or gates per degree.",
    )
    ffn_grid: GridOperation = Field(
        "glu", description="Operation of the feed-forward grid: glu, mlp, or a number of routed branches."
    )
    sandwich_norm: tuple[bool, bool, bool, bool] = Field(
        (False, True, True, False),
        description="Norms before and after the convolution, before and after the FFN.",
    )
    mlp_bias: bool = Field(False, description="Biases in the equivariant layers.")

    so3_readout: Literal["none", "glu", "mlp"] = Field(
        "none", description="Read-out from scalars or SO(3) grid."
    )
    readout_layers: PositiveInt = Field(1, le=16, description="Layers of the read-out.")
    fitting: tuple[Width, ...] = Field(
        (0,), max_length=16, description="Hidden widths of the energy network; 0 is automatic."
    )

    charge_spin: bool = Field(False, description="Condition on total charge and spin multiplicity.")
    default_charge_spin: tuple[Charge, Multiplicity] | None = Field(
        None,
        description="Charge and multiplicity of structures that carry none; without it they must carry both.",
    )
    excluded_pairs: tuple[tuple[str, str], ...] = Field(
        (), max_length=118 * 119 // 2, description="Element pairs that do not interact."
    )
    bridging: Bridging | PairBridging | None = Field(
        None,
        description="ZBL bridging at short distance: zones for all pairs, or a window per pair of elements.",
    )
    pre_release: bool = Field(
        False, description="Degree normalisation and radial features of checkpoints of format below 1.1."
    )
    float32_cutoff: bool = Field(
        False,
        description="Round the cutoff of the edge weight to float32, as deepmd-kit does; set for imported models "
        "with a cutoff that this changes.",
    )

    @field_validator("elements")
    @classmethod
    def _known_elements(cls, elements: tuple[str, ...]) -> tuple[str, ...]:
        if not elements:
            raise ValueError("model.elements is empty; name at least one chemical symbol")
        unknown = [e for e in elements if e not in atomic_numbers or e == "X"]
        if unknown:
            raise ValueError(
                f"model.elements has {shown(unknown)}; allowed are chemical symbols such as H, C, Si"
            )
        if len(set(elements)) < len(elements):
            raise ValueError(f"model.elements names an element twice: {shown(list(elements))}")
        return elements

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        degrees = self.degrees
        if not degrees or min(degrees) < 0 or any(b > a for a, b in zip(degrees, degrees[1:], strict=False)):
            raise ValueError(
                f"model.l_schedule must be non-increasing degrees >= 0, got {shown(list(degrees))}"
            )
        if self.kmax > degrees[0]:
            raise ValueError(f"model.kmax must be at most lmax = {degrees[0]}, got {self.kmax}")
        if (size := (degrees[0] + 1) ** 2 * len(frame_orders(self.kmax, self.symmetry))) > MAX_GRID:
            raise ValueError(
                f"model.kmax = {self.kmax} with lmax = {degrees[0]} needs grids of {size} coefficients, at most "
                f"{MAX_GRID} are supported; choose a lower kmax"
            )
        if self.n_atten_head and self.focus_width % self.n_atten_head:
            raise ValueError(
                f"model.n_atten_head = {self.n_atten_head} must divide the focus width {self.focus_width}"
            )
        if self.pre_release and self.env_exp.basis is None:
            raise ValueError(
                f"model.env_exp = {self.env_exp.weight} with model.pre_release = True leaves the radial features "
                "without an envelope, so that the energy jumps at the cutoff; name two exponents, such as [7, 5]"
            )
        for pair in self.excluded_pairs:
            if missing := [e for e in pair if e not in self.elements]:
                raise ValueError(f"model.excluded_pairs names {shown(missing)}, which model.elements lacks")
        if isinstance(self.bridging, Bridging) and self.bridging.r_outer >= self.cutoff:
            raise ValueError(
                f"bridging.r_outer must be below cutoff = {self.cutoff}, got {self.bridging.r_outer}"
            )
        if isinstance(self.bridging, PairBridging):
            self._check_windows(self.bridging)
        return self

    def _check_windows(self, bridging: PairBridging) -> None:
        pairs = pair_names(self.elements)
        for option, distances, limits in (
            ("outer", bridging.outer, dict.fromkeys(pairs, self.cutoff)),
            ("full", bridging.full, bridging.outer),
        ):
            if wrong := sorted(distances.keys() ^ pairs.keys()):
                raise ValueError(
                    f"bridging.{option} needs one entry per pair of elements; missing or unknown: {shown(wrong)}"
                )
            wrong = [
                f"{name}: {r} of {limits[name]:g}"
                for name, r in distances.items()
                if not 0 < r < limits[name]
            ]
            if wrong:
                limit = "the cutoff" if option == "outer" else "bridging.outer"
                raise ValueError(f"bridging.{option} must be between 0 and {limit}, got {shown(wrong)}")

    @property
    def has_pair_bridging(self) -> bool:
        """True if the model has a window per pair of elements."""
        return isinstance(self.bridging, PairBridging)

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degree of each block."""
        return self.l_schedule if self.l_schedule is not None else (self.lmax,) * self.n_blocks

    @property
    def has_mirror_symmetry(self) -> bool:
        """True if mirror images have equal energies: by symmetry O3, or because all features are scalars."""
        return self.symmetry == "O3" or max(self.degrees) == 0

    @property
    def weight_cutoff(self) -> float:
        """Cutoff of the edge weight, in Angstrom."""
        return float32(self.cutoff) if self.float32_cutoff else self.cutoff

    @property
    def focus_width(self) -> int:
        """Channels of one focus stream."""
        return self.focus_dim or self.channels

    @property
    def edge_widths(self) -> tuple[int, ...]:
        """Numbers that a block stores for each edge, all focus streams together, by block."""
        rows = (EdgeLayout(degree, min(self.mmax, degree)).total for degree in self.degrees)
        return tuple(self.n_focus * self.focus_width * count for count in rows)


def float32(value: float) -> float:
    """Return the number of type float32 that is nearest to a value."""
    return struct.unpack("f", struct.pack("f", value))[0]


def auto_width(channels: int) -> int:
    """Hidden width of a gated layer: 8/3 of the input width, rounded up to a multiple of 32.

    See docs/theory.md, "Feed-forward network".
    """
    return 32 * -(-8 * channels // 96)
