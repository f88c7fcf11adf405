"""Admission, placement, deadlines, cancellation and hints of the cluster machine."""

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest

from services.core.config import ClusterConfig
from services.core.costs import StepCosts
from services.core.decisions import (
    Abort,
    ClusterDecision,
    Dispatch,
    Forget,
    Prefetch,
    Reject,
    RejectReason,
    Return,
)
from services.core.events import RunningRequest
from services.core.policies.adaptive import Adaptive
from services.core.policies.fifo import Fifo
from services.core.queues import Outcome, Placer, Squashed
from services.core.tenants import TenantLimits, Tenants
from services.core.types import Adapter, Attempt, Request, Reserve, WorkerId
from tests.unit.core.core_world import (
    GATEWAY,
    QUIET,
    Scene,
    adapter,
    attempt,
    capacity,
    request,
    went,
)

W, V = WorkerId("w"), WorkerId("v")


def placed_at(decisions: list[ClusterDecision]) -> list[WorkerId]:
    return [one.worker_id for one in decisions if isinstance(one, Dispatch)]


def reasons(decisions: list[ClusterDecision]) -> list[RejectReason]:
    return [one.reason for one in decisions if isinstance(one, Reject)]


def test_a_request_that_fits_is_dispatched_at_once() -> None:
    assert Scene(W).submit(request("a")) == [went(W, "a")]


def test_a_queued_request_is_dispatched_when_memory_is_free_again() -> None:
    scene = Scene(W, limits=capacity(10))
    scene.submit(request("a", context=60, output=10), request("b", context=60, output=10))
    assert scene.waits(now=1.0) == {"b": "memory"}
    assert scene.finish(W, "a", now=2.5) == [went(W, "b", 2.5, waited_for="memory")]


def test_batch_slots_limit_what_is_dispatched() -> None:
    scene = Scene(W, limits=capacity(requests=1))
    scene.submit(request("a"), request("b"))
    assert scene.waits(now=1.0) == {"b": "batch_slots"}
    assert scene.finish(W, "a", now=1.0) == [went(W, "b", 1.0, waited_for="batch_slots")]


def test_an_adapter_in_use_needs_no_more_memory() -> None:
    scene = Scene(W, limits=capacity(12))
    big, other = adapter("big", blocks=8), adapter("other", blocks=3)
    decisions = scene.submit(
        request("a", using=big, output=5),
        request("b", using=big, output=5),
        request("c", using=other, output=5),
    )
    assert placed_at(decisions) == [W, W]
    assert scene.waits(now=0.0) == {"c": "memory"}


def test_memory_for_the_tokens_but_not_for_the_adapter_is_told_apart() -> None:
    scene = Scene(W, limits=capacity(12))
    scene.submit(request("a", context=50, output=10))
    scene.submit(request("b", using=adapter("big", blocks=5)), now=1.0)
    assert scene.waits(now=1.0) == {"b": "adapter"}
    assert scene.finish(W, "a", now=3.0) == [went(W, "b", 2.0, waited_for="adapter")]


def test_resident_adapters_that_nobody_uses_do_not_count() -> None:
    scene = Scene()
    scene.worker(W, limits=capacity(10), has=[adapter(f"idle{i}") for i in range(5)])
    assert scene.submit(request("a", context=80, output=20)) == [went(W, "a")]


# --- how much memory is promised -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("reserve", "blocks"),
    [(Reserve.PREDICTED, 3), (Reserve.QUANTILE, 6), (Reserve.MAX, 11)],
)
def test_the_reserve_rule_decides_how_much_output_is_promised(
    reserve: Reserve, blocks: int
) -> None:
    scene = Scene(W, config=replace(QUIET, reserve=reserve))
    scene.submit(request("a", context=10, output=20, output_q90=50, output_max=100))
    assert scene.cluster.snapshot(now=0.0).workers[0].reserved_blocks == blocks


