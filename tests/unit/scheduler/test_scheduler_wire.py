"""Messages become the core's values, and time left becomes an instant and time left again."""

import math
from dataclasses import asdict, fields

import pytest

from calumma.scheduler.v1 import scheduler_pb2
from services.common.errors import CODES, Reason, RpcError
from services.core.costs import StepCosts
from services.core.decisions import Dispatch, Reject, RejectReason
from services.core.snapshots import ClusterSnapshot, QueueSnapshot, TenantSnapshot
from services.core.types import Attempt, GatewayId, RequestId, TenantId, WorkerId
from services.scheduler import wire
from tests.support.scheduler_peers import digest_of, work_item


def test_an_item_becomes_a_request_of_its_sizes() -> None:
    item = work_item("r.1", attempt=2, tokens=8, prior_tokens=3, max_tokens=64, adapter=5)
    request = wire.to_request(item, now=100.0)
    assert request.attempt == Attempt(RequestId("r.1"), 2)
    assert (request.context_tokens, request.prior_output_tokens) == (11, 3)
    assert (request.max_output_tokens, request.predicted_output_tokens) == (64, 32)
    assert request.adapter is not None
    assert request.adapter.digest == digest_of(5)
    assert (request.arrived_s, request.deadline_s) == (100.0, None)


def test_a_q90_that_is_not_given_is_the_prediction() -> None:
    item = work_item("r.1", max_tokens=64)
    assert wire.to_request(item, now=0.0).output_tokens_q90 == 32
    item.output_tokens_q90 = 50
    assert wire.to_request(item, now=0.0).output_tokens_q90 == 50


def test_a_request_that_comes_again_has_not_lost_its_place() -> None:
    item = work_item("r.1", attempt=2, time_left_s=2.0)
    item.waited_s = 3.5
    request = wire.to_request(item, now=100.0)
    assert (request.arrived_s, request.deadline_s) == (96.5, 102.0)


def test_a_gateway_is_told_the_queue_and_the_cause_of_the_wait() -> None:
    attempt = Attempt(RequestId("r.1"))
    dispatch = Dispatch(WorkerId("w"), attempt, 0.5, "small", "memory")
    placed = wire.from_dispatch(dispatch)
    assert (placed.worker_id, placed.queue_s) == ("w", 0.5)
    assert (placed.queue, placed.waited_for) == ("small", "memory")


def test_costs_become_the_cores_and_those_that_cannot_be_are_no_news() -> None:
    worker, status = WorkerId("w"), scheduler_pb2.WorkerStatus()
    assert wire.to_worker_reported(worker, status).costs is None
    costs = StepCosts(step_s=0.02, prefill_s=-0.01, batch=7.0)
    status.costs.CopyFrom(scheduler_pb2.StepCosts(**asdict(costs)))
    assert wire.to_worker_reported(worker, status).costs == costs
    for value in (math.nan, math.inf, -1.0):
        status.costs.prefill_token_s = value
        assert wire.to_worker_reported(worker, status).costs is None


def test_the_wires_costs_are_the_cores() -> None:
    names = [field.name for field in scheduler_pb2.StepCosts.DESCRIPTOR.fields]
    assert names == [field.name for field in fields(StepCosts)]


def test_queues_and_tenants_are_shown() -> None:
    queue = QueueSnapshot("small", 3, 0.5, quota_tokens=4000.0, used_tokens=1200, size_limit=384.0)
    tenant = TenantSnapshot(TenantId("acme"), 4, 2, 250.0, available_tokens=-30.0)
    free = TenantSnapshot(TenantId("free"), 0, 0, 0.0, available_tokens=math.inf)
    snapshot = ClusterSnapshot(
        policy="p",
        queues=(queue, QueueSnapshot("large", 0, 0.0)),
        workers=(),
        queued=(),
        gateways=1,
        tenants=(tenant, free),
    )
    state = wire.from_snapshot(
        snapshot, scheduler_id="s", system="tuned", find_worker=lambda _: None
    )
    small, large = state.queues
    assert (small.quota_tokens, small.used_tokens, small.size_limit) == (4000, 1200, 384)
    assert not large.HasField("quota_tokens")
    assert not large.HasField("size_limit")
    assert state.system == "tuned"
    assert state.tenants == [
        scheduler_pb2.TenantState(
            tenant="acme", held=4, running=2, tokens_per_s=250, available_tokens=-30
        ),
        scheduler_pb2.TenantState(tenant="free"),
    ]


def test_without_an_adapter_the_request_is_for_the_base_model() -> None:
    assert wire.to_request(work_item("r.1"), now=0.0).adapter is None


def test_time_left_is_an_instant_here_and_time_left_at_the_worker() -> None:
    item = work_item("r.1", time_left_s=2.5)
    assert wire.to_request(item, now=100.0).deadline_s == 102.5
    wire.stamp_dispatch(item, queue_s=1.0, left_s=1.5)
    assert item.queue_s == 1.0
    assert item.time_left.ToMilliseconds() == 1500
    wire.stamp_dispatch(item, queue_s=9.0, left_s=-4.0)
    assert item.time_left.ToMilliseconds() == 0


def test_a_request_without_a_deadline_stays_without_one() -> None:
    item = work_item("r.1")
    wire.stamp_dispatch(item, queue_s=1.0, left_s=None)
    assert not item.HasField("time_left")


@pytest.mark.parametrize("reason", list(RejectReason))
def test_every_rejection_has_its_place_in_the_table(reason: RejectReason) -> None:
    rejected = wire.from_rejection(Reject(GatewayId("g"), Attempt(RequestId("r.1")), reason, 2.0))
    error = RpcError.from_proto(rejected.error)
    assert error.reason is Reason(reason)
    assert error.code is CODES[error.reason]
    assert (error.context.stage, error.context.retry_after_s) == ("queue", 2.0)


def test_a_running_request_that_outgrew_its_prediction_expects_one_more_token() -> None:
    hello = scheduler_pb2.WorkerHello(worker_id="worker-1")
    hello.running.add(predicted_output_tokens=10, generated_tokens=25, context_tokens=40)
    (running,) = wire.to_worker_attached(hello).running
    assert running.remaining_output_tokens == 1
    assert running.adapter_digest is None
