"""The one Submit stream to the scheduler: kept open, announced anew after every loss.

While it is down, running requests go on (tokens come from the workers); new ones wait a while in
`wait_connected`, queued ones until the scheduler is back, or for `restart_s` at most.
"""

import asyncio
import contextlib
import time
from typing import Any, Final

import grpc
import structlog

from calumma.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from services.common.clients import Backoff, open_channel
from services.common.errors import RpcError
from services.gateway import wire
from services.gateway.outbox import Cancel, Outbox
from services.gateway.streams import RequestStreams, scheduler_unavailable
from services.gateway.worker_links import WorkerLinks

WELCOME_TIMEOUT_S: Final = 5.0
_log = structlog.get_logger("scheduler_link")
_SubmitCall = grpc.aio.StreamStreamCall[Any, Any]


class SchedulerLink:
    """Speaks Submit for as long as `run` runs. `changed` is set whenever `is_connected` changes."""

    def __init__(
        self,
        target: str,
        *,
        gateway_id: str,
        outbox: Outbox,
        streams: RequestStreams,
        workers: WorkerLinks,
        restart_s: float,
        changed: asyncio.Event,
    ) -> None:
        self._target = target
        self._gateway_id = gateway_id
        self._outbox = outbox
        self._streams = streams
        self._workers = workers
        self._restart_s = restart_s
        self._changed = changed
        self._connected = asyncio.Event()

    @property
    def is_connected(self) -> bool:
        """The scheduler has welcomed this gateway."""
        return self._connected.is_set()

    async def wait_connected(self, wait_s: float) -> None:
        """Raises RpcError when the scheduler stays away for so long."""
        try:
            async with asyncio.timeout(wait_s):
                await self._connected.wait()
        except TimeoutError:
            raise scheduler_unavailable("admission") from None

    async def run(self) -> None:
        """Keep the stream open until cancelled."""
        backoff = Backoff()
        async with open_channel(self._target) as channel:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            down_since_s = time.monotonic()
            while True:
                was_connected = await self._session(stub.Submit(), backoff)
                if was_connected:
                    down_since_s = time.monotonic()
                elif time.monotonic() - down_since_s > self._restart_s:
                    self._streams.on_scheduler_lost()
                await asyncio.sleep(backoff.next_delay_s())

    async def _session(self, call: _SubmitCall, backoff: Backoff) -> bool:
        """One stream, from hello to its end. True when it was welcomed."""
        welcomed = False
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await call.write(wire.hello(self._gateway_id, self._streams.placed()))
                first = await call.read()
            if isinstance(first, scheduler_pb2.SubmitResponse) and first.HasField("welcome"):
                welcomed = True
                backoff.reset()
                await self._serve(call, first.welcome.scheduler_id)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
            _log.debug("submit_stream_failed", error=type(error).__name__, target=self._target)
        finally:
            call.cancel()
        return welcomed

    async def _serve(self, call: _SubmitCall, scheduler_id: str) -> None:
        self._outbox.restart(self._streams.queued())
        self._workers.restart()
        self._set_connected(is_connected=True)
        _log.info("scheduler_connected", scheduler_id=scheduler_id)
        writer = asyncio.create_task(self._write(call))
        try:
            while isinstance(answer := await call.read(), scheduler_pb2.SubmitResponse):
                self._on_answer(answer)
        finally:
            self._set_connected(is_connected=False)
            _log.warning("scheduler_disconnected", scheduler_id=scheduler_id)
            writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writer

    async def _write(self, call: _SubmitCall) -> None:
        """Tell what is in the outbox. What a broken stream swallowed is told on the next one."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                entry = await self._outbox.get()
                if isinstance(entry, Cancel):
                    await call.write(wire.cancel(entry.attempt, entry.cause))
                elif not entry.is_ended:
                    await call.write(wire.submit(entry, self._gateway_id, time.monotonic()))

    def _on_answer(self, answer: scheduler_pb2.SubmitResponse) -> None:
        match answer.WhichOneof("message"):
            case "placed":
                placed = answer.placed
                self._workers.expect(placed.worker_id)
                self._streams.on_placed(
                    wire.read_attempt(placed.attempt), wire.read_placement(placed)
                )
            case "rejected":
                rejected = answer.rejected
                self._streams.on_rejected(
                    wire.read_attempt(rejected.attempt), RpcError.from_proto(rejected.error)
                )
            case "returned":
                self._streams.on_returned(wire.read_attempt(answer.returned.attempt))
            case "worker":
                worker = answer.worker
                self._workers.announce(
                    worker.worker_id,
                    worker.address,
                    attached=worker.attached,
                    context_tokens=worker.max_context_tokens,
                )
            case "welcome" | None:  # a second welcome, or a message of a newer scheduler
                return

    def _set_connected(self, *, is_connected: bool) -> None:
        if is_connected:
            self._connected.set()
        else:
            self._connected.clear()
        self._changed.set()
