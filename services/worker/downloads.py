"""Fetching adapter blobs from the adapter store: resumed when a stream breaks, verified at the end.

One channel for all. A broken or silent stream is opened again where it stopped, until `TRIES` in a
row brought nothing or `DOWNLOAD_S_MAX` is over. A silent one counts for several, because it costs
the time in which others might load. Whatever comes out has the digest that was asked for, or is an
`RpcError` fit for the client.
"""

import asyncio
from concurrent.futures import Executor
from typing import Final, cast

import grpc
import grpc.aio

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from calumma.adapter_store.v1 import adapter_store_pb2_grpc as pb_grpc
from services.common.adapter_container import digest_of
from services.common.clients import Backoff
from services.common.errors import Reason, RpcError
from services.common.telemetry import call_metadata
from services.core.types import Adapter

TRIES: Final = 5
SILENT_TRIES: Final = 3
DOWNLOAD_S_MAX: Final = 600.0
_RETRIED: Final = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}


class AdapterDownloads:
    """The worker's side of `Download`. `executor` does the hashing."""

    def __init__(
        self, channel: grpc.aio.Channel, *, read_timeout_s: float, executor: Executor
    ) -> None:
        self._stub = pb_grpc.AdapterStoreServiceStub(channel)
        self._read_timeout_s = read_timeout_s
        self._executor = executor

    async def fetch(self, adapter: Adapter) -> bytearray:
        """The blob of an adapter. Raises RpcError."""
        try:
            async with asyncio.timeout(DOWNLOAD_S_MAX):
                blob = await self._collect(adapter)
        except TimeoutError as error:
            raise _failure(error, adapter) from error
        loop = asyncio.get_running_loop()
        digest = await loop.run_in_executor(self._executor, digest_of, blob)
        if digest != adapter.digest:
            raise _corrupt(adapter, f"its bytes have the digest {digest}")
        return blob

    async def _collect(self, adapter: Adapter) -> bytearray:
        """As many streams as it takes, while each brings something."""
        blob = bytearray()
        backoff = Backoff(base_s=0.1, cap_s=1.0)
        tries = 0
        while True:
            held_bytes = len(blob)
            try:
                await self._receive(adapter, blob)
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                if len(blob) > held_bytes:
                    tries = 0
                    backoff.reset()
                tries += SILENT_TRIES if isinstance(error, TimeoutError) else 1
                is_final = isinstance(error, grpc.aio.AioRpcError) and error.code() not in _RETRIED
                if is_final or tries >= TRIES:
                    raise _failure(error, adapter) from error
            else:
                return blob
            await asyncio.sleep(backoff.next_delay_s())

    async def _receive(self, adapter: Adapter, blob: bytearray) -> None:
        """Append to `blob` all that it lacks, and let the store end the call."""
        call = self._stub.Download(
            pb.DownloadRequest(digest=adapter.digest, offset=len(blob)),
            metadata=call_metadata(),
            timeout=DOWNLOAD_S_MAX,
        )
        try:
            while True:
                message = await asyncio.wait_for(call.read(), self._read_timeout_s)
                if message is grpc.aio.EOF:
                    break
                _append(cast("pb.DownloadResponse", message), adapter, blob)
        finally:
            call.cancel()
        if len(blob) < adapter.size_bytes:
            raise _corrupt(adapter, f"the store ended it after {len(blob)} bytes")


def _append(part: pb.DownloadResponse, adapter: Adapter, blob: bytearray) -> None:
    if part.total_bytes != adapter.size_bytes:
        raise _corrupt(adapter, f"{part.total_bytes} bytes instead of {adapter.size_bytes}")
    if part.offset != len(blob) or part.offset + len(part.data) > adapter.size_bytes:
        raise _corrupt(adapter, f"a part at {part.offset} where {len(blob)} was due")
    blob += part.data


def _corrupt(adapter: Adapter, what: str) -> RpcError:
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