def test_a_quantile_below_the_prediction_promises_the_prediction() -> None:
    config = replace(QUIET, reserve=Reserve.QUANTILE)
    scene = Scene(W, config=config)
    scene.submit(request("a", context=10, output=20, output_q90=5, output_max=100))
    assert scene.cluster.snapshot(now=0.0).workers[0].reserved_blocks == 3


def test_a_later_attempt_is_promised_only_the_output_that_is_left() -> None:
    scene = Scene(W)
    scene.submit(request("a", number=2, context=40, prior=30, output=50))
    assert scene.cluster.snapshot(now=0.0).workers[0].reserved_blocks == 6


# --- prompts that wait to be computed ------------------------------------------------------------

# Default costs: 0.2 ms per prompt token, so 500 tokens are the 0.1 s that a worker may have ahead.


def test_a_worker_with_enough_prompts_gets_nothing_until_one_is_computed() -> None:
    scene = Scene(W)
    assert placed_at(scene.submit(request("a", context=500), request("b"))) == [W]
    assert scene.waits(now=1.0) == {"b": "prefill"}
    assert scene.start(W, "a", now=1.0) == []
    assert scene.prefill(W, "a", now=2.0) == [went(W, "b", 2.0, waited_for="prefill")]


def test_a_backlog_just_below_the_bound_takes_one_more_prompt_however_long() -> None:
    scene = Scene(W)
    decisions = scene.submit(request("a", context=499), request("b", context=400), request("c"))
    assert placed_at(decisions) == [W, W]
    assert scene.prefill(W, "a", now=1.0) == [went(W, "c", 1.0, waited_for="prefill")]


def test_a_prompt_is_weighed_by_what_the_worker_measured() -> None:
    scene = Scene(W)
    slow = StepCosts(prefill_token_s=0.01, prefill_rank_token_s=0.0)
    scene.report(W, costs=slow)
    assert placed_at(scene.submit(request("a", context=10), request("b"))) == [W]
    scene.report(W)
    assert placed_at(scene.prefill(W, "a", now=1.0)) == [W]
    assert placed_at(scene.submit(request("c"), now=1.0)) == []


def test_a_rank_makes_a_prompt_longer() -> None:
    scene = Scene(W)  # 0.2 ms + 200 · 1 µs per token
    wide = adapter("wide", rank=200)
    scene.worker(W, has=[wide])
    assert placed_at(scene.submit(request("a", using=wide, context=251), request("b"))) == [W]


def test_a_prompt_that_waits_for_a_cold_adapter_holds_back_nobody_until_it_starts() -> None:
    scene = Scene(W)
    scene.submit(request("cold", using=adapter("x"), context=600))
    assert placed_at(scene.submit(request("b"))) == [W]
    scene.start(W, "cold", now=1.0)
    assert scene.submit(request("c"), now=1.0) == []
    assert scene.waits(now=1.0) == {"c": "prefill"}
    assert placed_at(scene.prefill(W, "cold", now=2.0)) == [W]


def test_a_prompt_whose_adapter_is_resident_counts_at_once() -> None:
    scene = Scene()
    scene.worker(W, has=[adapter("x")])
    decisions = scene.submit(request("warm", using=adapter("x"), context=600), request("b"))
    assert placed_at(decisions) == [W]


def test_starting_twice_or_after_the_prompt_counts_nothing_twice() -> None:
    scene = Scene(W)
    scene.submit(request("a", using=adapter("x"), context=600))
    scene.start(W, "a", now=1.0)
    scene.start(W, "a", now=1.0)
    scene.prefill(W, "a", now=2.0)
    scene.prefill(W, "a", now=2.0)
    scene.start(W, "a", now=2.0)
    assert placed_at(scene.submit(request("b"), now=2.0)) == [W]


