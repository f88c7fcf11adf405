"""Workers and gateways that come, go, and come back with their own view of things."""

from services.core.config import ClusterConfig
from services.core.decisions import Abort, Forget, Return
from services.core.events import RunningRequest
from services.core.types import AdapterDigest, GatewayId, WorkerId
from tests.unit.core.core_world import (
    GATEWAY,
    Scene,
    adapter,
    attempt,
    capacity,
    request,
    went,
)

W, V = WorkerId("w"), WorkerId("v")
OTHER = GatewayId("other")


def running(
    name: str, number: int = 1, *, gateway: GatewayId = GATEWAY, digest: AdapterDigest | None = None
) -> RunningRequest:
    return RunningRequest(attempt(name, number), gateway, digest, 20, 10)


# --- cancelled while a worker is away ---------------------------------------------------------


def test_a_cancel_that_comes_before_the_worker_that_runs_the_request_stops_it_there() -> None:
    scene = Scene()
    assert scene.cancel("a", now=1.0) == []
    assert scene.worker(W, running("a"), now=2.0) == [Abort(W, attempt("a"), "cancelled")]
    scene.finish(W, "a", now=3.0)
    assert scene.dispatched() == {W: 0}


def test_a_cancel_of_an_attempt_that_nobody_brings_is_forgotten() -> None:
    scene = Scene()
    scene.cancel("a", now=1.0)
    assert scene.cluster.next_deadline() == 6.0
    scene.tick(6.0)
    assert scene.cluster.next_deadline() is None
    assert scene.worker(W, running("a"), now=7.0) == []


# --- a worker is gone -------------------------------------------------------------------------


def test_a_lost_worker_returns_its_requests_once_its_grace_is_over() -> None:
    scene = Scene()
    scene.worker(W)
    scene.submit(request("a"))
    assert scene.worker_leaves(W, now=10.0) == []
    assert scene.tick(14.9) == []
    assert scene.cluster.next_deadline() == 15.0
    assert scene.tick(15.0) == [Return(GATEWAY, attempt("a"), W)]
    assert scene.dispatched() == {}
    scene.worker(V, now=16.0)
    assert scene.submit(request("a", number=2), now=16.0) == [went(V, "a", 0.0, number=2)]


def test_nothing_is_dispatched_to_a_worker_in_its_grace() -> None:
    scene = Scene()
    scene.worker(W)
    scene.worker_leaves(W, now=1.0)
    assert scene.submit(request("a"), now=1.0) == []
    assert scene.worker(W, now=2.0) == [went(W, "a", 1.0, waited_for="no_worker")]


def test_a_worker_that_comes_back_keeps_what_it_still_has() -> None:
    scene = Scene()
    scene.worker(W)
    scene.submit(request("a"))
    scene.submit(request("b"))
    scene.worker_leaves(W, now=1.0)
    assert scene.worker(W, running("a"), now=2.0) == [Return(GATEWAY, attempt("b"), W)]
    assert scene.tick(60.0) == []
    assert scene.dispatched() == {W: 1}


def test_a_cancel_that_a_detached_worker_missed_is_repeated() -> None:
    scene = Scene()
    scene.worker(W)
    scene.submit(request("a"))
    scene.worker_leaves(W, now=1.0)
    assert scene.cancel("a", now=1.5) == []
    assert scene.worker(W, running("a"), now=2.0) == [Abort(W, attempt("a"), "client_cancelled")]
    assert scene.finish(W, "a", now=3.0) == []
    assert scene.dispatched() == {W: 0}


def test_a_cancelled_request_is_not_returned_when_its_worker_is_lost() -> None:
    scene = Scene()
    scene.worker(W)
    scene.submit(request("a"))
    scene.cancel("a", now=1.0)
    scene.worker_leaves(W, now=2.0)
    assert scene.tick(7.0) == []
    assert scene.dispatched() == {}


def test_a_worker_that_comes_back_too_late_must_stop_superseded_attempts() -> None:
    scene = Scene()
    scene.worker(W)
    scene.submit(request("a"))
    scene.worker_leaves(W, now=1.0)
    scene.tick(6.0)
    scene.worker(V, now=6.0)
    scene.submit(request("a", number=2), now=6.0)
    assert scene.worker(W, running("a"), now=7.0) == [Abort(W, attempt("a"), "superseded")]
    assert scene.dispatched() == {V: 1, W: 1}
    scene.finish(W, "a", now=8.0)
    assert scene.dispatched() == {V: 1, W: 0}


def test_one_attempt_at_two_workers_runs_at_the_first() -> None:
    scene = Scene()
    scene.worker(W)
    scene.submit(request("a"))
    assert scene.worker(V, running("a"), now=1.0) == [Abort(V, attempt("a"), "duplicate")]
    assert scene.finish(V, "a", now=2.0) == []
    assert scene.dispatched() == {V: 0, W: 1}


# --- the scheduler is new ---------------------------------------------------------------------


def test_a_new_scheduler_adopts_what_workers_run() -> None:
    scene = Scene()
    digest = adapter("big").digest
    announced = running("a", digest=digest)
    assert scene.worker(W, announced, has=[adapter("big", blocks=90)], limits=capacity(100)) == []
    assert scene.cluster.snapshot(now=0.0).workers[0].reserved_blocks == 90 + 3
    assert scene.submit(request("b", context=100)) == []
    assert scene.finish(W, "a", now=1.0) == [went(W, "b", 1.0, waited_for="memory")]


