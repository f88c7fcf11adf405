"""Policies with one order: fifo, sjf, aged_sjf, edf."""

import math
from collections.abc import Callable

import pytest

from services.core.costs import StepCosts
from services.core.ledger import Fit
from services.core.policies.edf import Edf, EdfConfig
from services.core.policies.fifo import Fifo, FifoConfig
from services.core.policies.sjf import AgedSjf, AgedSjfConfig, Sjf, SjfConfig
from services.core.queues import QueuePolicy
from tests.unit.core.core_world import adapter, request
from tests.unit.core.policy_world import Answers, drain, push, take_all

COSTS = StepCosts(
    step_s=0.0,
    prefill_s=0.0,
    prefill_token_s=0.01,
    prefill_rank_token_s=0.0,
    decode_sequence_s=0.1,
    decode_rank_s=0.0,
    cached_token_s=0.0,
)


def test_fifo_goes_by_priority_then_those_that_come_back_then_arrival() -> None:
    policy = Fifo()
    push(policy, request("second", arrived_s=2.0), request("first", arrived_s=1.0))
    push(policy, request("back", number=2, arrived_s=3.0), request("urgent", priority=5))
    assert drain(policy) == ["urgent", "back", "first", "second"]
    assert len(policy) == 0


def test_equal_requests_leave_as_they_came() -> None:
    policy = Fifo()
    push(policy, *[request(f"r{index}") for index in range(5)])
    assert drain(policy) == [f"r{index}" for index in range(5)]


def test_fifo_waits_for_its_head() -> None:
    policy = Fifo()
    push(policy, request("large", context=500), request("small"))
    assert drain(policy, Answers(lambda asked: asked.context_tokens < 100)) == []
    (queue,) = policy.queues(now=3.0)
    assert (queue.name, queue.length, queue.oldest_s) == ("fifo", 2, 3.0)
    assert policy.held_by(request("large").attempt.request_id, now=3.0) is None
    assert policy.held_by(request("small").attempt.request_id, now=3.0) == "order"


def test_a_head_that_does_not_fit_is_passed_a_bounded_number_of_times() -> None:
    policy = Fifo(FifoConfig(bypasses=2))
    push(policy, request("large", context=500), *[request(f"r{index}") for index in range(4)])
    assert policy.held_by(request("r1").attempt.request_id, now=0.0) is None
    small = Answers(lambda asked: asked.context_tokens < 100)
    assert drain(policy, small) == ["r0", "r1"]
    assert policy.held_by(request("r2").attempt.request_id, now=0.0) == "order"
    assert drain(policy) == ["large", "r2", "r3"]


@pytest.mark.parametrize("fit", [Fit.BATCH_SLOTS, Fit.PREFILL])
def test_nobody_else_is_asked_when_no_worker_takes_anyone(fit: Fit) -> None:
    policy = Fifo(FifoConfig(bypasses=8))
    push(policy, request("a"), request("b"))
    place = Answers(lambda _: fit)
    assert drain(policy, place) == []
    assert place.asked == ["a"]


def test_nobody_is_asked_again_before_something_has_changed() -> None:
    policy = Fifo()
    push(policy, request("large", context=500, arrived_s=1.0))
    place = Answers(lambda asked: asked.context_tokens < 100)
    assert drain(policy, place) == drain(policy, place) == []
    assert place.asked == ["large"]
    push(policy, request("earlier", arrived_s=0.5))
    assert drain(policy, place) == ["earlier"]
    assert drain(policy) == ["large"]


def test_what_a_request_waited_for_is_told() -> None:
    policy = Fifo()
    push(policy, request("a"), request("b"))
    assert [taken.waited_for for taken in take_all(policy)] == ["nothing", "nothing"]
    push(policy, request("a"), request("b"))
    take_all(policy, Answers(lambda _: Fit.ADAPTER), now=1.0)
    told = take_all(policy, now=2.0)
    assert [(taken.queue, taken.waited_for) for taken in told] == [
        ("fifo", "adapter"),
        ("fifo", "order"),
    ]


def test_a_removed_request_is_not_taken() -> None:
    policy = Sjf()
    push(policy, request("a"), request("b"), request("c"))
    policy.remove(request("b").attempt.request_id)
    assert drain(policy) == ["a", "c"]


def test_sjf_goes_by_what_is_left_of_the_predicted_output() -> None:
    policy = Sjf()
    push(policy, request("long", output=300), request("short", output=20, context=900))
    push(policy, request("nearly done", number=2, output=300, prior=290))
    assert drain(policy) == ["nearly done", "short", "long"]


def test_sjf_by_service_counts_the_prompt() -> None:
    policy = Sjf(SjfConfig(by="service_s"))
    policy.learn(COSTS)
    push(policy, request("chat", context=10, output=40), request("read", context=900, output=20))
    assert drain(policy) == ["chat", "read"]  # 0.1 + 4 s, 9 + 2 s


def test_a_short_job_passes_a_long_one_unless_it_comes_much_later() -> None:
    policy = AgedSjf(AgedSjfConfig(services=8.0))
    policy.learn(COSTS)
    push(policy, request("long", context=100, output=40))  # 5 s: its time is 40
    push(policy, request("short", context=100, output=10, arrived_s=20.0))  # 2 s: 36
    push(policy, request("late", context=100, output=10, arrived_s=25.0))  # 41
    assert drain(policy) == ["short", "long", "late"]


def test_relative_ageing_is_fifo_among_equals_and_counts_rank() -> None:
    policy = AgedSjf()
    policy.learn(StepCosts(prefill_rank_token_s=1e-4))
    push(policy, request("wide", using=adapter(rank=128), context=100))
    push(policy, request("second", context=100, arrived_s=0.2))
    push(policy, request("first", context=100, arrived_s=0.1))
    assert drain(policy) == ["first", "second", "wide"]


def test_a_request_keeps_the_key_it_was_queued_by() -> None:
    policy = AgedSjf()
    policy.learn(COSTS)
    push(policy, request("long", output=40), request("short", output=10))
    policy.learn(StepCosts())
    policy.check_integrity()
    assert drain(policy) == ["short", "long"]


def test_edf_goes_by_priority_then_deadline_and_gives_the_rest_a_default() -> None:
    policy = Edf(EdfConfig(default_slo_s=60.0))
    push(policy, request("none", arrived_s=0.0), request("late", deadline_s=61.0))
    push(policy, request("soon", arrived_s=5.0, deadline_s=20.0), request("never", deadline_s=1e9))
    push(policy, request("urgent", priority=1, deadline_s=500.0))
    assert drain(policy) == ["urgent", "soon", "none", "late", "never"]


@pytest.mark.parametrize("make", [Fifo, Sjf, AgedSjf, Edf])
def test_an_empty_policy_has_nothing_to_give(make: Callable[[], QueuePolicy]) -> None:
    policy = make()
    assert policy.take(Answers(), now=1.0) is None
    assert policy.next_deadline(now=1.0) is None
    assert [queue.oldest_s for queue in policy.queues(now=1.0)] == [0.0]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_constant_that_cannot_work_is_refused_by_name(bad: float) -> None:
    with pytest.raises(ValueError, match="services must be positive"):
        AgedSjfConfig(services=bad)
    with pytest.raises(ValueError, match="default_slo_s must be positive"):
        EdfConfig(default_slo_s=bad)


@pytest.mark.parametrize("bad", [-1, 64])
def test_a_number_of_bypasses_that_cannot_be_looked_at_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match="bypasses must be from 0 to 63"):
        Sjf(SjfConfig(bypasses=bad))
