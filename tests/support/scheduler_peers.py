"""A gateway and a worker that speak the scheduler's streams and nothing else."""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import grpc

from calumma.common.v1 import common_pb2
from calumma.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from services.common.clients import open_channel

WAIT_S = 5.0
BASE_MODEL = "sha256:" + "0" * 64


def digest_of(number: int) -> str:
    """The digest of a made-up adapter."""
    return f"sha256:{number:064x}"


def device_status(
    *adapters: int, users: int = 0, pin_reason: str = "", free_blocks: int = 4096
) -> scheduler_pb2.WorkerStatus:
    """A status with these made-up adapters, 1000 bytes each, in device memory."""
    resident = [
        scheduler_pb2.ResidentAdapter(
            digest=digest_of(number), blocks=2, users=users, size_bytes=1000, pin_reason=pin_reason
        )
        for number in adapters
    ]
    return scheduler_pb2.WorkerStatus(free_blocks=free_blocks, resident=resident)


def host_cache(*adapters: int) -> scheduler_pb2.HostCache:
    """These made-up adapters, 1000 bytes each, in host memory."""
    kept = [
        scheduler_pb2.HostAdapter(digest=digest_of(number), size_bytes=1000) for number in adapters
    ]
    return scheduler_pb2.HostCache(adapters=kept)


def work_item(
    request_id: str,
    *,
    gateway_id: str = "gateway-1",
    attempt: int = 1,
    tokens: int = 8,
    prior_tokens: int = 0,
    max_tokens: int = 64,
    adapter: int | None = None,
    time_left_s: float | None = None,
    traceparent: str = "",
) -> scheduler_pb2.WorkItem:
    """A WorkItem as a gateway would resolve it."""
    item = scheduler_pb2.WorkItem(
        request_id=request_id,
        attempt=attempt,
        token_ids=[7] * (tokens + prior_tokens),
        prompt_tokens=tokens,
        sampling=common_pb2.SamplingParams(
            temperature=0,
            top_p=1,
            top_k=0,
            min_p=0,
            seed=1,
            presence_penalty=0,
            frequency_penalty=0,
            repetition_penalty=1,
        ),
        stopping=common_pb2.StopConditions(max_tokens=max_tokens),
        tenant="default",
        predicted_output_tokens=max_tokens // 2,
        gateway_id=gateway_id,
        traceparent=traceparent,
    )
    if adapter is not None:
        item.adapter.CopyFrom(
            common_pb2.AdapterRef(digest=digest_of(adapter), rank=8, size_bytes=1_000_000)
        )
    if time_left_s is not None:
        item.time_left.FromNanoseconds(int(time_left_s * 1e9))
    return item


class Peer:
    """One stream: messages that arrive are sorted by their kind."""

    def __init__(self, address: str, peer_id: str) -> None:
        self.peer_id = peer_id
        self._channel = open_channel(address)
        self.stub = scheduler_pb2_grpc.SchedulerServiceStub(self._channel)
        self._arrived: defaultdict[str, asyncio.Queue[Any]] = defaultdict(asyncio.Queue)
        self._reader: asyncio.Task[None] | None = None
        self._call: Any = None
        self.ended: asyncio.Future[grpc.aio.AioRpcError | None] = asyncio.Future()

    async def open(self, call: Any, hello: Any, *, reads: bool = True) -> None:
        """Start the stream; with `reads` off nothing is ever taken from it."""
        self._call = call
        await call.write(hello)
        if reads:
            self._reader = asyncio.create_task(self._read())

    async def write(self, message: Any) -> None:
        """Send a message."""
        await self._call.write(message)

    async def take(self, kind: str, *, wait_s: float = WAIT_S) -> Any:
        """The next message of that kind."""
        async with asyncio.timeout(wait_s):
            return await self._arrived[kind].get()

    def waiting(self, kind: str) -> int:
        """Messages of that kind that nobody took yet."""
        return self._arrived[kind].qsize()

    async def failure(self, *, wait_s: float = WAIT_S) -> grpc.aio.AioRpcError:
        """The error that the stream ends with."""
        error = await asyncio.wait_for(asyncio.shield(self.ended), wait_s)
        assert error is not None, "the stream ended normally"
        return error

    async def state(self) -> scheduler_pb2.GetStateResponse:
        """What the scheduler says of itself."""
        response: scheduler_pb2.GetStateResponse = await self.stub.GetState(
            scheduler_pb2.GetStateRequest(), timeout=WAIT_S
        )
        return response

    async def half_close(self) -> None:
        """Say that nothing more will come."""
        await self._call.done_writing()

    async def close(self) -> None:
        """Drop the connection."""
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        await self._channel.close()

    async def received(self, kind: str, message: Any) -> None:
        """Sort a message in. A worker that answers by itself overrides this."""
        self._arrived[kind].put_nowait(message)

    async def _read(self) -> None:
        try:
            async for response in self._call:
                kind = response.WhichOneof("message")
                await self.received(kind, getattr(response, kind))
        except grpc.aio.AioRpcError as error:
            self.ended.set_result(error)
        else:
            self.ended.set_result(None)


