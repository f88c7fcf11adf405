"""Fetching adapter blobs from the adapter store, each byte once, straight to where it belongs.

One channel for all. A broken or silent stream is opened again where it stopped, until `TRIES` in a
row brought nothing or `DOWNLOAD_S_MAX` is over. A silent one counts for several, because it costs
the time in which others might load. Nothing is checked here but order and size: `Intake` verifies
the bytes as they come.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import grpc
import grpc.aio
import numpy as np

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from services.common.clients import Backoff
from services.common.errors import Reason, RpcError
from services.common.telemetry import call_metadata
from services.core.types import Adapter
from services.worker.blob_parts import BlobPart, read_part

TRIES: Final = 5
SILENT_TRIES: Final = 3
DOWNLOAD_S_MAX: Final = 600.0
_METHOD: Final = "/calumma.adapter_store.v1.AdapterStoreService/Download"
_RETRIED: Final = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}
OnReceived = Callable[[int], None]  # told how many bytes from the start are there; may raise


class AdapterDownloads:
    """The worker's side of `Download`."""

    def __init__(self, channel: grpc.aio.Channel, *, read_timeout_s: float) -> None:
        # Messages stay bytes: see `blob_parts`.
        self._download: Any = channel.unary_stream(
            _METHOD, request_serializer=pb.DownloadRequest.SerializeToString
        )
        self._read_timeout_s = read_timeout_s

    async def fetch(self, adapter: Adapter, into: memoryview, on_received: OnReceived) -> None:
        """Fill `into`, which has the adapter's size. Raises RpcError, and what `on_received` does.

        What is there when this fails is not to be used.
        """
        assert len(into) == adapter.size_bytes
        try:
            async with asyncio.timeout(DOWNLOAD_S_MAX):
                await self._collect(_Filling(adapter, into, on_received))
        except TimeoutError as error:
            raise _failure(error, adapter) from error

    async def _collect(self, filling: "_Filling") -> None:
        """As many streams as it takes, while each brings something."""
        backoff = Backoff(base_s=0.1, cap_s=1.0)
        tries = 0
        while True:
            held_bytes = filling.received_bytes
            try:
                await self._receive(filling)
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                if filling.received_bytes > held_bytes:
                    tries = 0
                    backoff.reset()
                tries += SILENT_TRIES if isinstance(error, TimeoutError) else 1
                is_final = isinstance(error, grpc.aio.AioRpcError) and error.code() not in _RETRIED
                if is_final or tries >= TRIES:
                    raise _failure(error, filling.adapter) from error
            else:
                return
            await asyncio.sleep(backoff.next_delay_s())

    async def _receive(self, filling: "_Filling") -> None:
        """Receive all that is missing, and let the store end the call."""
        request = pb.DownloadRequest(digest=filling.adapter.digest, offset=filling.received_bytes)
        call = self._download(request, metadata=call_metadata(), timeout=DOWNLOAD_S_MAX)
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(self._read_timeout_s) as silence:
                while True:
                    message = await call.read()
                    if message is grpc.aio.EOF:
                        break
                    filling.take(message)
                    silence.reschedule(clock() + self._read_timeout_s)
        finally:
            call.cancel()
        filling.check_is_whole()


class _Filling:
    """A blob of which `received_bytes` are there."""

    def __init__(self, adapter: Adapter, into: memoryview, on_received: OnReceived) -> None:
        self.adapter = adapter
        self.received_bytes = 0
        # Numpy lets other threads run while it copies: a step need not wait for a megabyte.
        self._into = np.frombuffer(into, dtype=np.uint8)
        self._on_received = on_received

    def take(self, message: bytes) -> None:
        """Put the next part where it belongs. Raises RpcError."""
        part = self._checked(message)
        end = part.offset + len(part.data)
        self._into[part.offset : end] = np.frombuffer(part.data, dtype=np.uint8)
        self.received_bytes = end
        self._on_received(end)

    def check_is_whole(self) -> None:
        """Raises RpcError."""
        if self.received_bytes < self.adapter.size_bytes:
            raise corrupt(self.adapter, f"the store ended it after {self.received_bytes} bytes")

    def _checked(self, message: bytes) -> BlobPart:
        try:
            part = read_part(message)
        except ValueError as error:
            raise corrupt(self.adapter, f"a part that can't be read: {error}") from error
        size_bytes = self.adapter.size_bytes
        if part.total_bytes != size_bytes:
            raise corrupt(self.adapter, f"{part.total_bytes} bytes instead of {size_bytes}")
        if part.offset != self.received_bytes or part.offset + len(part.data) > size_bytes:
            what = f"a part at {part.offset} where {self.received_bytes} was due"
            raise corrupt(self.adapter, what)
        return part


def corrupt(adapter: Adapter, what: str) -> RpcError:
    """The bytes are not the adapter's."""
    return RpcError(
        Reason.ADAPTER_CORRUPT,
        f"adapter {adapter.digest}: {what}",
        stage="adapter_load",
        resource=("adapter", adapter.digest),
    )


def _failure(error: Exception, adapter: Adapter) -> RpcError:
    """The store's own error, or what its silence means."""
    resource = ("adapter", adapter.digest)
    if isinstance(error, grpc.aio.AioRpcError):
        told = RpcError.from_rpc(error)
        if told is not None:
            return RpcError(
                told.reason,
                told.message,
                stage="adapter_load",
                resource=resource,
                retry_after_s=told.context.retry_after_s,
            )
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return RpcError(
                Reason.ADAPTER_NOT_FOUND,
                f"adapter {adapter.digest} is not in the store",
                stage="adapter_load",
                resource=resource,
            )
    return RpcError(
        Reason.STORE_UNAVAILABLE,
        "the adapter store does not answer",
        stage="adapter_load",
        resource=resource,
        retry_after_s=1.0,
    )