def test_a_request_that_ends_before_its_first_token_leaves_no_backlog() -> None:
    scene = Scene(W)
    scene.submit(request("a", context=600), request("b"))
    scene.cancel("a", now=1.0)
    assert scene.waits(now=1.0) == {"b": "prefill"}
    assert placed_at(scene.finish(W, "a", now=2.0)) == [W]


def test_a_worker_that_comes_back_has_no_backlog_of_what_it_kept() -> None:
    scene = Scene(W)
    scene.submit(request("a", context=600), request("b"))
    scene.worker_leaves(W, now=1.0)
    again = RunningRequest(attempt("a"), GATEWAY, None, 600, 10)
    assert placed_at(scene.worker(W, again, now=2.0)) == [W]


def test_who_was_refused_memory_elsewhere_goes_when_the_busy_worker_has_computed() -> None:
    """The refusal stood for the one worker that was asked, not for the one that had prompts."""
    scene = Scene(V, limits=capacity(4))
    scene.worker(W)
    scene.submit(request("prompt", context=600), request("small"))
    assert scene.dispatched() == {V: 1, W: 1}
    assert scene.submit(request("large", context=50), now=1.0) == []
    assert scene.waits(now=1.0) == {"large": "memory"}
    assert scene.prefill(W, "prompt", now=2.0) == [went(W, "large", 1.0, waited_for="memory")]


def test_a_prompt_that_leaves_enough_behind_it_lets_nobody_in() -> None:
    scene = Scene(W, limits=capacity(200))
    scene.submit(request("a", context=450), request("b", context=600), request("c"))
    assert scene.dispatched() == {W: 2}
    assert scene.prefill(W, "a", now=1.0) == []
    assert placed_at(scene.prefill(W, "b", now=2.0)) == [W]


# --- what is sent at once -------------------------------------------------------------------------


def test_with_dispatches_ahead_everything_goes_to_the_shortest_queue() -> None:
    config = replace(QUIET, dispatches_ahead=True)
    scene = Scene(V, W, config=config, limits=capacity(10, requests=1))
    decisions = scene.submit(*[request(f"r{i}", context=80) for i in range(6)])
    assert placed_at(decisions) == [V, W, V, W, V, W]
    assert not scene.waits(now=1.0)


def test_with_dispatches_ahead_and_no_worker_requests_wait_for_one() -> None:
    scene = Scene(config=replace(QUIET, dispatches_ahead=True))
    assert scene.submit(request("a")) == []
    assert scene.waits(now=1.0) == {"a": "no_worker"}
    assert scene.worker(W, now=1.0) == [went(W, "a", 1.0, waited_for="no_worker")]


# --- which worker ---------------------------------------------------------------------------------


def test_a_worker_that_has_the_adapter_is_preferred() -> None:
    scene = Scene(V)
    scene.worker(W, limits=capacity(50), has=[adapter("a")])
    assert placed_at(scene.submit(request("r", using=adapter("a")))) == [W]
    assert placed_at(scene.submit(request("s", using=adapter("b")))) == [V]


def test_a_hot_adapter_spreads_where_the_load_bound_is_reached() -> None:
    scene = Scene(V, W)
    hot = adapter("hot")
    decisions = scene.submit(*[request(f"r{i}", using=hot) for i in range(10)])
    counts = [placed_at(decisions).count(worker) for worker in (V, W)]
    assert sum(counts) == 10
    assert max(counts) <= 7  # ceil(1.25 · 10 / 2)


def test_a_cold_adapter_stays_where_it_is() -> None:
    """While the load is even, every adapter's later requests go where its first one went."""
    scene = Scene(V, W)
    adapters = [adapter(f"a{index}") for index in range(4)]
    first = placed_at(
        scene.submit(*[request(f"{a.digest}-first", using=a, context=100) for a in adapters])
    )
    assert sorted(first) == [V, V, W, W]
    for worker_id, a in zip(first, adapters, strict=True):
        scene.start(worker_id, f"{a.digest}-first", now=1.0)
        scene.prefill(worker_id, f"{a.digest}-first", now=1.0)
        scene.finish(worker_id, f"{a.digest}-first", now=2.0)
    again = scene.submit(*[request(f"{a.digest}-again", using=a) for a in adapters], now=3.0)
    assert placed_at(again) == first


