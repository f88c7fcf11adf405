"""Admission, placement, deadlines, cancellation and hints of the cluster machine."""

from collections.abc import Iterable

import pytest

from services.core.cluster import ClusterConfig, ClusterScheduler
from services.core.decisions import (
    Abort,
    ClusterDecision,
    Dispatch,
    Forget,
    Prefetch,
    Reject,
    RejectReason,
)
from services.core.events import (
    GatewayAttached,
    RequestCancelled,
    RequestFinished,
    RequestStarted,
    RequestSubmitted,
    ResidentAdapter,
    WorkerAttached,
    WorkerDetached,
    WorkerReported,
)
from services.core.policies import build_policy
from services.core.types import Adapter, Capacity, Request, WorkerId
from tests.unit.core.core_world import GATEWAY, adapter, attempt, capacity, request

W, V = WorkerId("w"), WorkerId("v")
QUIET = ClusterConfig(prefetch_depth=0)


def build(
    *workers: WorkerId,
    config: ClusterConfig = QUIET,
    policy: str = "multilevel",
    limits: Capacity | None = None,
) -> ClusterScheduler:
    cluster = ClusterScheduler(config, build_policy(policy))
    cluster.handle(GatewayAttached(GATEWAY, ()), now=0.0)
    for worker_id in workers:
        attach(cluster, worker_id, limits=limits)
    return cluster


def attach(
    cluster: ClusterScheduler,
    worker_id: WorkerId,
    *,
    limits: Capacity | None = None,
    now: float = 0.0,
    has: Iterable[Adapter] = (),
) -> list[ClusterDecision]:
    resident = tuple(ResidentAdapter(one.digest, 2, 0) for one in has)
    event = WorkerAttached(worker_id, limits or capacity(), (), resident, draining=False)
    return cluster.handle(event, now=now)


def submit(
    cluster: ClusterScheduler, *requests: Request, now: float = 0.0
) -> list[ClusterDecision]:
    decisions: list[ClusterDecision] = []
    for new in requests:
        decisions += cluster.handle(RequestSubmitted(new), now=now)
        cluster.check_integrity()
    return decisions


def finish(
    cluster: ClusterScheduler, worker_id: WorkerId, name: str, *, now: float = 0.0
) -> list[ClusterDecision]:
    event = RequestFinished(worker_id, attempt(name), 1)
    decisions = cluster.handle(event, now=now)
    cluster.check_integrity()
    return decisions


def placed_at(decisions: list[ClusterDecision]) -> list[WorkerId]:
    return [one.worker_id for one in decisions if isinstance(one, Dispatch)]


def reasons(decisions: list[ClusterDecision]) -> list[RejectReason]:
    return [one.reason for one in decisions if isinstance(one, Reject)]


def test_a_request_that_fits_is_dispatched_at_once() -> None:
    cluster = build(W)
    assert submit(cluster, request("a")) == [Dispatch(W, attempt("a"), 0.0)]


def test_a_queued_request_is_dispatched_when_memory_is_free_again() -> None:
    cluster = build(W, limits=capacity(10))
    submit(cluster, request("a", context=60, output=10), request("b", context=60, output=10))
    assert cluster.snapshot(now=1.0).queued[0].waits_for == "memory"
    assert finish(cluster, W, "a", now=2.5) == [Dispatch(W, attempt("b"), 2.5)]


def test_batch_slots_limit_what_is_dispatched() -> None:
    cluster = build(W, limits=capacity(requests=1))
    submit(cluster, request("a"), request("b"))
    assert cluster.snapshot(now=1.0).queued[0].waits_for == "batch_slots"
    assert finish(cluster, W, "a") == [Dispatch(W, attempt("b"), 0.0)]


def test_an_adapter_in_use_needs_no_more_memory() -> None:
    cluster = build(W, limits=capacity(12))
    big, other = adapter("big", blocks=8), adapter("other", blocks=3)
    decisions = submit(
        cluster, request("a", using=big), request("b", using=big), request("c", using=other)
    )
    assert placed_at(decisions) == [W, W]
    assert cluster.snapshot(now=0.0).queued[0].request_id == "c"


def test_resident_adapters_that_nobody_uses_do_not_count() -> None:
    cluster = build()
    attach(cluster, W, limits=capacity(10), has=[adapter(f"idle{i}") for i in range(5)])
    assert submit(cluster, request("a", context=80, output=20)) == [Dispatch(W, attempt("a"), 0.0)]


def test_a_worker_that_has_the_adapter_is_preferred() -> None:
    cluster = build(V)
    attach(cluster, W, limits=capacity(50), has=[adapter("a")])
    assert placed_at(submit(cluster, request("r", using=adapter("a")))) == [W]
    assert placed_at(submit(cluster, request("s", using=adapter("b")))) == [V]


def test_affinity_ends_where_the_load_bound_is_reached() -> None:
    cluster = build(V, W)
    hot = adapter("hot")
    decisions = submit(cluster, *[request(f"r{i}", using=hot) for i in range(10)])
    counts = [placed_at(decisions).count(worker) for worker in (V, W)]
    assert sum(counts) == 10
    assert max(counts) <= 7  # ceil(1.25 · 10 / 2)


