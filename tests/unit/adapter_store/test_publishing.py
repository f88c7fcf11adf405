import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from services.adapter_store.blobs import Blobs, blob_path
from services.adapter_store.changes import Terms, delete_all
from services.adapter_store.collect import Collector
from services.adapter_store.disk_cache import DiskCache
from services.adapter_store.entries import Provenance
from services.adapter_store.peft import BaseModel
from services.adapter_store.publishing import Published, Publisher
from services.adapter_store.registry import Registry
from services.adapter_store.storage import ObjectStorage, Timeouts, open_storage
from services.adapter_store.upload import CHUNK_BYTES_MAX, Metadata, Spool, receive
from services.common.errors import Reason, RpcError
from tests.support.peft_folders import CONFIG_FILE, WEIGHTS_FILE, write_peft_folder

Shapes = dict[str, tuple[int, int]]


class Store:
    """The parts that publish, on a folder."""

    def __init__(self, folder: Path, base: BaseModel, threads: ThreadPoolExecutor) -> None:
        self.folder = folder
        self.threads = threads
        self.storage: ObjectStorage = open_storage((folder / "store").as_uri(), Timeouts())
        self.registry = Registry(self.storage)
        self.blobs = Blobs(self.storage, DiskCache(folder / "cache", bytes_max=2**30))
        self.publisher = Publisher(
            self.registry, self.blobs, base=base, rank_max=64, threads=threads
        )

    async def publish(self, peft: Path, name: str = "a", **metadata: Any) -> Published:
        spool = Spool(self.folder, bytes_max=2**30)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            spool.append(file, (peft / file).read_bytes())
        try:
            known = Metadata(name)
            return await self.publisher.publish(replace(known, **metadata), spool)
        finally:
            spool.close()

    async def stored(self) -> set[str]:
        return {info.path for info in await self.storage.list("blobs")}


@pytest.fixture
async def store(tmp_path: Path, base: BaseModel) -> AsyncIterator[Store]:
    with ThreadPoolExecutor(2) as threads:
        store = Store(tmp_path, base, threads)
        await store.registry.sync()
        yield store
        await store.blobs.close()


@pytest.fixture
def peft(tmp_path: Path, shapes: Shapes) -> Path:
    write_peft_folder(tmp_path / "peft", shapes=shapes, num_layers=2)
    return tmp_path / "peft"


def _path(published: Published) -> str:
    return blob_path(published.version.weights.digest)


async def test_a_published_adapter_can_be_read_back(store: Store, peft: Path) -> None:
    published = await store.publish(peft, terms=Terms(("stable",)))
    digest = published.version.weights.digest
    data = b"".join([chunk.data async for chunk in store.blobs.read(digest, offset=0)])
    assert len(data) == published.version.weights.size_bytes
    assert not published.already_published
    assert published.version.number == 1


async def test_publishing_again_makes_no_version(store: Store, peft: Path) -> None:
    first = await store.publish(peft)
    again = await store.publish(peft, terms=Terms(("stable",)))
    assert again.already_published
    assert again.version == first.version
    assert store.registry.live_entry("a").aliases == {"stable": 1}  # type: ignore[union-attr]


async def test_a_version_says_where_it_came_from(store: Store, peft: Path) -> None:
    terms = Terms(labels={"team": "x"}, provenance=Provenance(source="run 7", publisher="acme"))
    version = (await store.publish(peft, terms=terms)).version
    config, data = ((peft / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE))
    assert version.labels == {"team": "x"}
    assert version.provenance == Provenance(
        source="run 7",
        publisher="acme",
        peft_version=json.loads(config).get("peft_version", ""),
        config_sha256=hashlib.sha256(config).hexdigest(),
        weights_sha256=hashlib.sha256(data).hexdigest(),
    )


async def test_a_dry_run_is_refused_for_what_publishing_is_refused_for(
    store: Store, peft: Path
) -> None:
    await store.publish(peft)
    for dry_run in (True, False):
        with pytest.raises(RpcError) as caught:
            await store.publish(peft, terms=Terms(number=2), dry_run=dry_run)
        assert caught.value.reason is Reason.ADAPTER_VERSION_EXISTS


async def test_a_name_of_others_is_refused_before_anything_is_stored(
    store: Store, peft: Path
) -> None:
    await store.publish(peft, terms=Terms(tenants=("acme",)))
    before = await store.stored()
    for dry_run in (True, False):
        terms = Terms(provenance=Provenance(publisher="other"))
        with pytest.raises(RpcError) as caught:
            await store.publish(peft, terms=terms, dry_run=dry_run)
        assert caught.value.reason is Reason.PERMISSION_DENIED
    assert await store.stored() == before


async def test_a_dry_run_reports_and_leaves_nothing(store: Store, peft: Path) -> None:
    report = await store.publish(peft, dry_run=True)
    assert report.version.number == 0
    assert len(report.bindings) == 4
    assert await store.storage.list("registry") == []
    assert await store.stored() == set()
    await store.publish(peft)
    assert (await store.publish(peft, dry_run=True)).already_published


