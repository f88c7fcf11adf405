"""What is refused, and how."""

import asyncio
from typing import Any

import grpc
import pytest

from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2
from services.common.errors import Reason
from services.gateway.service import SERVICE
from tests.support.gateway_peers import (
    soon,
)
from tests.support.gateway_suite import Suite, details

STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH


async def test_bad_input_is_refused_over_the_wire_and_others_go_on(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go")
    item = await suite.scheduler.next_item()
    refused: tuple[dict[str, Any], ...] = (
        {"prompt": ""},
        {"sampling": common_pb2.SamplingParams(temperature=float("nan"))},
        {"stopping": common_pb2.StopConditions(max_tokens=0)},
        {"stopping": common_pb2.StopConditions(stop=["a"] * 10_000)},
        {"prompt": "x" * 19_999 + "yz"},
    )
    for bad in refused:
        code, info, _ = await suite.stream(**bad).error()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert info.domain == "calumma"
        assert info.metadata["field"]
    assert suite.scheduler.items.empty()
    suite.worker.send(item, 0, "x", finish=STOP)
    await reader.read_all()


async def test_text_that_is_not_utf_8_is_refused(suite: Suite) -> None:
    await suite.start()
    async with grpc.aio.insecure_channel(suite.gateway.address) as channel:
        raw: Any = channel.unary_unary(f"/{SERVICE}/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw(b"\x12\x02\xff\xfe")  # field 2, two bytes
    code, info, _ = details(caught.value)
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD)


async def test_a_message_over_the_limit_is_refused(suite: Suite) -> None:
    await suite.start()
    request = gateway_pb2.GenerateRequest(prompt="x" * (9 * 2**20))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await suite.stub.Generate(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_request_id_is_used_once_at_a_time(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go", request_id="same")
    item = await suite.scheduler.next_item()
    code, info, _ = await suite.stream("go", request_id="same").error()
    assert (code, info.reason) == (grpc.StatusCode.ALREADY_EXISTS, Reason.REQUEST_ID_IN_USE)
    suite.worker.send(item, 0, "x", finish=STOP)
    await reader.read_all()
    suite.stream("go", request_id="same")
    assert (await suite.scheduler.next_item()).request_id != item.request_id


async def test_more_requests_than_allowed_are_refused(suite: Suite) -> None:
    await suite.start(max_requests=1)
    suite.stream("go")
    await suite.scheduler.next_item()
    code, info, retry_s = await suite.stream("go").error()
    assert (code, info.reason, retry_s) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.TOO_MANY_REQUESTS,
        1,
    )


async def test_a_drain_refuses_new_requests_and_lets_streams_end(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go")
    item = await suite.scheduler.next_item()
    suite.scheduler.place(item, suite.worker)
    await reader.read()
    stopping = asyncio.create_task(suite.stop(30))
    await suite.is_serving(serving=False)
    code, info, retry_s = await suite.stream("new").error()
    assert (code, info.reason, retry_s) == (grpc.StatusCode.UNAVAILABLE, Reason.DRAINING, 1)
    suite.worker.send(item, 0, "to the end", finish=STOP)
    await reader.read_all()
    await soon(stopping)
    assert reader.text == "to the end"


async def test_a_drain_that_takes_too_long_ends_what_is_left_with_a_reason(suite: Suite) -> None:
    await suite.start()
    reader = suite.stream("go")
    item = await suite.scheduler.next_item()
    suite.scheduler.place(item, suite.worker)
    await reader.read()
    stopping = asyncio.create_task(suite.stop(0.05))
    code, info, retry_s = await reader.error()
    assert (code, info.reason, retry_s) == (grpc.StatusCode.UNAVAILABLE, Reason.DRAINING, 1)
    assert info.metadata["stage"] == "prefill"
    await soon(stopping)
    assert (await suite.scheduler.next_cancel()).attempt.request_id == item.request_id
