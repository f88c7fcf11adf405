"""Which idle adapter goes first: eviction policies, by name, with their options.

A policy scores the idle adapters (`services.core.eviction_view`); the lowest goes first.

- `lru`, `lfu`, `gdsf`: baselines;
- `chameleon`, `fairshare`: the paper's score and its comparison with equal weights;
- `cost`: ours, the expected time saved per block.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Final, TypeVar, get_args, get_type_hints

from services.core.eviction_baselines import Gdsf, Lfu, Lru
from services.core.eviction_chameleon import FAIRSHARE, Chameleon, ChameleonWeights
from services.core.eviction_cost import Cost
from services.core.eviction_view import EvictionPolicy, IdleAdapters, Rules

__all__ = [
    "EVICTION_NAMES",
    "Chameleon",
    "ChameleonWeights",
    "Cost",
    "EvictionPolicy",
    "Gdsf",
    "IdleAdapters",
    "Lfu",
    "Lru",
    "Rules",
    "build_eviction",
]

T = TypeVar("T", ChameleonWeights, Cost)
Options = Mapping[str, str]

_FIXED: Final[dict[str, Callable[[], EvictionPolicy]]] = {"lru": Lru, "lfu": Lfu, "gdsf": Gdsf}
_WITH_OPTIONS: Final[dict[str, Callable[[Options], EvictionPolicy]]] = {
    "chameleon": lambda options: Chameleon(_with_options(ChameleonWeights(), options)),
    "fairshare": lambda options: Chameleon(_with_options(FAIRSHARE, options)),
    "cost": lambda options: _with_options(Cost(), options),
}
EVICTION_NAMES: Final = (*_FIXED, *_WITH_OPTIONS)


def build_eviction(name: str, options: Options | None = None) -> EvictionPolicy:
    """The policy of that name, with its default parameters but for the options.

    Raises ValueError for an unknown name or option, or a value that an option cannot have.
    """
    if name in _FIXED:
        if options:
            raise ValueError(f"eviction policy {name!r} has no options, got {', '.join(options)}")
        return _FIXED[name]()
    if name not in _WITH_OPTIONS:
        raise ValueError(f"unknown eviction policy {name!r}, have {', '.join(EVICTION_NAMES)}")
    return _WITH_OPTIONS[name](options or {})


def _with_options(values: T, options: Options) -> T:
    """The values with those options, each a number or one of a few words."""
    hints = get_type_hints(type(values))
    settable = {one.name: hints[one.name] for one in fields(values)}
    given: dict[str, Any] = {}
    for name, text in options.items():
        if name not in settable:
            raise ValueError(f"unknown eviction option {name!r}, have {', '.join(settable)}")
        kind = settable[name]
        given[name] = _number(name, text) if kind is float else _word(name, text, get_args(kind))
    return replace(values, **given)


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    least = math.ulp(0.0) if name.endswith("window_s") or name == "recency_s" else 0.0
    if not least <= value < math.inf:
        above = "above" if least else "of at least"
        raise ValueError(f"eviction option {name} must be a number {above} 0, not {text!r}")
    return value


def _word(name: str, text: str, words: tuple[str, ...]) -> str:
    if text not in words:
        raise ValueError(f"eviction option {name} must be {' or '.join(words)}, not {text!r}")
    return text
