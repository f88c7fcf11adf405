"""The order in which requests leave the queue, without any worker."""

import pytest

from services.core.config import MultilevelConfig
from services.core.multilevel import size_of
from services.core.policies import build_policy
from services.core.queues import Place, QueuePolicy
from services.core.types import Request
from tests.unit.core.core_world import adapter, attempt, request

LEVELS = MultilevelConfig(
    cutoffs=(100.0, 1000.0), shares=(1.0, 1.0, 2.0), bypasses=2, starvation_s=10.0
)


def multilevel(pool_tokens: int = 4000) -> QueuePolicy:
    policy = build_policy("multilevel", multilevel=LEVELS)
    policy.resize(pool_tokens)
    return policy


def yes(_: Request) -> bool:
    return True


def drain(policy: QueuePolicy, place: Place = yes, *, now: float = 0.0) -> list[str]:
    """Names in the order in which they are taken."""
    names: list[str] = []
    while (taken := policy.take(place, now=now)) is not None:
        names.append(taken.attempt.request_id)
        policy.check_integrity()
    return names


def push(
    policy: QueuePolicy,
    *names: str,
    now: float = 0.0,
    number: int = 1,
    context: int = 10,
    output: int = 10,
    priority: int = 0,
) -> None:
    for name in names:
        new = request(name, number=number, context=context, output=output, priority=priority)
        policy.push(new, now=now)


@pytest.mark.parametrize("name", ["fifo", "multilevel"])
def test_arrival_decides_within_priority_and_resubmitted_requests_go_first(name: str) -> None:
    policy = build_policy(name)
    policy.resize(10_000)
    push(policy, "first", "second")
    push(policy, "urgent", priority=5)
    push(policy, "back", number=2)
    assert drain(policy) == ["urgent", "back", "first", "second"]
    assert len(policy) == 0


@pytest.mark.parametrize("name", ["fifo", "multilevel"])
def test_a_removed_request_is_not_taken(name: str) -> None:
    policy = build_policy(name)
    policy.resize(10_000)
    push(policy, "a", "b", "c")
    policy.remove(request("b").attempt.request_id)
    policy.check_integrity()
    assert drain(policy) == ["a", "c"]


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown queue policy 'lifo', have multilevel, fifo"):
        build_policy("lifo")


def test_fifo_waits_for_its_head() -> None:
    policy = build_policy("fifo")
    push(policy, "large", context=500)
    push(policy, "small")
    assert drain(policy, lambda r: r.context_tokens < 100) == []
    assert [entry.length for entry in policy.queues(now=3.0)] == [2]
    assert policy.queues(now=3.0)[0].oldest_s == 3.0


def test_size_weighs_prompt_output_and_rank() -> None:
    config = MultilevelConfig(prompt_weight=1.0, output_weight=2.0, cells_per_rank=4.0)
    assert size_of(request("a", context=100, output=50), config) == 200
    assert size_of(request("a", using=adapter(rank=16), context=100, output=50), config) == 264


def test_requests_queue_at_the_level_of_their_size() -> None:
    policy = multilevel()
    push(policy, "small", context=10)
    push(policy, "medium", context=400)
    push(policy, "large", context=3000)
    assert [entry.length for entry in policy.queues(now=0.0)] == [1, 1, 1]
    assert policy.queue_of(request("medium").attempt.request_id) == "level-1"
    assert [r.attempt.request_id for r in policy.upcoming()] == ["small", "medium", "large"]


def test_small_requests_go_before_large_ones_that_came_earlier() -> None:
    policy = multilevel()
    push(policy, "large", context=1500)
    push(policy, "small", context=10)
    assert drain(policy) == ["small", "large"]


def test_a_level_stops_at_its_quota_while_others_have_requests_waiting() -> None:
    policy = multilevel(4000)  # quotas 1000, 1000, 2000
    push(policy, *[f"medium{i}" for i in range(4)], context=440, output=10)
    push(policy, "large", context=1500, output=10)
    refuse_large = drain(policy, lambda r: r.context_tokens < 1000)
    assert refuse_large == ["medium0", "medium1", "medium2", "medium3"]  # small's quota is lent

    policy = multilevel(4000)
    push(policy, *[f"medium{i}" for i in range(4)], context=440, output=10)
    push(policy, "large", context=1500, output=10)
    push(policy, "small", context=10, output=10)
    only_medium = drain(policy, lambda r: r.context_tokens == 440)
    assert only_medium == ["medium0", "medium1"]  # small and large keep theirs


def test_an_empty_level_lends_no_more_than_it_has_and_is_never_debited() -> None:
    policy = multilevel(4000)
    push(policy, *[f"medium{i}" for i in range(12)], context=440, output=10)
    taken = drain(policy)
    assert len(taken) == 8  # 8 · 450 tokens of 4000: its own and all that is lent
    policy.release(attempt(taken[0]))
    assert drain(policy) == ["medium8"]
    push(policy, "small")
    assert drain(policy) == ["small"]  # its own quota is its own


def test_what_is_lent_to_one_level_is_not_lent_to_another() -> None:
    policy = multilevel(4000)
    push(policy, *[f"medium{i}" for i in range(4)], context=440, output=10)
    assert len(drain(policy)) == 4  # 800 tokens more than its quota
    push(policy, "large", "large too", context=1400, output=10)
    assert drain(policy) == ["large"]  # the second lacks 820, and small has 200 left to lend


def test_a_level_that_has_nothing_out_may_run_one_request_beyond_its_quota() -> None:
    policy = multilevel(100)
    push(policy, "huge", "huge too", context=5000)
    push(policy, "small", context=10)
    assert drain(policy) == ["small", "huge"]


def test_younger_ones_pass_a_head_that_does_not_fit_but_not_for_ever() -> None:
    policy = multilevel(100_000)
    push(policy, "head", context=90, output=1)
    push(policy, "a", "b", "c", "d", context=10, output=1)
    assert drain(policy, lambda r: r.context_tokens < 50) == ["a", "b"]
    assert drain(policy) == ["head", "c", "d"]


def test_a_blocked_level_does_not_block_the_others() -> None:
    policy = multilevel(100_000)
    push(policy, "head", context=90, output=1)
    push(policy, "a", "b", "c", context=10, output=1)
    push(policy, "medium", context=500, output=1)
    assert drain(policy, lambda r: r.context_tokens != 90) == ["a", "b", "medium"]


def test_a_request_that_waited_too_long_goes_first_whatever_its_size_and_priority() -> None:
    policy = multilevel(4000)
    push(policy, "old", context=3000, priority=-1)
    push(policy, "young", "younger", context=10, priority=9, now=8.0)
    assert policy.next_deadline(now=8.0) == 10.0
    assert drain(policy, now=10.0) == ["old", "young", "younger"]


def test_a_starving_request_is_passed_a_bounded_number_of_times() -> None:
    policy = multilevel(100_000)
    push(policy, "old", context=3000)
    push(policy, *[f"young{i}" for i in range(9)], context=10, output=1, now=8.0)
    assert drain(policy, lambda r: r.context_tokens < 100, now=10.0) == ["young0", "young1"]
    assert policy.next_deadline(now=10.0) is None
    assert drain(policy, now=11.0)[0] == "old"
