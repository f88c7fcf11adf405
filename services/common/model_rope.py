"""How a model's rotary embeddings are scaled beyond the context that it was trained with.

Two spellings are in the wild: `rope_theta` with `rope_scaling`, and one `rope_parameters` object.
Both are read, with the precedence and the defaults of the reference implementation (transformers).
Kinds whose frequencies depend on the length of each request (`dynamic`, `longrope`) are refused:
keys that are cached at one length would be wrong at another.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from services.common.model_errors import UnsupportedModelError
from services.common.model_fields import flag, number, size


@dataclass(frozen=True, slots=True)
class LinearRope:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Low frequencies divided by `factor`, high ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class YarnRope:
    """Frequencies divided by `factor` but for those that turn often in the original context.

    Those with more than `beta_fast` turns are kept, those with fewer than `beta_slow` divided, and
    between is a ramp over their indices, which starts and ends at whole ones if `truncate`. Cosine
    and sine are multiplied by `attention_factor`. (YaRN, arXiv 2309.00071, section 3.)
    """

    factor: float
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    original_max_positions: int


RopeScaling = LinearRope | Llama3Rope | YarnRope

_COMMON_FIELDS: Final = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ORIGINAL: Final = "original_max_position_embeddings"
# What else an object of each type may say. Original positions are of no effect in the first two;
# checkpoints of YaRN's authors say that they were `finetuned`.
_FIELDS: Final[Mapping[str, set[str]]] = {
    "default": {_ORIGINAL},
    "linear": {"factor", _ORIGINAL},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "yarn": {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",
        _ORIGINAL,
    },
}


def parse_rope(raw: Mapping[str, Any], *, theta: float) -> tuple[float, RopeScaling | None]:
    """Base of the frequencies, and their scaling. `theta`: the architecture's default of the base.

    Raises UnsupportedModelError, and ValueError that names the field.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise TypeError(f"rope_scaling: {rope!r} is no object")
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    if kind not in _FIELDS:
        raise UnsupportedModelError(
            f"rope type {kind!r} is not supported; supported: {', '.join(_FIELDS)}"
        )
    _check_fields(rope, kind)
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise UnsupportedModelError("partial_rotary_factor other than 1 is not supported")
    theta = number(rope, "rope_theta", default=number(raw, "rope_theta", default=theta))
    if theta <= 1:
        raise ValueError(f"rope_theta: {theta} is not above 1")
    return theta, _scaling(rope, raw, kind)


def _check_fields(rope: Mapping[str, Any], kind: str) -> None:
    unknown = sorted(
        field
        for field, value in rope.items()
        if value is not None and field not in _COMMON_FIELDS | _FIELDS[kind]
    )
    if unknown:
        raise UnsupportedModelError(f"rope type {kind!r} with {unknown[0]!r} is not supported")


def _scaling(rope: Mapping[str, Any], raw: Mapping[str, Any], kind: str) -> RopeScaling | None:
    match kind:
        case "default":
            return None
        case "linear":
            return LinearRope(_factor(rope))
        case "llama3":
            low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
            if high <= low:
                raise ValueError(f"high_freq_factor: {high} is not above low_freq_factor {low}")
            return Llama3Rope(_factor(rope), low, high, _original_positions(rope, raw))
        case _:
            return _yarn(rope, raw)


def _yarn(rope: Mapping[str, Any], raw: Mapping[str, Any]) -> YarnRope:
    factor = _factor(rope)
    # 32 and 1 are the paper's, for models of the Llama family.
    beta_fast = number(rope, "beta_fast", default=32.0)
    beta_slow = number(rope, "beta_slow", default=1.0)
    if beta_fast < beta_slow:
        raise ValueError(f"beta_fast: {beta_fast} is below beta_slow {beta_slow}")
    return YarnRope(
        factor=factor,
        attention_factor=_attention_factor(rope, factor),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=flag(rope, "truncate", default=True),
        original_max_positions=_original_positions(rope, raw),
    )


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """As given, else 0.1 ln(factor) + 1, or the ratio of two such with weights of their own."""
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor")

    def of(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return of(number(rope, "mscale")) / of(number(rope, "mscale_all_dim"))
    return of(1.0)


def _factor(rope: Mapping[str, Any]) -> float:
    factor = number(rope, "factor")
    if factor < 1:
        raise ValueError(f"factor: {factor} is below 1")
    return factor


def _original_positions(rope: Mapping[str, Any], raw: Mapping[str, Any]) -> int:
    """The outer field goes first; without any the model was trained with all its positions."""
    inner = size(rope, _ORIGINAL, default=size(raw, "max_position_embeddings"))
    return size(raw, _ORIGINAL, default=inner)