def test_a_request_goes_where_its_adapter_is_not_if_the_worker_that_has_it_is_full() -> None:
    scene = Scene(V)
    scene.worker(W, limits=capacity(3), has=[adapter("a", blocks=1)])
    decisions = scene.submit(*[request(f"r{i}", using=adapter("a", blocks=1)) for i in range(2)])
    assert placed_at(decisions) == [W, V]


def test_the_least_backlog_of_prompts_goes_before_the_most_memory() -> None:
    scene = Scene(V)
    scene.worker(W, limits=capacity(50))
    scene.submit(request("a", context=100))
    assert scene.dispatched() == {V: 1, W: 0}
    assert placed_at(scene.submit(request("b"))) == [W]


def test_the_oldest_of_equal_workers_is_chosen() -> None:
    assert placed_at(Scene(W, V).submit(request("a"))) == [W]


def test_an_adapter_stays_known_at_its_worker_after_its_request_started() -> None:
    scene = Scene(V, W)
    scene.submit(request("r", using=adapter("a")))
    scene.start(V, "r", now=0.0)
    scene.finish(V, "r", now=0.0)
    scene.submit(request("filler", context=100))
    assert placed_at(scene.submit(request("s", using=adapter("a")))) == [V]


# --- what memory will be free -------------------------------------------------------------------


class Asks(Fifo):
    """A fifo that keeps what the placer predicts for its first request."""

    def __init__(self) -> None:
        super().__init__()
        self.free_in_s: float | None = None
        self.learned: list[StepCosts] = []

    def take(self, place: Placer, *, now: float) -> Outcome:
        for head in list(self.upcoming())[:1]:
            self.free_in_s = place.free_in_s(head)
        return super().take(place, now=now)

    def learn(self, costs: StepCosts) -> None:
        super().learn(costs)
        self.learned.append(costs)


def test_memory_is_predicted_to_be_free_when_enough_requests_have_ended() -> None:
    policy = Asks()
    scene = Scene(W, policy=policy, limits=capacity(30))
    scene.submit(
        request("short", context=50, output=50),
        request("long", context=50, output=100),
        now=10.0,
    )
    assert policy.free_in_s == 0.0
    # 0.2 ms · 50 tokens of prompt, then 30 ms per token until one token took otherwise.
    scene.submit(request("next", context=80, output=20), now=11.0)
    assert policy.free_in_s == pytest.approx(10.0 + 0.01 + 50 * 0.03 - 11.0)
    scene.cancel("next", now=11.0)
    scene.submit(request("both", context=180, output=20), now=11.0)
    assert policy.free_in_s == pytest.approx(10.0 + 0.01 + 100 * 0.03 - 11.0)
    scene.cancel("both", now=11.0)
    scene.finish(W, "short", now=15.0, tokens=50)  # 0.1 s per token: a tenth of it is learned
    scene.submit(request("both", context=180, output=20), now=15.0)
    assert policy.free_in_s == 0.0  # by now the long one should have ended


def test_no_worker_means_no_prediction() -> None:
    policy = Asks()
    Scene(policy=policy).submit(request("a"))
    assert policy.free_in_s == math.inf


def test_costs_that_a_worker_reports_reach_the_policy() -> None:
    policy, costs = Asks(), StepCosts(step_s=0.5)
    scene = Scene(W, policy=policy)
    scene.report(W)
    assert policy.learned == []
    scene.report(W, costs=costs)
    scene.report(V, costs=StepCosts(step_s=9.0))
    assert policy.learned == [costs]


