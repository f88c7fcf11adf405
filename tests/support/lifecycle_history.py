"""Histories of one adapter: what clients were answered, and whether it can have been so.

The registry orders all changes of a name, so its documents are the states that the name went
through. A call fits when one of the states that it may have met explains its answer: not one that a
call which ended before this one began had already replaced, and not one decided after it ended.
Gateways read a mirror, which may be `stale_s` behind, but never goes back: of two requests of which
one began when the other had ended, the later one meets no older state.

`violations` is given a history and looks at nothing else. Times are of one clock, nanoseconds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from services.adapter_store.entries import Entry
from services.common.errors import Reason

Kind = Literal[
    "generate", "get", "publish", "alias", "canary", "rollback", "delete", "pin", "unpin", "tenants"
]
READS = ("generate", "get")
HARDLY_NS = 50_000_000  # a server lets go of a call a little after its client has the answer


@dataclass(frozen=True, slots=True)
class State:
    """A name from `decided_ns` on, until the next revision. Revision 0: before there was any."""

    revision: int
    decided_ns: int
    versions: Mapping[int, str]  # number to digest, ascending
    aliases: Mapping[str, int]
    canaries: Mapping[str, int]
    previous: Mapping[str, int]
    pins: frozenset[str]  # selectors
    tenants: tuple[str, ...] = ()

    @classmethod
    def of(cls, entry: Entry) -> "State":
        """What a revision document says."""
        return cls(
            entry.revision,
            entry.changed_ns,
            {version.number: version.weights.digest for version in entry.versions},
            entry.aliases,
            {alias: canary.version for alias, canary in entry.canaries.items()},
            entry.previous_versions,
            frozenset(pin.selector for pin in entry.pins),
            entry.tenants,
        )


@dataclass(frozen=True, slots=True)
class Call:
    """One call and its answer.

    `selector`: "" the newest version, a number, or an alias. `version`: what a change was to set,
    or who answered. `revision`: of the adapter in the answer; None where it carries none.
    """

    client: int
    kind: Kind
    selector: str
    begun_ns: int
    ended_ns: int
    version: int = 0
    digest: str = ""
    revision: int | None = None
    reason: Reason | None = None  # None: it succeeded


def violations(
    states: Sequence[State], calls: Sequence[Call], *, stale_s: float, publishes_max: int
) -> list[str]:
    """What can't be. `states`: revision 0 and all others, in order.

    `publishes_max`: so many publishes at a time the store takes, and refuses those beyond.
    """
    assert [state.revision for state in states] == list(range(len(states)))
    told = sorted((call.ended_ns, _proved(states, call)) for call in calls)
    found: list[str] = []
    seen: list[tuple[int, int]] = []  # when a request had ended, and the state that it met at least
    for call in sorted(calls, key=lambda it: it.begun_ns):
        if call.reason is Reason.TOO_MANY_REQUESTS:
            if call.kind != "publish" or _beside(calls, call) < publishes_max:
                found.append(f"nobody was in the way of {call}")
            continue
        is_mirrored = call.kind == "generate"
        known_ns = call.begun_ns - (int(stale_s * 1e9) if is_mirrored else 0)
        first = max((revision for ended_ns, revision in told if ended_ns < known_ns), default=0)
        is_monotone = is_mirrored and call.reason is None
        if is_monotone:
            first = max([first, *(met for ended_ns, met in seen if ended_ns < call.begun_ns)])
        met = next(_explaining(states[first:], call), None)
        if met is None:
            found.append(f"no state from revision {first} on explains {call}")
        elif is_monotone:
            seen.append((call.ended_ns, met.revision))
    return found + list(_unasked(states, calls))


def _proved(states: Sequence[State], call: Call) -> int:
    """The revision that must be there once this call has ended; 0 if it says nothing of that."""
    if call.revision is not None:
        return call.revision
    if call.reason is not None or call.kind in READS:
        return 0
    for before, state in pairwise(states):
        is_within = call.begun_ns <= state.decided_ns <= call.ended_ns
        if is_within and explains(state, call) and not explains(before, call):
            return state.revision
    return 0


def _explaining(states: Sequence[State], call: Call) -> Iterator[State]:
    return (
        state
        for state in states
        if state.decided_ns <= call.ended_ns
        and (call.revision is None or call.revision == state.revision)
        and explains(state, call)
    )


def _beside(calls: Sequence[Call], call: Call) -> int:
    """How many other calls of its kind ran while it did, or had hardly ended."""
    return sum(
        other.kind == call.kind
        and other.begun_ns <= call.ended_ns
        and other.ended_ns + HARDLY_NS >= call.begun_ns
        for other in calls
        if other is not call
    )


def _unasked(states: Sequence[State], calls: Sequence[Call]) -> Iterator[str]:
    """Changes that no call can have made."""
    changes = [call for call in calls if call.kind not in READS and call.reason is None]
    for state in states[1:]:
        if not any(call.begun_ns <= state.decided_ns <= call.ended_ns for call in changes):
            yield f"nobody asked for {state}"


def explains(state: State, call: Call) -> bool:
    """Whether the answer is what a call gets that meets this state, or that has made it."""
    if call.reason is None:
        return _ANSWERS[call.kind](state, call)
    return call.reason in _REFUSALS and _REFUSALS[call.reason](state, call)


def _is_answered(state: State, call: Call) -> bool:
    is_meant = call.version in _meanings(state, call)
    return is_meant and state.versions[call.version] == call.digest


def _is_moved(state: State, call: Call) -> bool:
    is_shared = call.selector in state.canaries
    return state.aliases.get(call.selector) == call.version and not is_shared


def _is_deleted(state: State, call: Call) -> bool:
    return not _has(state, call.selector) if call.selector else not state.versions


_ANSWERS: dict[Kind, Callable[[State, Call], bool]] = {
    "generate": _is_answered,
    "get": _is_answered,
    "publish": lambda state, call: state.versions.get(call.version) == call.digest,
    "alias": _is_moved,
    "canary": lambda state, call: state.canaries.get(call.selector) == call.version,
    "rollback": lambda state, call: call.selector in state.aliases.keys() - state.canaries.keys(),
    "delete": _is_deleted,
    "pin": lambda state, call: call.selector in state.pins,
    "unpin": lambda state, call: call.selector not in state.pins,
    "tenants": lambda state, call: bool(state.versions),
}


def _meanings(state: State, call: Call) -> set[int]:
    """The versions that may answer to the call's selector."""
    if not _is_live(state, call):
        return set()
    if not call.selector:
        return {max(state.versions)}
    if call.selector.isdecimal():
        return {int(call.selector)} & state.versions.keys()
    numbers = {state.aliases.get(call.selector)}
    if call.kind == "generate":
        numbers.add(state.canaries.get(call.selector))
    return {number for number in numbers if number is not None}


