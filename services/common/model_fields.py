"""Single fields of a model's JSON, read strictly.

A field that is there must have the type that it is documented with: `"false"` is no boolean and 8.5
no size. What is missing, or of the wrong type or range, is a ValueError or TypeError that names
the field.
"""

from collections.abc import Mapping
from typing import Any, Final

SIZE_MAX: Final = 2**31 - 1  # of any size or count; sums of products of two still fit into 64 bits
NUMBER_MAX: Final = 1e12  # of any base or factor; what follows from them is finite


def size(raw: Mapping[str, Any], field: str, *, default: int | None = None) -> int:
    """A whole number from 1 to `SIZE_MAX`. Null is as good as absent."""
    value = raw.get(field)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{field}: it is missing")
    if type(value) is not int or not 1 <= value <= SIZE_MAX:
        raise ValueError(f"{field}: {value!r} is no size")
    return value


def number(raw: Mapping[str, Any], field: str, *, default: float | None = None) -> float:
    """A number above 0 and up to `NUMBER_MAX`. Null is as good as absent."""
    value = raw.get(field)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{field}: it is missing")
    if type(value) not in (int, float) or not 0 < value <= NUMBER_MAX:
        raise ValueError(f"{field}: {value!r} is no number above 0 and up to {NUMBER_MAX:g}")
    return float(value)


def flag(raw: Mapping[str, Any], field: str, *, default: bool = False) -> bool:
    """A boolean. Null is as good as absent."""
    value = raw.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise TypeError(f"{field}: {value!r} is no boolean")
    return value


def token_id(value: object, field: str) -> int:
    """One token's id."""
    if type(value) is not int or not 0 <= value <= SIZE_MAX:
        raise ValueError(f"{field}: {value!r} is no token id")
    return value


def token_ids(value: object, field: str) -> tuple[int, ...]:
    """None, one id, or a list of them."""
    if value is None:
        return ()
    if isinstance(value, list):
        return tuple(token_id(item, field) for item in value)
    return (token_id(value, field),)
