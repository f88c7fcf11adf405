r"""Regular expressions from an upload, cut down to those that can't be made to run for ever.

PEFT configs may name modules by regular expression, and Python's engine backtracks: `(a+)+` takes
exponential time, and holds up the whole process meanwhile. So repetition of a group, backreferences
and look-around are refused, and of what is left the number of ways to match is bounded: a
repetition multiplies it by the length of a module path, `?` by two, and alternatives add up.
"""

import re
from dataclasses import dataclass
from typing import Final

from services.adapter_store.refusals import invalid, shown, unsupported

CHARACTERS_MAX: Final = 2000
COST_MAX: Final = 1_000_000  # of all patterns of a config together: tens of milliseconds a module
_PATH_CHARACTERS: Final = 41  # "model.layers.1000.self_attn.gate_proj" and some
_REPETITION: Final = "*+{"
# Set operations to be: Python warns of them, and they have no meaning in a module's path.
_RESERVED = re.compile(r"\[\[|--|&&|~~|\|\|")
_TOKEN = re.compile(
    r"\\(?P<escaped>.)|\[\^?\]?(?:\\.|[^\]\\])*\]|(?P<refused>\(\?(?!:|P<idx>)|\)[*+{])"
    r"|(?P<open>\((?:\?:|\?P<idx>)?)|(?P<mark>[)|?*+{])",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Pattern:
    """`cost`: most ways in which it can match one module path."""

    regex: re.Pattern[str]
    cost: int


def compile_pattern(text: str, *, field: str, wrap: tuple[str, str] = ("", "")) -> Pattern:
    """Compile `text` between the parts of `wrap`. Raises ADAPTER_UNSUPPORTED, ADAPTER_INVALID."""
    whole = f"{wrap[0]}{text}{wrap[1]}"
    if len(text) > CHARACTERS_MAX:
        raise unsupported(f"{field}: a pattern is over {CHARACTERS_MAX} characters", field=field)
    if reserved := _RESERVED.search(text):
        raise unsupported(f"{field}: {reserved[0]} is not accepted in patterns", field=field)
    try:
        regex = re.compile(whole)
    except (re.error, OverflowError, RecursionError) as error:
        raise invalid(
            f"{field}: {shown(text)} is not a regular expression: {error}", field=field
        ) from error
    pattern = Pattern(regex, _cost(whole, field=field))
    check_cost(pattern, field=field)
    return pattern


def check_cost(*patterns: Pattern, field: str) -> None:
    """Raises ADAPTER_UNSUPPORTED when matching all of them may take too long."""
    if sum(pattern.cost for pattern in patterns) > COST_MAX:
        raise unsupported(
            f"{field}: too many repetitions or alternatives; name the modules in a list",
            field=field,
        )


def _cost(whole: str, *, field: str) -> int:
    """`whole` compiles, so its brackets are balanced."""
    open_groups = [(0, 1)]  # per group: the branches before this one, and this one so far
    for token in _TOKEN.finditer(whole):
        if token["refused"] or (token["escaped"] or "").isdigit():
            raise unsupported(f"{field}: {token[0]} is not accepted in patterns", field=field)
        if token["open"]:
            open_groups.append((0, 1))
            continue
        before, branch = open_groups[-1]
        match token["mark"]:
            case ")":
                del open_groups[-1]
                outer_before, outer_branch = open_groups[-1]
                open_groups[-1] = (outer_before, outer_branch * (before + branch))
            case "|":
                open_groups[-1] = (before + branch, 1)
            case "?":
                open_groups[-1] = (before, branch * 2)
            case str(mark) if mark in _REPETITION:
                open_groups[-1] = (before, branch * _PATH_CHARACTERS)
            case _:  # an escaped character or a set: one way
                pass
    return sum(open_groups[0])
