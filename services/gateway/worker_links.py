"""One StreamTokens stream per worker: opened when the scheduler names the worker, kept open.

A stream that breaks is opened again with resume points. When a worker can't be reached for
`lost_after_s`, when the scheduler says that it has left, or when another worker is at its address,
its requests are submitted again. A worker that can't be reached is dialled on for as long as the
scheduler names it; a scheduler that has restarted never heard of those that are gone.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final

import grpc
import structlog

from calumma.worker.v1 import worker_pb2_grpc
from services.common.clients import Backoff, open_channel
from services.gateway import wire
from services.gateway.streams import RequestStreams
from services.gateway.tasks import start_task

_STEADY_S: Final = 1.0  # a stream that lived so long, or brought a frame, was up
_log = structlog.get_logger("worker_links")


class WorkerLinks:
    """The streams to all workers that the scheduler has named."""

    def __init__(self, gateway_id: str, streams: RequestStreams, *, lost_after_s: float) -> None:
        self._gateway_id = gateway_id
        self._streams = streams
        self._lost_after_s = lost_after_s
        self._links: dict[str, _WorkerLink] = {}
        self._named: set[str] = set()  # on the scheduler's present stream
        self._context_tokens: dict[str, int] = {}

    @property
    def context_tokens(self) -> int | None:
        """Longest prompt plus output that any worker takes. None while no worker is known."""
        return max(self._context_tokens.values(), default=None)

    def restart(self) -> None:
        """The scheduler has a new stream: it will name every worker that it knows."""
        self._named.clear()

    def announce(
        self, worker_id: str, address: str, *, attached: bool, context_tokens: int
    ) -> None:
        """The scheduler says where a worker is and what it takes, or that it has left."""
        if not attached:
            self._leave(worker_id)
            return
        for other_id, link in list(self._links.items()):
            if link.address == address and other_id != worker_id:
                self._leave(other_id)
        self._named.add(worker_id)
        if context_tokens > 0:  # a scheduler of an older version does not say
            self._context_tokens[worker_id] = context_tokens
        self.expect(worker_id)
        self._links[worker_id].set_address(address)

    def expect(self, worker_id: str) -> None:
        """A request is at this worker, whose address will follow if it is not known."""
        if worker_id not in self._links:
            self._links[worker_id] = _WorkerLink(
                worker_id,
                self._gateway_id,
                self._streams,
                lost_after_s=self._lost_after_s,
                on_lost=self._lose,
            )

    async def close(self) -> None:
        links = list(self._links.values())
        self._links.clear()
        for link in links:
            await link.closed()

    def _lose(self, worker_id: str) -> None:
        """It can't be reached."""
        if worker_id in self._named:
            self._streams.on_worker_lost(worker_id)
        else:
            self._leave(worker_id)

    def _leave(self, worker_id: str) -> None:
        self._named.discard(worker_id)
        self._context_tokens.pop(worker_id, None)
        if link := self._links.pop(worker_id, None):
            link.close()
            self._streams.on_worker_lost(worker_id)


class _WorkerLink:
    def __init__(
        self,
        worker_id: str,
        gateway_id: str,
        streams: RequestStreams,
        *,
        lost_after_s: float,
        on_lost: Callable[[str], None],
    ) -> None:
        self._worker_id = worker_id
        self._gateway_id = gateway_id
        self._streams = streams
        self._lost_after_s = lost_after_s
        self._on_lost = on_lost
        self.address: str | None = None
        self._down_since_s = time.monotonic()
        self._task = start_task(self._lost_unless_named())

    def set_address(self, address: str) -> None:
        if address != self.address:
            self.address = address
            self._task.cancel()
            self._task = start_task(self._run(address))

    def close(self) -> None:
        self._task.cancel()

    async def closed(self) -> None:
        self.close()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _lost_unless_named(self) -> None:
        await asyncio.sleep(self._lost_after_s)
        self._on_lost(self._worker_id)

    async def _run(self, address: str) -> None:
        backoff = Backoff()
        async with open_channel(address) as channel:
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
                    await self._session(channel, backoff)
                if time.monotonic() - self._down_since_s >= self._lost_after_s:
                    self._down_since_s = time.monotonic()
                    _log.warning("worker_lost", worker_id=self._worker_id, address=address)
                    self._on_lost(self._worker_id)
                await asyncio.sleep(backoff.next_delay_s())

    async def _session(self, channel: grpc.aio.Channel, backoff: Backoff) -> None:
        """One stream, from its first frame to its end."""
        lost_at_s = self._down_since_s + self._lost_after_s
        async with asyncio.timeout(max(0.0, lost_at_s - time.monotonic())):
            await channel.channel_ready()
        opened_s = time.monotonic()
        was_up = False
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        placed = self._streams.placed(self._worker_id)
        call = stub.StreamTokens(wire.stream_tokens(self._gateway_id, placed))
        try:
            sequence = 0
            async for frame in call:
                sequence += 1
                if frame.sequence != sequence:
                    _log.warning("frame_lost", worker_id=self._worker_id, sequence=sequence)
                    return
                was_up = True
                backoff.reset()
                runs = [wire.read_token_run(tokens) for tokens in frame.requests]
                self._streams.on_tokens(self._worker_id, runs)
        finally:
            call.cancel()
            if was_up or time.monotonic() - opened_s > _STEADY_S:
                self._down_since_s = time.monotonic()
