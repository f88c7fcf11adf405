"""Messages become the core's values, and time left becomes an instant and time left again."""

import pytest

from calumma.scheduler.v1 import scheduler_pb2
from services.common.errors import CODES, Reason, RpcError
from services.core.decisions import RejectReason
from services.core.types import Attempt, RequestId
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
    rejected = wire.from_rejection(Attempt(RequestId("r.1")), reason, 2.0)
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