def test_equal_workers_are_chosen_by_id() -> None:
    assert placed_at(submit(build(W, V), request("a"))) == [V]


@pytest.mark.parametrize(
    "new",
    [
        request("context", context=1001),
        request("memory", using=adapter(blocks=1), context=500, output=1, output_max=600),
        request("adapter", using=adapter(blocks=100)),
    ],
)
def test_a_request_that_no_worker_could_ever_run_is_rejected(new: Request) -> None:
    cluster = build(W)
    [reject] = submit(cluster, new)
    assert reject == Reject(GATEWAY, new.attempt, RejectReason.TOO_LARGE, None)


def test_a_request_too_large_for_the_workers_that_come_later_is_rejected_then() -> None:
    cluster = build()
    assert submit(cluster, request("a", context=900)) == []
    [reject] = attach(cluster, W, limits=capacity(10))
    assert reject == Reject(GATEWAY, attempt("a"), RejectReason.TOO_LARGE, None)
    cluster.check_integrity()


def test_a_request_that_only_a_lost_worker_could_run_is_rejected_when_that_is_given_up() -> None:
    cluster = build()
    attach(cluster, V, limits=capacity(50))
    attach(cluster, W, limits=capacity(10))
    cluster.handle(WorkerReported(V, (), draining=True), now=0.0)
    assert submit(cluster, request("a", context=300)) == []
    assert cluster.handle(WorkerDetached(V), now=1.0) == []
    assert reasons(cluster.tick(now=6.0)) == [RejectReason.TOO_LARGE]
    cluster.check_integrity()


def test_a_full_queue_rejects_with_a_time_to_retry() -> None:
    cluster = build(config=ClusterConfig(queue_limit=1, retry_after_s=7.0))
    [reject] = submit(cluster, request("a"), request("b"))
    assert reject == Reject(GATEWAY, attempt("b"), RejectReason.QUEUE_FULL, 7.0)


def test_without_a_worker_requests_wait_a_while_and_are_rejected() -> None:
    cluster = build(policy="fifo")
    submit(cluster, request("a"), now=1.0)
    submit(cluster, request("b"), now=5.0)
    assert cluster.next_deadline() == 31.0
    assert cluster.tick(now=30.9) == []
    assert cluster.tick(now=31.0) == [Reject(GATEWAY, attempt("a"), RejectReason.NO_WORKER, 2.0)]
    assert cluster.next_deadline() == 35.0
    assert cluster.snapshot(now=31.0).queued[0].waits_for == "no_worker"
    assert attach(cluster, W, now=32.0) == [Dispatch(W, attempt("b"), 27.0)]


def test_the_wait_for_a_worker_starts_when_the_last_one_goes() -> None:
    cluster = build(W, limits=capacity(requests=1))
    submit(cluster, request("a"), request("b"))
    cluster.handle(WorkerDetached(W), now=100.0)
    cluster.tick(now=110.0)
    cluster.tick(now=129.0)
    assert cluster.snapshot(now=129.0).queued[0].request_id == "b"
    assert reasons(cluster.tick(now=130.0)) == [RejectReason.NO_WORKER]


def test_a_draining_worker_gets_nothing_until_it_stops_draining() -> None:
    cluster = build(W)
    cluster.handle(WorkerReported(W, (), draining=True), now=0.0)
    assert submit(cluster, request("a")) == []
    [dispatch] = cluster.handle(WorkerReported(W, (), draining=False), now=1.0)
    assert dispatch == Dispatch(W, attempt("a"), 1.0)


def test_a_deadline_that_passes_in_the_queue_rejects() -> None:
    cluster = build()
    submit(cluster, request("a", deadline_s=3.0))
    assert cluster.next_deadline() == 3.0
    assert cluster.tick(now=3.0) == [Reject(GATEWAY, attempt("a"), RejectReason.DEADLINE, None)]
    cluster.check_integrity()


def test_a_deadline_that_has_passed_at_submission_rejects_at_once() -> None:
    decisions = submit(build(W), request("a", deadline_s=3.0), now=4.0)
    assert reasons(decisions) == [RejectReason.DEADLINE]


def test_cancelling_a_queued_request_forgets_it() -> None:
    cluster = build()
    submit(cluster, request("a"))
    event = RequestCancelled(attempt("a"), "client_cancelled")
    assert cluster.handle(event, now=1.0) == [Forget(attempt("a"))]
    assert cluster.handle(event, now=1.0) == []


def test_a_cancelled_request_holds_its_memory_until_its_worker_has_ended_it() -> None:
    cluster = build(W, limits=capacity(10))
    submit(cluster, request("a", context=60), request("b", context=60))
    event = RequestCancelled(attempt("a"), "client_cancelled")
    assert cluster.handle(event, now=1.0) == [Abort(W, attempt("a"), "client_cancelled")]
    assert cluster.handle(event, now=1.0) == []
    assert finish(cluster, W, "a", now=2.0) == [Dispatch(W, attempt("b"), 2.0)]


