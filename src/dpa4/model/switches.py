"""Options of a model that have a short and a long form: norms on edges, and exponents of the cutoff envelopes.

Both are held in the long form, as objects whose entries have names. A short form could be mistaken for a truth value
or a number where the long one is meant.
"""

from dataclasses import astuple, dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    PositiveInt,
    Strict,
    StrictBool,
    TypeAdapter,
    ValidationError,
)

from dpa4.parsing import shown

T = TypeVar("T")

MAX_EXPONENT = 64

Symmetry = Literal["SO3", "O3"]
"""Group of the equivariance: SO3, rotations; O3, rotations and reflections (docs/theory.md, "Mirror symmetry")."""


def frame_orders(kmax: int, symmetry: Symmetry) -> tuple[int, ...]:
    """Frames of an SO(3) grid in their order: 0, -1, +1, -2, +2, ...; with symmetry O3 the even ones, 0, 1, 2, ..."""
    if symmetry == "O3":
        return tuple(range(kmax + 1))
    return (0, *(sign * k for k in range(1, kmax + 1) for sign in (-1, 1)))


@dataclass(frozen=True)
class EdgeNorm:
    """Places where `edge_norm` puts a root-mean-square norm (docs/theory.md, "Normalisation")."""

    radial: bool  # hidden layers of the radial network; also selects the constant of the norm after the convolution
    film: bool  # logits of scale and shift of the input features
    focus: bool  # scalars on which the focus streams compete

    def __bool__(self) -> NoReturn:
        raise TypeError("edge_norm has three entries; test .radial, .film or .focus")


@dataclass(frozen=True)
class EnvelopeExponents:
    """Exponents p of the two cutoff envelopes (docs/theory.md, "Radial features")."""

    basis: int | None  # of the radial basis; None: no envelope
    weight: int  # of the edge weight

    def __bool__(self) -> NoReturn:
        raise TypeError("env_exp has two entries; test .basis or .weight")


# Strict, because 1 is not true, and true is not an exponent.
_NORMS = TypeAdapter(StrictBool | tuple[StrictBool, StrictBool, StrictBool])
_Exponent = Annotated[PositiveInt, Field(le=MAX_EXPONENT), Strict()]
_EXPONENTS = TypeAdapter(_Exponent | tuple[_Exponent, _Exponent])


def read_edge_norm(value: Any) -> EdgeNorm:
    """Read the option ``edge_norm``: one truth value, or one each for radial features, FiLM and focus.

    Raises:
        ValueError: If the value is something else.
    """
    if isinstance(value, EdgeNorm):
        return value
    allowed = "true, false, or a list of three of these for radial features, FiLM and focus"
    found = _validated(_NORMS, value, "edge_norm", allowed)
    return EdgeNorm(*found) if isinstance(found, tuple) else EdgeNorm(found, found, found)


def read_envelope_exponents(value: Any) -> EnvelopeExponents:
    """Read the option ``env_exp``: exponents of radial basis and edge weight, or that of the edge weight alone.

    Raises:
        ValueError: If the value is something else.
    """
    if isinstance(value, EnvelopeExponents):
        return value
    allowed = f"a positive whole number, at most {MAX_EXPONENT}, or a list of two of these"
    found = _validated(_EXPONENTS, value, "env_exp", allowed)
    return EnvelopeExponents(*found) if isinstance(found, tuple) else EnvelopeExponents(None, found)


def _validated(adapter: TypeAdapter[T], value: Any, option: str, allowed: str) -> T:
    """Validate the value of an option; the error says what is allowed."""
    try:
        return adapter.validate_python(value)
    except ValidationError:
        raise ValueError(f"model.{option} must be {allowed}, got {shown(value)}") from None


def _plain_norms(norms: EdgeNorm) -> bool | tuple[bool, ...]:
    entries = astuple(norms)
    return entries[0] if len(set(entries)) == 1 else entries


def _plain_exponents(exponents: EnvelopeExponents) -> int | tuple[int, ...]:
    return exponents.weight if exponents.basis is None else astuple(exponents)


EdgeNormOption = Annotated[EdgeNorm, PlainValidator(read_edge_norm), PlainSerializer(_plain_norms)]
EnvelopeOption = Annotated[
    EnvelopeExponents, PlainValidator(read_envelope_exponents), PlainSerializer(_plain_exponents)
]
