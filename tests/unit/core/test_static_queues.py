"""Queues with fixed cut-offs and equal quotas."""

import math

import pytest

from services.core.policies.static import StaticConfig, StaticQueues
from services.core.types import Request
from tests.unit.core.core_world import attempt, request
from tests.unit.core.policy_world import Answers, drain, pool_size, push

CUTOFFS = (100.0, 1000.0)


def queues(kv_tokens: int = 3000, *, lends: bool = True) -> StaticQueues:
    policy = StaticQueues(StaticConfig(cutoffs=CUTOFFS, lends=lends))
    policy.resize(pool_size(kv_tokens))
    return policy


def sized(name: str, tokens: int) -> Request:
    """Needs so many tokens of KV cache."""
    return request(name, context=tokens - 10, output=10)


def test_requests_queue_by_size_and_a_cutoff_belongs_to_the_queue_above_it() -> None:
    policy = queues()
    push(policy, sized("a", 99), sized("b", 100), sized("c", 999), sized("d", 1000))
    names = [policy.queue_of(one.request_id) for one in map(attempt, "abcd")]
    assert names == ["size-0", "size-1", "size-1", "size-2"]
    shown = [(one.length, one.size_limit, one.quota_tokens) for one in policy.queues(now=2.0)]
    assert shown == [(1, 100.0, 1000.0), (2, 1000.0, 1000.0), (1, None, 1000.0)]
    assert [one.oldest_s for one in policy.queues(now=2.0)] == [2.0, 2.0, 2.0]


def test_small_requests_go_before_large_ones_that_came_earlier() -> None:
    policy = queues()
    push(policy, sized("large", 1000), sized("small", 50))
    assert drain(policy) == ["small", "large"]


def test_a_blocked_queue_does_not_block_the_others() -> None:
    policy = queues()
    push(policy, sized("a", 90), sized("b", 20), sized("c", 500))
    assert drain(policy, Answers(lambda asked: asked.context_tokens != 80)) == ["c"]


def test_without_lending_a_queue_stops_at_its_quota() -> None:
    policy = queues(lends=False)
    push(policy, *[sized(f"m{index}", 400) for index in range(4)])
    assert drain(policy) == ["m0", "m1"]
    assert policy.held_by(attempt("m2").request_id, now=0.0) == "quota"
    assert policy.held_by(attempt("m3").request_id, now=0.0) == "order"
    assert policy.queues(now=0.0)[1].used_tokens == 800
    policy.release(attempt("m0"), now=1.0)
    assert drain(policy, now=1.0) == ["m2"]


def test_an_empty_queue_lends_what_it_has_left_and_no_more() -> None:
    policy = queues()
    push(policy, *[sized(f"m{index}", 400) for index in range(9)])
    assert len(drain(policy)) == 7  # 2,800 of 3,000
    push(policy, sized("small", 50))
    assert drain(policy) == ["small"]


def test_a_queue_with_requests_lends_nothing() -> None:
    policy = queues()
    push(policy, *[sized(f"m{index}", 400) for index in range(9)], sized("l0", 1000))
    only_medium = Answers(lambda asked: asked.context_tokens == 390)
    assert len(drain(policy, only_medium)) == 5  # its own 1,000 and the 1,000 of the smallest


def test_what_is_lent_to_one_queue_is_not_lent_to_another() -> None:
    policy = queues()
    push(policy, *[sized(f"m{index}", 400) for index in range(4)])
    assert len(drain(policy)) == 4  # 600 borrowed
    push(policy, sized("l0", 1000), sized("l1", 1000))
    assert drain(policy) == ["l0"]  # the second lacks 1,000; 400 are left to lend


def test_a_queue_with_nothing_out_may_run_one_request_beyond_its_quota() -> None:
    policy = queues(300)
    push(policy, sized("huge", 5000), sized("huge too", 5000))
    assert drain(policy) == ["huge"]
    policy.release(attempt("huge"), now=1.0)
    assert drain(policy, now=1.0) == ["huge too"]


def test_another_measure_of_size_may_be_given() -> None:
    policy = StaticQueues(StaticConfig(cutoffs=(0.5,), size=lambda one: one.context_tokens / 100))
    push(policy, sized("small", 50), sized("large", 90))
    assert [one.length for one in policy.queues(now=0.0)] == [1, 1]


@pytest.mark.parametrize("bad", [(5.0, 5.0), (5.0, 3.0), (0.0, 3.0), (-1.0,), (math.nan,)])
def test_cutoffs_that_cannot_be_are_refused(bad: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="cutoffs"):
        StaticConfig(cutoffs=bad)