async def test_publishing_again_restores_a_lost_blob(store: Store, peft: Path) -> None:
    first = await store.publish(peft)
    await store.storage.delete(_path(first))
    assert (await store.publish(peft)).already_published
    assert await store.stored() == {_path(first)}


async def test_a_publish_that_dies_before_the_registry_leaves_the_old_state(
    store: Store, peft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*_: object) -> bool:
        raise RpcError(Reason.OBJECT_STORAGE_UNAVAILABLE, "killed")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "create", die)
        with pytest.raises(RpcError):
            await store.publish(peft)
    assert len(await store.stored()) == 1  # the orphan
    assert store.registry.live_entry("a") is None
    assert (await store.publish(peft)).version.number == 1


async def test_a_blob_without_a_version_is_collected_when_it_is_old_enough(
    store: Store, peft: Path, shapes: Shapes, tmp_path: Path
) -> None:
    write_peft_folder(tmp_path / "other", shapes=shapes, num_layers=2, seed=1)
    kept = await store.publish(peft, "kept")
    await store.publish(peft, "same-weights")
    gone = await store.publish(tmp_path / "other", "gone")
    await store.registry.change("gone", delete_all)
    await store.registry.change("same-weights", delete_all)
    assert await Collector(store.storage, store.registry, safety_age_s=3600).collect() == 0
    collector = Collector(store.storage, store.registry, safety_age_s=0.05)
    assert await collector.collect() == 0  # it has only just been seen without a version
    await asyncio.sleep(0.1)
    assert await store.stored() == {_path(kept), _path(gone)}
    assert await collector.collect() == 1
    assert await store.stored() == {_path(kept)}


async def test_nothing_is_collected_while_an_adapter_cannot_be_read(
    store: Store, peft: Path
) -> None:
    await store.publish(peft)
    await store.storage.create("registry/b/000000000001.json", b"broken")
    await store.registry.change("a", delete_all)
    assert await Collector(store.storage, store.registry, safety_age_s=0).collect() == 0
    assert len(await store.stored()) == 1


