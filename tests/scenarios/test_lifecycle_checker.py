"""The checker of adapter histories lets good ones pass and finds each kind of bad one."""

from dataclasses import replace
from typing import Any

import pytest

from services.common.errors import Reason
from tests.support.lifecycle_history import Call, Kind, State, violations

S = 10**9
BEFORE = State(0, 0, {}, {}, {}, {}, frozenset())
# At 10 s version 1, at 20 s version 2, at 30 s prod is 1, at 40 s it is 2, at 50 s all is deleted.
STATES = [
    BEFORE,
    State(1, 10 * S, {1: "one"}, {}, {}, {}, frozenset()),
    State(2, 20 * S, {1: "one", 2: "two"}, {}, {}, {}, frozenset()),
    State(3, 30 * S, {1: "one", 2: "two"}, {"prod": 1}, {}, {}, frozenset()),
    State(4, 40 * S, {1: "one", 2: "two"}, {"prod": 2}, {}, {"prod": 1}, frozenset()),
    State(5, 50 * S, {}, {}, {}, {}, frozenset()),
]


def call(kind: Kind, begun_s: float, ended_s: float, selector: str = "", **answer: Any) -> Call:
    return Call(0, kind, selector, int(begun_s * S), int(ended_s * S), **answer)


CHANGES = [
    call("publish", 9, 11, version=1, digest="one"),
    call("publish", 19, 21, version=2, digest="two"),
    call("alias", 29, 31, "prod", version=1, revision=3),
    call("alias", 39, 41, "prod", version=2, revision=4),
    call("delete", 49, 51),
]
ONE: dict[str, Any] = {"version": 1, "digest": "one"}
TWO: dict[str, Any] = {"version": 2, "digest": "two"}


def found(*calls: Call, stale_s: float = 0.0, states: list[State] = STATES) -> list[str]:
    return violations(states, [*CHANGES, *calls], stale_s=stale_s, publishes_max=2)


@pytest.mark.parametrize(
    "fine",
    [
        call("generate", 12, 13, **ONE),
        call("generate", 19.5, 20.5, **ONE),  # while version 2 comes, either may answer
        call("generate", 19.5, 20.5, **TWO),
        call("generate", 22, 23, "1", **ONE),
        call("generate", 32, 42, "prod", **TWO),
        call("get", 32, 33, "prod", revision=3, **ONE),
        call("generate", 5, 6, reason=Reason.ADAPTER_NOT_FOUND),
        call("generate", 12, 13, "2", reason=Reason.ADAPTER_VERSION_NOT_FOUND),
        call("generate", 22, 23, "prod", reason=Reason.ALIAS_NOT_FOUND),
        call("generate", 48, 52, reason=Reason.ADAPTER_NOT_FOUND),
        call("rollback", 32, 33, "prod", reason=Reason.ALIAS_HAS_NO_PREVIOUS),
        call("delete", 32, 33, "1", reason=Reason.ADAPTER_IN_USE),
        call("unpin", 32, 33, "prod", reason=Reason.PIN_NOT_FOUND),
    ],
    ids=str,
)
def test_what_can_have_been_passes(fine: Call) -> None:
    assert found(fine) == []


@pytest.mark.parametrize(
    "wrong",
    [
        call("generate", 5, 6, **ONE),  # before it was there
        call("generate", 22, 23, **ONE),  # version 2 was the newest already
        call("generate", 12, 13, **TWO),  # not yet
        call("generate", 22, 23, version=2, digest="one"),  # another version's weights
        call("generate", 22, 23, "prod", **ONE),  # no such alias yet
        call("generate", 42, 43, "prod", **ONE),  # the alias has moved
        call("generate", 52, 53, "1", **ONE),  # deleted
        call("get", 42, 43, "prod", revision=3, **ONE),  # an old revision
        call("generate", 22, 23, reason=Reason.ADAPTER_NOT_FOUND),  # it was there
        call("generate", 22, 23, "2", reason=Reason.ADAPTER_VERSION_NOT_FOUND),
        call("generate", 32, 33, "prod", reason=Reason.ALIAS_NOT_FOUND),
        call("generate", 22, 23, reason=Reason.INTERNAL),  # explained by nothing
        call("rollback", 42, 43, "prod", reason=Reason.ALIAS_HAS_NO_PREVIOUS),
        call("delete", 22, 23, "1", reason=Reason.ADAPTER_IN_USE),  # nothing needed it
        call("delete", 22, 23, "1"),  # it is still there
        call("publish", 22, 23, version=3, digest="three"),  # there never was one
        call("pin", 22, 23, "2", revision=2),  # not in that revision
    ],
    ids=str,
)
def test_what_can_not_have_been_is_found(wrong: Call) -> None:
    assert len(found(wrong)) == 1


def test_a_mirror_may_be_behind_by_so_much_and_no_more() -> None:
    late = call("generate", 22, 23, **ONE)
    assert found(late, stale_s=1.5) == []
    assert len(found(late, stale_s=0.5)) == 1


def test_a_mirror_never_goes_back() -> None:
    new, old = call("generate", 22, 23, **TWO), call("generate", 23.5, 24, **ONE)
    assert found(new, stale_s=5) == []
    assert found(old, stale_s=5) == []
    assert len(found(new, old, stale_s=5)) == 1
    at_once = replace(old, begun_ns=int(22.5 * S))
    assert found(new, at_once, stale_s=5) == []


def test_a_publish_is_refused_for_others_only_while_there_are_as_many() -> None:
    crowded = call("publish", 19.5, 20.5, reason=Reason.TOO_MANY_REQUESTS)
    beside = call("publish", 18, 20, **TWO)
    assert len(found(crowded)) == 1
    assert found(crowded, beside) == []


def test_a_change_that_nobody_asked_for_is_found() -> None:
    extra = replace(STATES[5], revision=6, decided_ns=60 * S, versions={7: "seven"})
    assert len(found(states=[*STATES, extra])) == 1


def test_a_read_must_see_a_change_that_had_ended_before_it() -> None:
    swapped = call("get", 31.5, 32, "2", revision=2, **TWO)
    assert len(found(swapped)) == 1
