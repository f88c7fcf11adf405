"""The long-lived streams: one Link per stream, one current Link per peer.

A Link holds what is on its way to its peer, in order and bounded. A peer that lets its outbox
overflow, or lets one message wait too long, is cut off: it is told so when it reads again, and
everybody else goes on as if it had left. A second stream of the same peer replaces the first.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

import structlog
from google.protobuf.message import Message

from services.common.errors import Reason, RpcError

M = TypeVar("M")
R = TypeVar("R")
H = TypeVar("H", bound=Message)
_log = structlog.get_logger("links")


class Link(Generic[M]):
    """One stream to one peer. `on_end` is called once, when nothing more will be sent."""

    def __init__(
        self, peer_id: str, *, messages_max: int, on_end: Callable[["Link[M]"], None]
    ) -> None:
        self.peer_id = peer_id
        self._messages_max = messages_max
        self._on_end = on_end
        self._outbox: deque[M] = deque()
        self._wake = asyncio.Event()
        self._writing_since_s: float | None = None
        self.is_closed = False
        self._error: RpcError | None = None

    def send(self, message: M) -> None:
        """Queue a message. A closed link drops it, a full one is cut off."""
        if self.is_closed:
            return
        if len(self._outbox) >= self._messages_max:
            self.cut_off()
            return
        self._outbox.append(message)
        self._wake.set()

    def close(self, error: RpcError | None = None, *, discard: bool = False) -> None:
        """End the stream, with `error` or normally, after what is queued unless `discard`."""
        if self.is_closed:
            return
        self.is_closed = True
        self._error = error
        if discard:
            self._outbox.clear()
        self._wake.set()
        self._on_end(self)

    def cut_off(self) -> None:
        """End the stream of a peer that does not read."""
        _log.warning("peer_cut_off", peer_id=self.peer_id, unread_messages=len(self._outbox))
        error = RpcError(Reason.PROTOCOL_VIOLATION, "this stream was not read for too long")
        self.close(error, discard=True)

    def is_stalled(self, now: float, *, stall_s: float) -> bool:
        """True when the peer has not taken the current message for `stall_s`."""
        return self._writing_since_s is not None and now - self._writing_since_s > stall_s

    async def messages(self) -> AsyncGenerator[M]:
        """What to write, until the link is closed. Raises the error it was closed with."""
        while True:
            while self._outbox:
                message = self._outbox.popleft()
                self._writing_since_s = time.monotonic()
                yield message
                self._writing_since_s = None
            if self.is_closed:
                break
            self._wake.clear()
            await self._wake.wait()
        if self._error is not None:
            raise self._error


class Links(Generic[M]):
    """The current link of each peer of one kind."""

    def __init__(self) -> None:
        self._links: dict[str, Link[M]] = {}

    def __len__(self) -> int:
        return len(self._links)

    def __contains__(self, peer_id: str) -> bool:
        return peer_id in self._links

    def is_current(self, link: Link[M]) -> bool:
        """False before it is connected, and once it is replaced or gone."""
        return self._links.get(link.peer_id) is link

    def connect(self, link: Link[M]) -> None:
        """Make this the peer's link. An older one ends; what it did not send yet is void."""
        older = self._links.get(link.peer_id)
        self._links[link.peer_id] = link
        if older is not None:
            error = RpcError(Reason.CONFLICT, "a newer stream of this peer replaced this one")
            older.close(error, discard=True)

    def disconnect(self, link: Link[M]) -> bool:
        """Drop the link. False if it was not the peer's current one."""
        if not self.is_current(link):
            return False
        del self._links[link.peer_id]
        return True

    def send(self, peer_id: str, message: M) -> None:
        """Queue a message for a peer. Dropped without a link: the peer will announce itself."""
        link = self._links.get(peer_id)
        if link is not None:
            link.send(message)

    def broadcast(self, message: M) -> None:
        """Queue a message for every peer."""
        for link in tuple(self._links.values()):
            link.send(message)

    def cut_off_stalled(self, now: float, *, stall_s: float) -> None:
        """End the links of all peers that have stopped reading."""
        for link in tuple(self._links.values()):
            if link.is_stalled(now, stall_s=stall_s):
                link.cut_off()

    def close(self, error: RpcError, *, discard: bool) -> None:
        """End all links."""
        for link in tuple(self._links.values()):
            link.close(error, discard=discard)


async def converse(
    link: Link[M], requests: AsyncIterator[R], *, receive: Callable[[R], Awaitable[None]]
) -> AsyncGenerator[M]:
    """Write what the link holds and `receive` what the peer sends, until either side ends.

    `receive` may wait, which slows its peer down, and may raise RpcError, which ends the stream.
    """
    reader = asyncio.create_task(_read(link, requests, receive))
    try:
        async with contextlib.aclosing(link.messages()) as messages:
            async for message in messages:
                yield message
        if reader.done() and not reader.cancelled():
            reader.result()  # a bug in `receive` is the interceptor's to report
    finally:
        link.close()
        reader.cancel()


async def _read(
    link: Link[M], requests: AsyncIterator[R], receive: Callable[[R], Awaitable[None]]
) -> None:
    try:
        async for request in requests:
            if link.is_closed:
                return
            await receive(request)
    except RpcError as error:
        link.close(error)
    finally:
        link.close()  # half-closed by the peer, or its connection is gone


async def opening(requests: AsyncIterator[H], *, wait_s: float) -> H:
    """The first message of a stream, with its hello. Raises PROTOCOL_VIOLATION without one."""
    with contextlib.suppress(TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(wait_s):
            request = await anext(requests)
            if request.WhichOneof("message") == "hello":
                return request
    raise RpcError(Reason.PROTOCOL_VIOLATION, "the first message must be hello")


def check_room(links: Links[M], peer_id: str, *, peers_max: int) -> None:
    """Refuse a new peer when there are as many as there may be."""
    if peer_id not in links and len(links) >= peers_max:
        raise RpcError(
            Reason.TOO_MANY_REQUESTS, f"{peers_max} peers are connected already", retry_after_s=5.0
        )