async def test_a_collector_that_deletes_late_costs_no_adapter(
    store: Store, peft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = await store.publish(peft, dry_run=True)
    change = store.registry.change

    async def change_while_collected(name: str, decide: Any) -> Any:
        await store.storage.delete(_path(published))
        return await change(name, decide)

    monkeypatch.setattr(store.registry, "change", change_while_collected)
    await store.publish(peft)
    assert await store.stored() == {_path(published)}


# Receiving


def _metadata(**fields: Any) -> pb.PublishRequest:
    fields.setdefault("name", "a")
    return pb.PublishRequest(metadata=pb.PublishMetadata(**fields))


def _chunk(file: str = CONFIG_FILE, data: bytes = b"{}") -> pb.PublishRequest:
    return pb.PublishRequest(chunk=pb.FileChunk(file=file, data=data))


async def _receive(
    tmp_path: Path, *messages: pb.PublishRequest, bytes_max: int = 2**30
) -> Metadata:
    async def stream() -> AsyncIterator[pb.PublishRequest]:
        for message in messages:
            yield message

    spool = Spool(tmp_path, bytes_max=bytes_max)
    with ThreadPoolExecutor(1) as threads:
        try:
            metadata = await receive(stream(), spool, idle_s=5, threads=threads)
            with spool.contents() as (config, weights):
                assert config + bytes(weights)
            return metadata
        finally:
            spool.close()


async def test_a_whole_upload_is_received(tmp_path: Path) -> None:
    metadata = await _receive(
        tmp_path,
        _metadata(
            aliases=["x"],
            dry_run=True,
            version=3,
            labels={"b": "2", "a": "1"},
            source="run 7",
            tenants=["b", "a", "b"],
            tenant="a",
        ),
        _chunk(),
        _chunk(WEIGHTS_FILE, b"123"),
        _chunk(WEIGHTS_FILE, b"456"),
    )
    terms = Terms(
        ("x",), 3, {"a": "1", "b": "2"}, ("a", "b"), Provenance(source="run 7", publisher="a")
    )
    assert metadata == Metadata("a", dry_run=True, terms=terms)
    assert list(metadata.terms.labels) == ["a", "b"]


WRONG = Reason.INVALID_FIELD
UNSUPPORTED = Reason.ADAPTER_UNSUPPORTED
LIMIT = Reason.FIELD_LIMIT_EXCEEDED
INVALID = Reason.ADAPTER_INVALID
W = _chunk(WEIGHTS_FILE, b"123")
BAD_UPLOADS: dict[str, tuple[list[pb.PublishRequest], Reason, str]] = {
    "nothing": ([], WRONG, "message"),
    "empty message": ([pb.PublishRequest()], WRONG, "message"),
    "empty message later": ([_metadata(), pb.PublishRequest()], WRONG, "message"),
    "chunk first": ([_chunk(), _metadata()], WRONG, "message"),
    "metadata twice": ([_metadata(), _metadata()], WRONG, "message"),
    "no name": ([_metadata(name="")], WRONG, "metadata.name"),
    "path as name": ([_metadata(name="../x")], WRONG, "metadata.name"),
    "digits as alias": ([_metadata(aliases=["12"])], WRONG, "metadata.aliases"),
    "many aliases": ([_metadata(aliases=["x"] * 17)], LIMIT, "metadata.aliases"),
    "name with a slash": ([_metadata(name="a/b")], WRONG, "metadata.name"),
    "name with a comma": ([_metadata(name="a,b")], WRONG, "metadata.name"),
    "name with NUL": ([_metadata(name="a\0")], WRONG, "metadata.name"),
    "name of 10 KB": ([_metadata(name="a" * 10_240)], WRONG, "metadata.name"),
    "lookalike name": ([_metadata(name="\u0430dapter")], WRONG, "metadata.name"),
    "version -1": ([_metadata(version=-1)], WRONG, "metadata.version"),
    "version 10^15": ([_metadata(version=10**15)], WRONG, "metadata.version"),
    "33 labels": ([_metadata(labels={f"k{n}": "" for n in range(33)})], LIMIT, "metadata.labels"),
    "no label key": ([_metadata(labels={"": "x"})], WRONG, "metadata.labels"),
    "label key A": ([_metadata(labels={"A": "x"})], WRONG, "metadata.labels"),
    "long label key": ([_metadata(labels={"k" * 65: "x"})], WRONG, "metadata.labels"),
    "long label": ([_metadata(labels={"k": "x" * 257})], LIMIT, "metadata.labels"),
    "label with escape": ([_metadata(labels={"k": "\x1b[2J"})], WRONG, "metadata.labels"),
    "long source": ([_metadata(source="x" * 513)], LIMIT, "metadata.source"),
    "source with NUL": ([_metadata(source="\0")], WRONG, "metadata.source"),
    "tenant with space": ([_metadata(tenants=["a b"])], WRONG, "metadata.tenants"),
    "no tenant": ([_metadata(tenants=[""])], WRONG, "metadata.tenants"),
    "1001 tenants": (
        [_metadata(tenants=[f"t{n}" for n in range(1001)])],
        LIMIT,
        "metadata.tenants",
    ),
    "lookalike tenant": ([_metadata(tenant="\u0430cme")], WRONG, "metadata.tenant"),
    "not for its publisher": (
        [_metadata(tenants=["a"], tenant="b")],
        WRONG,
        "metadata.tenants",
    ),
    "pickle": ([_metadata(), _chunk("adapter_model.bin")], UNSUPPORTED, "chunk.file"),
    "path as file": ([_metadata(), _chunk("../adapter_config.json")], UNSUPPORTED, "chunk.file"),
    "no file name": ([_metadata(), _chunk("")], UNSUPPORTED, "chunk.file"),
    "no weights": ([_metadata(), _chunk()], INVALID, "chunk.file"),
    "no config": ([_metadata(), W], INVALID, "chunk.file"),
    "empty config": ([_metadata(), _chunk(data=b""), W], INVALID, "chunk.file"),
    "empty weights": ([_metadata(), _chunk(), _chunk(WEIGHTS_FILE, b"")], INVALID, "chunk.file"),
    "only metadata": ([_metadata()], INVALID, "chunk.file"),
    "files mixed": ([_metadata(), _chunk(), W, _chunk()], WRONG, "chunk.file"),
    "large chunk": ([_metadata(), _chunk(data=bytes(CHUNK_BYTES_MAX + 1))], LIMIT, "chunk.data"),
    "large config": ([_metadata(), *[_chunk(data=bytes(2**19 + 1))] * 2], LIMIT, "chunk.data"),
    "large upload": ([_metadata(), *[_chunk(WEIGHTS_FILE, bytes(2**20))] * 3], LIMIT, "chunk.data"),
}


@pytest.mark.parametrize("what", BAD_UPLOADS)
async def test_an_upload_out_of_order_or_over_a_limit_is_refused(what: str, tmp_path: Path) -> None:
    messages, reason, field = BAD_UPLOADS[what]
    with pytest.raises(RpcError) as caught:
        await _receive(tmp_path, *messages, bytes_max=2**21)
    assert caught.value.reason is reason
    assert caught.value.context.field == field
    left = [*tmp_path.iterdir()]  # noqa: ASYNC240 - a look, not a wait
    assert left == []


async def test_an_upload_that_falls_silent_is_ended(tmp_path: Path) -> None:
    async def silent() -> AsyncIterator[pb.PublishRequest]:
        yield _metadata()
        await asyncio.sleep(60)

    spool = Spool(tmp_path, bytes_max=2**20)
    with ThreadPoolExecutor(1) as threads, pytest.raises(RpcError) as caught:
        await receive(silent(), spool, idle_s=0.05, threads=threads)
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
