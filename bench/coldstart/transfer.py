"""How fast a worker takes an adapter from the store, against a plain gRPC stream.

The plain stream has the same bytes in messages of 1 MiB from memory; its server is a process of its
own, as the store is. The worker's part is its own code: bytes into the arena, each layer verified
as it comes, the engine told of it (which on the CPU costs nothing, so nothing stands in for it).
The memory is used again and again, as an arena's is; the first turn, which brings its pages, does
not count.
"""

import asyncio
import multiprocessing
import os
import socket
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from services.common.adapter_container import ContainerHeader
from services.common.clients import open_channel
from services.common.memory import keep_freed_memory
from services.core.types import Adapter, AdapterDigest
from services.worker.arena import HostArena
from services.worker.downloads import AdapterDownloads
from services.worker.intake import PARTS_MAX, ArrivingBytes, Intake

MESSAGE_BYTES: Final = 2**20
_SERVICE: Final = "calumma.bench.Plain"
_START_S_MAX: Final = 30.0


class _Views:
    """The part of an engine on the CPU that a load calls: it only looks at the bytes."""

    def begin_adapter(
        self,
        digest: str,
        header: ContainerHeader,
        payload: memoryview,
        *,
        blocks: tuple[int, ...] = (),
    ) -> None:
        del digest, header, payload, blocks

    def extend_adapter(self, digest: str, layers: int) -> None:
        del digest, layers


async def rates(
    store: str, digests: Sequence[tuple[str, int]], *, turns: int
) -> dict[str, list[float]]:
    """Bytes per second of each turn, the two in turns. `digests`: with their sizes in bytes."""
    keep_freed_memory()  # as a worker does
    size_bytes = digests[0][1]
    port = _free_port()
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=serve_plain, args=(port, size_bytes), daemon=True)
    server.start()
    found: dict[str, list[float]] = {"plain": [], "worker": []}
    into = HostArena(size_bytes + 2**12)
    try:
        async with open_channel(f"127.0.0.1:{port}") as plain, open_channel(store) as channel:
            await asyncio.wait_for(plain.channel_ready(), _START_S_MAX)
            await _plain_rate(plain, size_bytes)  # the first calls of either are slower
            await _worker_rate(channel, into, *digests[0])
            for turn in range(turns):
                found["plain"].append(await _plain_rate(plain, size_bytes))
                digest = digests[turn % len(digests)]
                found["worker"].append(await _worker_rate(channel, into, *digest))
    finally:
        server.kill()
        server.join()
    return found


async def _plain_rate(channel: grpc.aio.Channel, size_bytes: int) -> float:
    call: Any = channel.unary_stream(
        f"/{_SERVICE}/Send",
        request_serializer=pb.DownloadRequest.SerializeToString,
        response_deserializer=pb.DownloadResponse.FromString,
    )
    started_s = time.perf_counter()
    received_bytes = 0
    async for part in call(pb.DownloadRequest()):
        received_bytes += len(part.data)
    assert received_bytes == size_bytes
    return size_bytes / (time.perf_counter() - started_s)


async def _worker_rate(
    channel: grpc.aio.Channel, into: HostArena, digest: str, size_bytes: int
) -> float:
    adapter = Adapter(AdapterDigest(digest), 1, size_bytes)
    slab = into.take(size_bytes)
    assert slab is not None
    downloads = AdapterDownloads(channel, read_timeout_s=10.0)
    with ThreadPoolExecutor(1) as executor:
        started_s = time.perf_counter()
        intake = Intake(
            adapter,
            slab.view,
            blocks=(),
            engine=_Views(),
            num_layers=30,
            parts_max=PARTS_MAX,
            on_layers=lambda _: None,
        )
        arriving = ArrivingBytes(intake, executor)
        await downloads.fetch(adapter, slab.view, arriving.note)
        await arriving.finish()
        took_s = time.perf_counter() - started_s
    slab.release()
    return size_bytes / took_s


def serve_plain(port: int, size_bytes: int) -> None:
    """A process that streams so many bytes from memory to whoever calls."""
    keep_freed_memory()
    asyncio.run(_serve_plain(port, size_bytes))


async def _serve_plain(port: int, size_bytes: int) -> None:
    starts = range(0, size_bytes, MESSAGE_BYTES)
    parts = {start: os.urandom(min(MESSAGE_BYTES, size_bytes - start)) for start in starts}

    async def send(_request: pb.DownloadRequest, _context: Any) -> AsyncIterator[Any]:
        for offset, part in parts.items():
            yield pb.DownloadResponse(offset=offset, data=part, total_bytes=size_bytes)

    server = grpc.aio.server(options=[("grpc.max_send_message_length", 2 * MESSAGE_BYTES)])
    method = grpc.unary_stream_rpc_method_handler(
        send,
        request_deserializer=pb.DownloadRequest.FromString,
        response_serializer=pb.DownloadResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_SERVICE, {"Send": method}),)
    )
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