def test_a_gateways_placed_requests_wait_for_their_worker_to_come() -> None:
    scene = Scene(has_gateway=False)
    assert scene.gateway((attempt("a"), W), (attempt("b"), W)) == []
    assert scene.worker(W, running("a"), now=1.0) == [Return(GATEWAY, attempt("b"), W)]
    assert scene.tick(60.0) == []
    assert scene.dispatched() == {W: 1}


def test_requests_at_a_worker_that_never_comes_are_returned() -> None:
    scene = Scene(has_gateway=False)
    scene.gateway((attempt("a"), W))
    assert scene.cluster.next_deadline() == 5.0
    assert scene.tick(5.0) == [Return(GATEWAY, attempt("a"), W)]
    assert scene.cluster.next_deadline() is None


def test_requests_that_an_attached_worker_does_not_have_are_returned_at_once() -> None:
    scene = Scene(has_gateway=False)
    scene.worker(W)
    assert scene.gateway((attempt("a"), W)) == [Return(GATEWAY, attempt("a"), W)]


def test_a_request_cancelled_before_its_worker_came_is_aborted_there() -> None:
    scene = Scene(has_gateway=False)
    scene.gateway((attempt("a"), W))
    assert scene.cancel("a", now=1.0) == []
    assert scene.worker(W, running("a"), now=2.0) == [Abort(W, attempt("a"), "cancelled")]


def test_a_request_cancelled_before_its_worker_was_given_up_is_not_returned() -> None:
    scene = Scene(has_gateway=False)
    scene.gateway((attempt("a"), W))
    scene.cancel("a", now=1.0)
    assert scene.tick(5.0) == []


def test_a_request_resubmitted_before_its_worker_came_supersedes_the_one_there() -> None:
    scene = Scene(has_gateway=False)
    scene.gateway((attempt("a"), W))
    assert scene.submit(request("a", number=2), now=1.0) == []
    assert scene.worker(W, running("a"), now=2.0) == [
        Abort(W, attempt("a"), "superseded"),
        went(W, "a", 1.0, number=2, waited_for="no_worker"),
    ]


def test_a_newer_attempt_at_a_worker_takes_the_place_of_an_older_one() -> None:
    scene = Scene()
    scene.worker(W)
    scene.submit(request("a"))
    assert scene.worker(V, running("a", 2), now=1.0) == [Abort(W, attempt("a"), "superseded")]
    assert scene.dispatched() == {V: 1, W: 1}


def test_a_claim_of_a_newer_attempt_takes_the_place_of_an_older_one() -> None:
    scene = Scene()
    scene.submit(request("a"))
    assert scene.gateway((attempt("a", 2), W), now=1.0) == [Forget(attempt("a"))]
    assert scene.worker(W, running("a", 2), now=2.0) == []
    assert scene.dispatched() == {W: 1}


def test_a_request_submitted_again_that_a_worker_already_runs_is_not_run_twice() -> None:
    scene = Scene()
    scene.submit(request("a"), now=1.0)
    assert scene.worker(W, running("a"), now=3.0) == [went(W, "a", 2.0, waited_for="no_worker")]
    assert scene.dispatched() == {W: 1}


# --- gateways ---------------------------------------------------------------------------------


def test_a_gateway_that_stays_away_loses_its_requests() -> None:
    scene = Scene()
    scene.worker(W, limits=capacity(requests=1))
    scene.submit(request("a"))
    scene.submit(request("b"))
    scene.gateway_leaves(now=1.0)
    assert scene.tick(10.9) == []
    assert scene.tick(11.0) == [Abort(W, attempt("a"), "gateway_lost"), Forget(attempt("b"))]
    assert scene.finish(W, "a", now=12.0) == []


def test_a_gateway_that_comes_back_in_time_loses_nothing() -> None:
    scene = Scene()
    scene.worker(W, limits=capacity(requests=1))
    scene.submit(request("a"))
    scene.submit(request("b"))
    scene.gateway_leaves(now=1.0)
    assert scene.gateway((attempt("a"), W), now=5.0) == []
    assert scene.submit(request("b"), now=5.0) == []
    assert scene.tick(30.0) == []
    assert scene.finish(W, "a", now=31.0) == [went(W, "b", 31.0, waited_for="batch_slots")]


def test_a_gateway_learns_of_requests_that_were_given_up_while_it_was_away() -> None:
    scene = Scene()
    scene.worker(W)
    scene.submit(request("a"))
    scene.gateway_leaves(now=1.0)
    scene.tick(11.0)
    assert scene.gateway((attempt("a"), W), now=12.0) == [Return(GATEWAY, attempt("a"), W)]


def test_announced_requests_of_a_gateway_that_never_comes_are_aborted() -> None:
    scene = Scene()
    scene.worker(W, running("a", gateway=OTHER), running("b"))
    assert scene.tick(10.0) == [Abort(W, attempt("a"), "gateway_lost")]
    assert scene.dispatched() == {W: 2}


def test_claims_of_a_gateway_that_left_are_aborted_when_their_worker_comes() -> None:
    config = ClusterConfig(prefetch_depth=0, worker_grace_s=60.0)
    scene = Scene(has_gateway=False, config=config)
    scene.gateway((attempt("a"), W))
    scene.gateway_leaves(now=1.0)
    scene.tick(11.0)
    assert scene.worker(W, running("a"), now=12.0) == [Abort(W, attempt("a"), "cancelled")]