# --- rejection ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "limit"),
    [
        (request("context", context=1001), 1000),
        (request("memory", using=adapter(blocks=1), context=500, output=1, output_max=600), 990),
        (request("adapter", using=adapter(blocks=100)), 0),
    ],
)
def test_a_request_that_no_worker_could_ever_run_is_rejected(new: Request, limit: int) -> None:
    [reject] = Scene(W).submit(new)
    assert reject == Reject(GATEWAY, new.attempt, RejectReason.TOO_LARGE, None, limit)


def test_a_request_too_large_for_the_workers_that_come_later_is_rejected_then() -> None:
    scene = Scene()
    assert scene.submit(request("a", context=900)) == []
    [reject] = scene.worker(W, limits=capacity(10))
    assert reject == Reject(GATEWAY, attempt("a"), RejectReason.TOO_LARGE, None, 100)


def test_a_request_that_only_a_lost_worker_could_run_is_rejected_when_that_is_given_up() -> None:
    scene = Scene(V, limits=capacity(50))
    scene.worker(W, limits=capacity(10))
    scene.report(V, draining=True)
    assert scene.submit(request("a", context=300)) == []
    assert scene.worker_leaves(V, now=1.0) == []
    assert reasons(scene.tick(6.0)) == [RejectReason.TOO_LARGE]


def test_a_worker_that_comes_back_smaller_leaves_the_large_ones_without_hope() -> None:
    scene = Scene(V, limits=capacity(50, requests=1))
    scene.submit(request("runs", context=20), request("large", context=400))
    scene.worker_leaves(V, now=1.0)
    decisions = scene.worker(V, now=2.0, limits=capacity(20))
    assert reasons(decisions) == [RejectReason.TOO_LARGE]
    assert not scene.waits(now=2.0)


def test_a_full_queue_rejects_with_a_time_to_retry() -> None:
    scene = Scene(config=ClusterConfig(queue_limit=1, retry_after_s=7.0))
    [reject] = scene.submit(request("a"), request("b"))
    assert reject == Reject(GATEWAY, attempt("b"), RejectReason.QUEUE_FULL, 7.0)


def test_without_a_worker_requests_wait_a_while_and_are_rejected() -> None:
    scene = Scene()
    scene.submit(request("a"), now=1.0)
    scene.submit(request("b"), now=5.0)
    assert scene.cluster.next_deadline() == 31.0
    assert scene.tick(30.9) == []
    assert scene.tick(31.0) == [Reject(GATEWAY, attempt("a"), RejectReason.NO_WORKER, 2.0)]
    assert scene.cluster.next_deadline() == 35.0
    assert scene.waits(now=31.0) == {"b": "no_worker"}
    assert scene.worker(W, now=32.0) == [went(W, "b", 27.0, waited_for="no_worker")]


def test_the_wait_for_a_worker_starts_when_the_last_one_goes() -> None:
    scene = Scene(W, limits=capacity(requests=1))
    scene.submit(request("a"), request("b"))
    scene.worker_leaves(W, now=100.0)
    scene.tick(110.0)
    scene.tick(129.0)
    assert scene.waits(now=129.0) == {"b": "no_worker"}
    assert reasons(scene.tick(130.0)) == [RejectReason.NO_WORKER]


def test_a_draining_worker_gets_nothing_until_it_stops_draining() -> None:
    scene = Scene(W)
    scene.report(W, draining=True)
    assert scene.submit(request("a")) == []
    assert scene.report(W, now=1.0) == [went(W, "a", 1.0, waited_for="no_worker")]


def test_a_deadline_that_passes_in_the_queue_rejects() -> None:
    scene = Scene()
    scene.submit(request("a", deadline_s=3.0))
    assert scene.cluster.next_deadline() == 3.0
    assert scene.tick(3.0) == [Reject(GATEWAY, attempt("a"), RejectReason.DEADLINE, None)]