def _lacks_version(state: State, call: Call) -> bool:
    number = str(call.version) if call.kind in ("alias", "canary") else call.selector
    return _is_live(state, call) and number.isdecimal() and not _has(state, number)


def _lacks_alias(state: State, call: Call) -> bool:
    is_alias = bool(call.selector) and not call.selector.isdecimal()
    return _is_live(state, call) and is_alias and call.selector not in state.aliases


def _has_no_previous(state: State, call: Call) -> bool:
    is_known = call.selector in state.aliases.keys() - state.canaries.keys()
    return call.kind == "rollback" and is_known and call.selector not in state.previous


def _is_needed(state: State, call: Call) -> bool:
    """Whether an alias, a canary or a pin keeps the version that was to be deleted."""
    number = call.selector
    if call.kind != "delete" or not number.isdecimal() or not _has(state, number):
        return False
    is_named = int(number) in {*state.aliases.values(), *state.canaries.values()}
    is_last = len(state.versions) == 1
    return is_named or number in state.pins or (is_last and "" in state.pins)


def _lacks_pin(state: State, call: Call) -> bool:
    is_live = _is_live(state, call)
    return call.kind == "unpin" and is_live and call.selector not in state.pins


def _is_main(state: State, call: Call) -> bool:
    return call.kind == "canary" and state.aliases.get(call.selector) == call.version


_REFUSALS: dict[Reason, Callable[[State, Call], bool]] = {
    Reason.ADAPTER_NOT_FOUND: lambda state, call: not _is_live(state, call),
    Reason.ADAPTER_VERSION_NOT_FOUND: _lacks_version,
    Reason.ALIAS_NOT_FOUND: _lacks_alias,
    Reason.ALIAS_HAS_NO_PREVIOUS: _has_no_previous,
    Reason.ADAPTER_IN_USE: _is_needed,
    Reason.PIN_NOT_FOUND: _lacks_pin,
    Reason.INVALID_FIELD: _is_main,
}


def _is_live(state: State, call: Call) -> bool:
    """Whether there is such an adapter for this caller; requests are of the tenant "default"."""
    is_hidden = call.kind == "generate" and state.tenants and "default" not in state.tenants
    return bool(state.versions) and not is_hidden


def _has(state: State, number: str) -> bool:
    return int(number) in state.versions