class GatewayPeer(Peer):
    """Speaks Submit."""

    async def connect(
        self, placed: Iterable[tuple[str, int, str]] = (), *, reads: bool = True
    ) -> "GatewayPeer":
        """Open the stream, announcing (request, attempt, worker) as placed."""
        hello = scheduler_pb2.GatewayHello(gateway_id=self.peer_id)
        for request_id, number, worker_id in placed:
            attempt = scheduler_pb2.Attempt(request_id=request_id, attempt=number)
            hello.placed.add(attempt=attempt, worker_id=worker_id)
        request = scheduler_pb2.SubmitRequest(hello=hello)
        await self.open(self.stub.Submit(), request, reads=reads)
        if reads:
            await self.take("welcome")
        return self

    async def submit(self, item: scheduler_pb2.WorkItem) -> None:
        """Submit a request."""
        await self.write(scheduler_pb2.SubmitRequest(submit=item))

    async def cancel(self, request_id: str, attempt: int = 1) -> None:
        """Cancel one."""
        cancel = scheduler_pb2.CancelRequest(
            attempt=scheduler_pb2.Attempt(request_id=request_id, attempt=attempt),
            cause="client_cancelled",
        )
        await self.write(scheduler_pb2.SubmitRequest(cancel=cancel))


class WorkerPeer(Peer):
    """Speaks Attach. An eager one starts and finishes whatever it is given."""

    def __init__(self, address: str, peer_id: str, *, is_eager: bool = False) -> None:
        super().__init__(address, peer_id)
        self._is_eager = is_eager
        self.items: list[scheduler_pb2.WorkItem] = []
        self.batches = 0

    async def connect(
        self,
        running: Iterable[tuple[str, int, str]] = (),
        *,
        reads: bool = True,
        max_requests: int = 8,
        pool_blocks: int = 4096,
        base_model_digest: str = BASE_MODEL,
        welcome: bool = True,
        device: Iterable[int] = (),
        host: Iterable[int] = (),
    ) -> "WorkerPeer":
        """Open the stream, announcing (request, attempt, gateway) as running, and adapters."""
        hello = scheduler_pb2.WorkerHello(
            worker_id=self.peer_id,
            address=f"{self.peer_id}.test:7102",
            base_model_digest=base_model_digest,
            capacity=scheduler_pb2.WorkerCapacity(
                pool_blocks=pool_blocks,
                block_bytes=65536,
                block_tokens=16,
                max_requests=max_requests,
                max_context_tokens=16384,
            ),
            status=device_status(*device, free_blocks=pool_blocks),
            host_cache=host_cache(*host),
        )
        for request_id, number, gateway_id in running:
            hello.running.add(
                attempt=scheduler_pb2.Attempt(request_id=request_id, attempt=number),
                gateway_id=gateway_id,
                context_tokens=8,
                predicted_output_tokens=32,
            )
        request = scheduler_pb2.AttachRequest(hello=hello)
        await self.open(self.stub.Attach(), request, reads=reads)
        if reads and welcome:
            await self.take("welcome")
        return self

    async def dispatched(self) -> scheduler_pb2.WorkItem:
        """The one item of the next batch."""
        (item,) = (await self.take("dispatch")).items
        work: scheduler_pb2.WorkItem = item
        return work

    async def report(self, status: scheduler_pb2.WorkerStatus) -> None:
        """Send a status."""
        await self.write(scheduler_pb2.AttachRequest(status=status))

    async def report_host(self, *adapters: int) -> None:
        """Send what is in host memory."""
        await self.write(scheduler_pb2.AttachRequest(host_cache=host_cache(*adapters)))

    async def started(self, request_id: str, attempt: int = 1) -> None:
        """Say that a request has begun."""
        named = scheduler_pb2.Attempt(request_id=request_id, attempt=attempt)
        started = scheduler_pb2.RequestStarted(attempt=named)
        await self.write(scheduler_pb2.AttachRequest(started=started))

    async def finished(self, request_id: str, attempt: int = 1) -> None:
        """Say that a request has ended."""
        finished = scheduler_pb2.RequestFinished(
            attempt=scheduler_pb2.Attempt(request_id=request_id, attempt=attempt),
            finish_reason=common_pb2.FINISH_REASON_STOP,
            output_tokens=5,
        )
        await self.write(scheduler_pb2.AttachRequest(finished=finished))

    async def received(self, kind: str, message: Any) -> None:
        """Answer a dispatch at once when eager."""
        if kind != "dispatch" or not self._is_eager:
            await super().received(kind, message)
            return
        self.batches += 1
        for item in message.items:
            self.items.append(item)
            await self.started(item.request_id, item.attempt)
            await self.finished(item.request_id, item.attempt)