def test_a_deadline_that_has_passed_at_submission_rejects_at_once() -> None:
    decisions = Scene(W).submit(request("a", deadline_s=3.0), now=4.0)
    assert reasons(decisions) == [RejectReason.DEADLINE]


# A prompt of ten tokens takes 32 ms and nine more tokens 270 ms: 0.302 s before the deadline.


@pytest.mark.parametrize("has_worker", [True, False])
def test_who_can_no_longer_end_in_time_is_refused_before_it_is_late(*, has_worker: bool) -> None:
    scene = Scene(policy=Adaptive())
    if has_worker:
        scene.worker(W, limits=capacity(requests=1))
        scene.submit(request("runs"))
    scene.submit(request("a", deadline_s=10.0), request("b", deadline_s=10.0))
    assert scene.cluster.next_deadline() == pytest.approx(10.0 - 0.302)
    assert scene.tick(9.697) == []
    assert scene.tick(9.699) == [
        Reject(GATEWAY, attempt("a"), RejectReason.DEADLINE_UNREACHABLE, None),
        Reject(GATEWAY, attempt("b"), RejectReason.DEADLINE_UNREACHABLE, None),
    ]
    assert not scene.waits(now=9.699)


def test_a_request_that_could_never_have_ended_in_time_is_refused_at_once() -> None:
    scene = Scene(W, policy=Adaptive())
    decisions = scene.submit(request("a", output=100, deadline_s=1.0))
    assert reasons(decisions) == [RejectReason.DEADLINE_UNREACHABLE]
    assert scene.dispatched() == {W: 0}


# --- cancelled, superseded, repeated --------------------------------------------------------------


def test_cancelling_a_queued_request_forgets_it() -> None:
    scene = Scene()
    scene.submit(request("a"))
    assert scene.cancel("a", now=1.0) == [Forget(attempt("a"))]
    assert scene.cancel("a", now=1.0) == []


def test_a_cancelled_request_holds_its_memory_until_its_worker_has_ended_it() -> None:
    scene = Scene(W, limits=capacity(10))
    scene.submit(request("a", context=60), request("b", context=60))
    assert scene.cancel("a", now=1.0) == [Abort(W, attempt("a"), "client_cancelled")]
    assert scene.cancel("a", now=1.0) == []
    assert scene.finish(W, "a", now=2.0) == [went(W, "b", 2.0, waited_for="memory")]


def test_a_later_attempt_takes_the_place_of_a_queued_one() -> None:
    scene = Scene()
    scene.submit(request("a"))
    assert scene.submit(request("a", number=2)) == [Forget(attempt("a"))]
    assert scene.worker(W) == [went(W, "a", number=2, waited_for="no_worker")]


def test_a_later_attempt_aborts_a_dispatched_one() -> None:
    scene = Scene(W)
    scene.submit(request("a"))
    assert scene.submit(request("a", number=2)) == [
        Abort(W, attempt("a"), "superseded"),
        went(W, "a", number=2),
    ]
    assert scene.finish(W, "a", now=0.0) == []
    assert scene.dispatched() == {W: 1}


def test_known_and_older_attempts_are_ignored() -> None:
    scene = Scene()
    scene.submit(request("a", number=2))
    assert scene.submit(request("a", number=2)) == []
    assert scene.submit(request("a", number=1)) == [Forget(attempt("a", 1))]
    scene.worker(W)
    assert scene.submit(request("a", number=2)) == [Forget(attempt("a", 2))]
    assert scene.dispatched() == {W: 1}


def test_reports_about_unknown_requests_and_workers_change_nothing() -> None:
    scene = Scene(W)
    for worker_id in (V, W):
        assert scene.start(worker_id, "ghost", now=0.0) == []
        assert scene.prefill(worker_id, "ghost", now=0.0) == []
        assert scene.finish(worker_id, "ghost", now=0.0) == []
    assert scene.report(V) == []
    assert scene.worker_leaves(V, now=0.0) == []


# --- squashed -------------------------------------------------------------------------------------


