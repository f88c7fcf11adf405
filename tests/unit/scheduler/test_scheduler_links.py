"""Links keep order, stay bounded, and end once."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from services.common.errors import Reason, RpcError
from services.scheduler.links import Link, Links, converse


class Ended:
    """Counts the ends of links."""

    def __init__(self) -> None:
        self.links: list[Link[int]] = []

    def __call__(self, link: Link[int]) -> None:
        self.links.append(link)


@pytest.fixture
def ended() -> Ended:
    return Ended()


def link_to(peer_id: str, ended: Ended, *, messages_max: int = 4) -> Link[int]:
    return Link(peer_id, messages_max=messages_max, on_end=ended)


async def read_all(link: Link[int]) -> list[int]:
    return [message async for message in link.messages()]


async def test_messages_leave_in_order_and_those_queued_before_the_end_still_leave(
    ended: Ended,
) -> None:
    link = link_to("a", ended)
    for number in range(3):
        link.send(number)
    link.close()
    link.send(99)
    assert await read_all(link) == [0, 1, 2]
    link.close()
    assert ended.links == [link]


async def test_an_overflowing_link_is_cut_off_with_an_error(ended: Ended) -> None:
    link = link_to("a", ended)
    for number in range(5):
        link.send(number)
    assert ended.links == [link]
    with pytest.raises(RpcError) as caught:
        await read_all(link)
    assert caught.value.reason is Reason.PROTOCOL_VIOLATION


async def test_a_link_whose_message_is_not_taken_is_stalled(ended: Ended) -> None:
    link = link_to("a", ended)
    messages = link.messages()
    link.send(1)
    link.send(2)
    assert not link.is_stalled(time.monotonic() + 99, stall_s=1)
    assert await anext(messages) == 1
    assert link.is_stalled(time.monotonic() + 2, stall_s=1)
    assert await anext(messages) == 2  # read again: the clock begins anew
    assert not link.is_stalled(time.monotonic(), stall_s=1)
    await messages.aclose()


async def test_a_newer_link_replaces_the_older_and_its_messages(ended: Ended) -> None:
    links = Links[int]()
    older, newer = link_to("a", ended), link_to("a", ended)
    links.connect(older)
    links.send("a", 1)
    links.connect(newer)
    links.send("a", 2)
    with pytest.raises(RpcError) as caught:
        await read_all(older)
    assert caught.value.reason is Reason.CONFLICT
    assert not links.disconnect(older)
    assert links.is_current(newer)
    newer.close()
    assert await read_all(newer) == [2]
    assert links.disconnect(newer)
    assert len(links) == 0


async def test_what_is_sent_to_nobody_is_dropped() -> None:
    Links[int]().send("nobody", 1)


async def test_a_failing_receiver_ends_the_conversation_with_its_error(ended: Ended) -> None:
    async def requests() -> AsyncIterator[str]:
        yield "fine"
        yield "bad"

    async def receive(request: str) -> None:
        link.send(len(request))
        if request == "bad":
            raise RpcError(Reason.PROTOCOL_VIOLATION, "no")

    link = link_to("a", ended)
    written: list[int] = []

    async def write_all() -> None:
        async for message in converse(link, requests(), receive=receive):
            written.append(message)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(RpcError):
        await write_all()
    assert written == [4, 3]


async def test_a_bug_in_a_receiver_is_not_swallowed(ended: Ended) -> None:
    async def requests() -> AsyncIterator[str]:
        yield "anything"

    async def receive(_: str) -> None:
        raise ValueError("a bug")

    link = link_to("a", ended)
    with pytest.raises(ValueError, match="a bug"):
        await anext(converse(link, requests(), receive=receive))


async def test_a_conversation_that_is_abandoned_ends_its_link_and_its_reader(ended: Ended) -> None:
    reading = asyncio.Event()
    cancelled = asyncio.Event()

    async def requests() -> AsyncIterator[str]:
        reading.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        yield ""

    async def receive(_: str) -> None: ...

    link = link_to("a", ended)
    link.send(1)
    conversation = converse(link, requests(), receive=receive)
    assert await anext(conversation) == 1
    await reading.wait()
    await conversation.aclose()
    assert ended.links == [link]
    await asyncio.wait_for(cancelled.wait(), 5)
