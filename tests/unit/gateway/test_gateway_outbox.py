"""What the gateway has to tell the scheduler, while the stream is up or down."""

import asyncio
from typing import Any, cast

from services.core.types import Attempt, RequestId
from services.gateway.outbox import CANCELS_MAX, CANCELS_RETOLD, Cancel, Outbox
from services.gateway.requests import OwnedRequest


class Request:
    def __init__(self, name: str, number: int = 1) -> None:
        self.attempt = Attempt(RequestId(name), number)


def request(name: str) -> OwnedRequest:
    return cast("OwnedRequest", Request(name))


async def drain(outbox: Outbox) -> list[Any]:
    told = []
    while not outbox.is_empty:
        told.append(await outbox.get())
    return told


async def test_things_are_told_in_order_cancellations_first() -> None:
    outbox = Outbox()
    a, b, c = request("a"), request("b"), Attempt(RequestId("c"))
    outbox.submit(a)
    outbox.submit(b)
    outbox.cancel(c, "deadline")
    assert await drain(outbox) == [Cancel(c, "deadline"), a, b]


async def test_a_request_cancelled_before_it_was_told_is_never_told() -> None:
    outbox = Outbox()
    a = request("a")
    outbox.submit(a)
    outbox.cancel(a.attempt, "client_cancelled")
    assert outbox.is_empty


async def test_a_new_stream_hears_what_is_queued_and_what_may_have_been_swallowed() -> None:
    outbox = Outbox()
    a, b, c = request("a"), request("b"), Attempt(RequestId("c"))
    outbox.submit(a)
    outbox.cancel(c, "stop_string")
    assert await drain(outbox) == [Cancel(c, "stop_string"), a]
    outbox.restart([b])
    assert await drain(outbox) == [Cancel(c, "stop_string"), b]


async def test_a_request_that_a_scheduler_may_have_is_cancelled_before_it_is_told_again() -> None:
    outbox = Outbox()
    a = request("a")
    outbox.submit(a)
    assert await drain(outbox) == [a]
    outbox.restart([a])
    outbox.cancel(a.attempt, "client_cancelled")
    assert await drain(outbox) == [Cancel(a.attempt, "client_cancelled")]


async def test_cancellations_are_bounded() -> None:
    outbox = Outbox()
    for number in range(CANCELS_MAX + 10):
        outbox.cancel(Attempt(RequestId("r"), number), "deadline")
    assert len(await drain(outbox)) == CANCELS_MAX
    outbox.restart([])
    assert len(await drain(outbox)) == CANCELS_RETOLD


async def test_a_reader_waits_and_everything_told_can_be_awaited() -> None:
    outbox = Outbox()
    reader = asyncio.create_task(outbox.get())
    await asyncio.sleep(0)
    a = request("a")
    outbox.submit(a)
    assert await reader is a
    told = asyncio.create_task(outbox.told())
    await asyncio.sleep(0)
    assert not told.done()
    reader = asyncio.create_task(outbox.get())
    await asyncio.wait_for(told, 1)
    reader.cancel()