def test_a_later_attempt_takes_the_place_of_a_queued_one() -> None:
    cluster = build()
    submit(cluster, request("a"))
    assert submit(cluster, request("a", number=2)) == [Forget(attempt("a"))]
    assert attach(cluster, W) == [Dispatch(W, attempt("a", 2), 0.0)]


def test_a_later_attempt_aborts_a_dispatched_one() -> None:
    cluster = build(W)
    submit(cluster, request("a"))
    assert submit(cluster, request("a", number=2)) == [
        Abort(W, attempt("a"), "superseded"),
        Dispatch(W, attempt("a", 2), 0.0),
    ]
    assert finish(cluster, W, "a") == []
    assert cluster.snapshot(now=0.0).workers[0].dispatched == 1


def test_known_and_older_attempts_are_ignored() -> None:
    cluster = build()
    submit(cluster, request("a", number=2))
    assert submit(cluster, request("a", number=2)) == []
    assert submit(cluster, request("a", number=1)) == [Forget(attempt("a", 1))]
    attach(cluster, W)
    assert submit(cluster, request("a", number=2)) == [Forget(attempt("a", 2))]
    assert cluster.snapshot(now=0.0).workers[0].dispatched == 1


def test_reports_about_unknown_requests_and_workers_change_nothing() -> None:
    cluster = build(W)
    assert finish(cluster, W, "ghost") == []
    assert finish(cluster, V, "ghost") == []
    assert cluster.handle(RequestStarted(V, attempt("ghost")), now=0.0) == []
    assert cluster.handle(WorkerReported(V, (), draining=False), now=0.0) == []
    assert cluster.handle(WorkerDetached(V), now=0.0) == []


def test_an_adapter_stays_known_at_its_worker_after_its_request_started() -> None:
    cluster = build(W, V)
    submit(cluster, request("r", using=adapter("a")))
    cluster.handle(RequestStarted(V, attempt("r")), now=0.0)
    finish(cluster, V, "r")
    submit(cluster, request("filler", context=100))
    assert placed_at(submit(cluster, request("s", using=adapter("a")))) == [V]


def hinting(has: Iterable[Adapter] = ()) -> ClusterScheduler:
    cluster = build(config=ClusterConfig(prefetch_depth=2), policy="fifo")
    attach(cluster, W, limits=capacity(requests=1), has=has)
    submit(cluster, request("running"))
    return cluster


def prefetches(decisions: list[ClusterDecision]) -> list[tuple[Adapter, ...]]:
    return [decision.adapters for decision in decisions if isinstance(decision, Prefetch)]


def test_hints_name_the_adapters_that_the_queue_waits_for() -> None:
    cluster = hinting(has=[adapter("here")])
    queued = [request(name, using=adapter(name)) for name in ("here", "x", "x2", "y", "z")]
    submit(cluster, *queued[:1], now=1.0)
    submit(cluster, *queued[1:], now=1.0)
    assert cluster.next_deadline() == pytest.approx(1.05)
    assert prefetches(cluster.tick(now=1.05)) == [(adapter("x"), adapter("x2"))]


def test_hints_are_sent_only_when_they_change_and_withdrawn_at_the_end() -> None:
    cluster = hinting()
    assert prefetches(submit(cluster, request("r", using=adapter("x")), now=1.0)) == [
        (adapter("x"),)
    ]
    assert prefetches(submit(cluster, request("s", using=adapter("x")), now=2.0)) == []
    cancel = RequestCancelled(attempt("s"), "client_cancelled")
    assert prefetches(cluster.handle(cancel, now=3.0)) == []
    cancel = RequestCancelled(attempt("r"), "client_cancelled")
    assert prefetches(cluster.handle(cancel, now=4.0)) == [()]


def test_hints_spread_over_workers_and_stay_where_they_are() -> None:
    cluster = build(config=ClusterConfig(prefetch_depth=4), policy="fifo")
    for worker_id in (V, W):
        attach(cluster, worker_id, limits=capacity(requests=1))
    submit(cluster, request("r0"), request("r1"))
    [hint] = submit(cluster, request("x", using=adapter("x", blocks=5)), now=1.0)
    assert hint == Prefetch(V, (adapter("x", blocks=5),))
    [hint] = submit(cluster, request("y", using=adapter("y", blocks=5)), now=2.0)
    assert hint == Prefetch(W, (adapter("y", blocks=5),))
    assert placed_at(finish(cluster, W, "r1", now=3.0)) == [W]


def test_the_snapshot_shows_queues_workers_and_why_the_oldest_wait() -> None:
    cluster = build(W, limits=capacity(10))
    submit(cluster, request("a", context=60), request("b", context=60), request("c", context=70))
    snapshot = cluster.snapshot(now=4.0)
    assert snapshot.policy == "multilevel"
    assert snapshot.gateways == 1
    assert [(w.worker_id, w.dispatched, w.reserved_blocks) for w in snapshot.workers] == [(W, 1, 7)]
    assert [(q.request_id, q.queue, q.waited_s, q.waits_for) for q in snapshot.queued] == [
        ("b", "level-0", 4.0, "memory"),
        ("c", "level-0", 4.0, "memory"),
    ]
    assert snapshot.queues[0].length == 2
