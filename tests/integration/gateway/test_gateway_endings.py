"""How requests end: stop strings, deadlines, clients that go, errors."""

import grpc
import pytest

from calumma.common.v1 import common_pb2
from services.common.errors import Reason, RpcError
from tests.support.gateway_peers import (
    until,
)
from tests.support.gateway_suite import Suite

STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH


async def test_a_stop_string_over_two_frames_ends_the_stream_at_once(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go", stopping=common_pb2.StopConditions(stop=["<END>"]))
    item = await suite.scheduler.next_item()
    suite.scheduler.place(item, suite.worker)
    suite.worker.send(item, 0, "text<EN")
    await reader.read_until("text")
    suite.worker.send(item, 7, "D>more")
    done = await reader.read_all()
    assert (reader.text, done.finish_reason) == ("text", STOP)
    assert done.usage.output_tokens == 9
    cancel = await suite.scheduler.next_cancel()
    assert (cancel.attempt.request_id, cancel.cause) == (item.request_id, "stop_string")


async def test_a_client_that_goes_is_cancelled_everywhere(suite: Suite) -> None:
    await suite.start()
    for is_placed in (False, True):
        reader = suite.stream("go")
        item = await suite.scheduler.next_item()
        if is_placed:
            suite.scheduler.place(item, suite.worker)
            suite.worker.send(item, 0, "a")
            await reader.read_until("a")
        reader.call.cancel()
        cancel = await suite.scheduler.next_cancel()
        assert cancel.attempt.request_id == item.request_id
        assert cancel.cause == "client_cancelled"
    await until(lambda: len(suite.gateway._streams) == 0)


@pytest.mark.parametrize(("tokens", "stage"), [("", "queue"), ("a", "decode")])
async def test_the_servers_deadline_ends_a_request_wherever_it_is(
    suite: Suite, tokens: str, stage: str
) -> None:
    await suite.start(max_request_s=0.5)
    reader = suite.stream("go", timeout=60)
    item = await suite.scheduler.next_item()
    assert 0 < item.time_left.ToMilliseconds() <= 500
    if tokens:
        suite.worker.send(item, 0, tokens)
    code, info, _ = await reader.error()
    assert (code, info.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED)
    assert info.metadata["stage"] == stage
    assert reader.text == tokens
    assert (await suite.scheduler.next_cancel()).cause == "deadline"


async def test_the_clients_deadline_is_passed_on_and_explained(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine the client's own timer may be first; half of its time is early enough.
    monkeypatch.setattr("services.gateway.generations._DEADLINE_MARGIN_S", 10.0)
    await suite.start()
    reader = suite.stream("go", timeout=2.0)
    item = await suite.scheduler.next_item()
    assert 0 < item.time_left.ToMilliseconds() <= 1020
    code, info, _ = await reader.error()
    assert (code, info.metadata["stage"]) == (grpc.StatusCode.DEADLINE_EXCEEDED, "queue")


async def test_a_slow_client_holds_up_nobody(suite: Suite) -> None:
    await suite.start()
    slow = suite.stream("slow", stopping=common_pb2.StopConditions(max_tokens=12_000, stop=["#"]))
    quick = suite.stream("quick")
    slow_item = await suite.scheduler.next_item()
    quick_item = await suite.scheduler.next_item()
    if list(slow_item.token_ids) != suite.encode("slow"):
        slow_item, quick_item = quick_item, slow_item
    expected = ""
    for turn in range(1000):  # the slow client reads none of it
        part = f"{turn:09d} "
        suite.worker.send(slow_item, len(expected), part)
        expected += part
    suite.worker.send(slow_item, len(expected), "#more")
    suite.worker.send(quick_item, 0, "done", finish=STOP)
    await quick.read_all()
    assert (await suite.scheduler.next_cancel()).cause == "stop_string"
    done = await slow.read_all()
    assert slow.text == expected
    assert done.usage.output_tokens == len(expected) + 1


async def test_a_rejected_request_carries_the_schedulers_reason(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go")
    item = await suite.scheduler.next_item()
    error = RpcError(Reason.QUEUE_FULL, "full", stage="queue", retry_after_s=2.5)
    suite.scheduler.reject(item, error)
    code, info, retry_s = await reader.error()
    assert (code, info.reason, retry_s) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.QUEUE_FULL,
        2.5,
    )
    assert reader.started is None


async def test_tokens_that_can_not_be_fail_their_request_alone(suite: Suite) -> None:
    await suite.start()
    broken = suite.stream("go")
    broken_item = await suite.scheduler.next_item()
    other = suite.stream("go")
    other_item = await suite.scheduler.next_item()
    suite.worker.send(broken_item, -1, "x")
    suite.worker.send(other_item, 0, "x", finish=STOP)
    code, info, _ = await broken.error()
    assert (code, info.reason) == (grpc.StatusCode.INTERNAL, Reason.INTERNAL)
    await other.read_all()


async def test_a_worker_error_after_tokens_is_the_status_of_the_stream(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go")
    item = await suite.scheduler.next_item()
    suite.worker.send(item, 0, "abc")
    error = RpcError(Reason.NUMERICAL_FAILURE, "NaN", stage="decode")
    suite.worker.send(item, 3, error=error.to_proto())
    code, info, _ = await reader.error()
    assert (code, info.reason) == (grpc.StatusCode.INTERNAL, Reason.NUMERICAL_FAILURE)
    assert reader.text == "abc"
