"""Checks of numbers that a user chose: a config that cannot work is refused by the field's name."""

from math import isfinite


def require_positive(**fields: float) -> None:
    """Raise ValueError unless each is finite and greater than zero."""
    for name, value in fields.items():
        if not (isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, not {value}")


def require_not_negative(**fields: float) -> None:
    """Raise ValueError unless each is finite and at least zero."""
    for name, value in fields.items():
        if not (isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and at least zero, not {value}")