class Squasher(Fifo):
    """A fifo that stops the attempts that it is told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.victims: list[Attempt] = []

    def take(self, place: Placer, *, now: float) -> Outcome:
        if self.victims:
            return Squashed(self.victims.pop(0))
        return super().take(place, now=now)


def squashing(*names: str) -> tuple[Scene, Squasher]:
    policy = Squasher()
    scene = Scene(W, policy=policy, limits=capacity(10))
    scene.submit(*[request(name, context=60, output=20) for name in names])
    return scene, policy


def test_a_squashed_request_is_stopped_and_comes_back_as_its_next_attempt() -> None:
    scene, policy = squashing("a", "b")
    policy.victims = [attempt("a")]
    assert scene.tick(1.0) == [
        Abort(W, attempt("a"), "squashed"),
        Return(GATEWAY, attempt("a"), W),
    ]
    again = request("a", number=2, context=65, prior=5, output=20)
    assert scene.submit(again, now=1.1) == []
    assert scene.dispatched() == {W: 1}  # it holds its memory until its worker has let it go
    assert scene.finish(W, "a", now=1.2) == [went(W, "a", 1.2 - 1.1, number=2, waited_for="memory")]


def test_a_squashed_request_that_ended_meanwhile_is_over() -> None:
    """Its worker had sent the last token: its gateway has everything and submits nothing."""
    scene, policy = squashing("a", "b")
    policy.victims = [attempt("a")]
    scene.tick(1.0)
    assert scene.finish(W, "a", now=1.0) == [went(W, "b", 1.0, waited_for="memory")]
    assert scene.finish(W, "a", now=1.1) == []
    assert scene.dispatched() == {W: 1}


def test_squashing_a_request_that_was_cancelled_meanwhile_adds_nothing() -> None:
    scene, policy = squashing("a", "b")
    scene.cancel("a", now=0.5)
    policy.victims = [attempt("a")]
    assert scene.tick(1.0) == []


def test_squashing_a_request_whose_next_attempt_is_here_touches_only_the_old_one() -> None:
    scene, policy = squashing("a")
    assert scene.submit(request("a", number=2)) == [
        Abort(W, attempt("a"), "superseded"),
        went(W, "a", number=2),
    ]
    policy.victims = [attempt("a")]
    assert scene.tick(1.0) == []
    policy.victims = [attempt("a", 2)]
    assert scene.tick(1.0) == [
        Abort(W, attempt("a", 2), "squashed"),
        Return(GATEWAY, attempt("a", 2), W),
    ]


def test_a_squashed_request_at_a_worker_that_is_away_is_returned_once() -> None:
    scene, policy = squashing("a", "b")
    scene.worker_leaves(W, now=1.0)
    policy.victims = [attempt("a")]
    assert scene.tick(2.0) == [Return(GATEWAY, attempt("a"), W)]
    announced = RunningRequest(attempt("a"), GATEWAY, None, 60, 20)
    assert scene.worker(W, announced, now=3.0, limits=capacity(10)) == [
        Abort(W, attempt("a"), "squashed")
    ]
    scene.worker_leaves(W, now=4.0)
    assert scene.tick(9.0) == []


# --- hints ----------------------------------------------------------------------------------------


def hinting(has: Iterable[Adapter] = ()) -> Scene:
    scene = Scene(config=ClusterConfig(prefetch_depth=2))
    scene.worker(W, limits=capacity(requests=1), has=has)
    scene.submit(request("running"))
    return scene


def prefetches(decisions: list[ClusterDecision]) -> list[tuple[Adapter, ...]]:
    return [decision.adapters for decision in decisions if isinstance(decision, Prefetch)]


def test_hints_name_the_adapters_that_the_queue_waits_for() -> None:
    scene = hinting(has=[adapter("here")])
    queued = [request(name, using=adapter(name)) for name in ("here", "x", "x2", "y", "z")]
    scene.submit(*queued[:1], now=1.0)
    scene.submit(*queued[1:], now=1.0)
    assert scene.cluster.next_deadline() == pytest.approx(1.05)
    assert prefetches(scene.tick(1.05)) == [(adapter("here"), adapter("x"))]  # it is to stay


def test_hints_are_sent_only_when_they_change_and_withdrawn_at_the_end() -> None:
    scene = hinting()
    assert prefetches(scene.submit(request("r", using=adapter("x")), now=1.0)) == [(adapter("x"),)]
    assert prefetches(scene.submit(request("s", using=adapter("x")), now=2.0)) == []
    assert prefetches(scene.cancel("s", now=3.0)) == []
    assert prefetches(scene.cancel("r", now=4.0)) == [()]


def test_hints_spread_over_workers_and_stay_where_they_are() -> None:
    scene = Scene(V, W, config=ClusterConfig(prefetch_depth=4), limits=capacity(requests=1))
    scene.submit(request("r0"), request("r1"))
    [hint] = scene.submit(request("x", using=adapter("x", blocks=5)), now=1.0)
    assert hint == Prefetch(V, (adapter("x", blocks=5),))
    [hint] = scene.submit(request("y", using=adapter("y", blocks=5)), now=2.0)
    assert hint == Prefetch(W, (adapter("y", blocks=5),))
    assert placed_at(scene.finish(W, "r1", now=3.0)) == [W]


# --- the report -----------------------------------------------------------------------------------


def test_the_snapshot_shows_queues_workers_and_why_the_oldest_wait() -> None:
    scene = Scene(W, policy=Adaptive(), limits=capacity(10))
    scene.submit(
        request("a", context=60), request("b", context=60), request("c", context=70, arrived_s=2.0)
    )
    snapshot = scene.cluster.snapshot(now=4.0)
    assert snapshot.policy == "adaptive"
    assert snapshot.gateways == 1
    assert [(w.worker_id, w.dispatched, w.reserved_blocks) for w in snapshot.workers] == [(W, 1, 7)]
    assert [(q.request_id, q.queue, q.waited_s, q.waits_for) for q in snapshot.queued] == [
        ("b", "large", 4.0, "memory"),
        ("c", "large", 4.0, "order"),
    ]
    assert [(queue.name, queue.length, queue.oldest_s) for queue in snapshot.queues] == [
        ("small", 0, 0.0),
        ("medium", 0, 0.0),
        ("large", 2, 4.0),
    ]


def test_who_waited_for_its_tenants_quota_alone_is_told_so() -> None:
    tenants = Tenants(default=TenantLimits(max_running=1))
    scene = Scene(W, config=replace(QUIET, tenants=tenants), limits=capacity(10))
    scene.submit(request("a"), request("b", context=50), request("other", tenant="u", context=60))
    assert scene.waits(now=1.5) == {"b": "tenant"}
    assert scene.finish(W, "a", now=2.0) == []
    assert scene.waits(now=2.0) == {"b": "memory"}
    assert scene.finish(W, "other", now=3.0) == [went(W, "b", 3.0, waited_for="memory")]
    scene.submit(request("c"), now=3.5)
    assert scene.finish(W, "b", now=4.0) == [went(W, "c", 0.5, waited_for="tenant")]


def test_what_a_request_waited_for_last_is_told_with_its_dispatch() -> None:
    scene = Scene(W, policy=Adaptive(), limits=capacity(10, requests=2))
    scene.submit(*[request(name, context=40, arrived_s=0.1 * i) for i, name in enumerate("abcd")])
    assert scene.waits(now=0.5) == {"c": "batch_slots", "d": "order"}
    assert scene.worker(V, now=1.0, limits=capacity(12)) == [
        went(V, "c", 1.0, queue="large", waited_for="batch_slots"),
        went(V, "d", 1.0, queue="large", waited_for="order"),
    ]
