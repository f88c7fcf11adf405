import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from services.adapter_store import entries
from services.adapter_store.collect import Collector
from services.adapter_store.entries import Entry, Weights, from_json, to_json
from services.adapter_store.references import parse_reference
from services.adapter_store.registry import Registry, document_path
from services.adapter_store.storage import (
    ObjectInfo,
    ObjectStorage,
    Timeouts,
    open_storage,
    unavailable,
)
from services.adapter_store.watching import Deleted, Synced, Updated
from services.common.errors import Reason, RpcError


class FaultyStorage:
    """Storage that fails when told to: before a write, after it, or at every read."""

    def __init__(self, inner: ObjectStorage) -> None:
        self._inner = inner
        self.down = False
        self.fail_before_create = 0
        self.fail_after_create = 0
        self.create_twice = 0
        self.calls = 0
        self.conflicts = 0

    def _check(self) -> None:
        self.calls += 1
        if self.down:
            raise unavailable("switched off")

    async def create(self, path: str, data: bytes) -> bool:
        self._check()
        if self.fail_before_create:
            self.fail_before_create -= 1
            raise unavailable("lost before the write")
        created = await self._inner.create(path, data)
        self.conflicts += not created
        if self.create_twice:  # what a retry below does when the first answer is lost
            self.create_twice -= 1
            return await self._inner.create(path, data)
        if self.fail_after_create:
            self.fail_after_create -= 1
            raise unavailable("lost after the write")
        return created

    async def put(self, path: str, data: bytes) -> None:
        self._check()
        await self._inner.put(path, data)

    async def get(self, path: str) -> bytes | None:
        self._check()
        return await self._inner.get(path)

    async def head(self, path: str) -> ObjectInfo | None:
        self._check()
        return await self._inner.head(path)

    def stream(self, path: str, *, offset: int) -> AsyncGenerator[bytes]:
        self._check()
        return self._inner.stream(path, offset=offset)

    async def list(self, prefix: str) -> list[ObjectInfo]:
        self._check()
        return await self._inner.list(prefix)

    async def delete(self, path: str) -> None:
        self._check()
        await self._inner.delete(path)


@pytest.fixture
def storage(tmp_path: Path) -> FaultyStorage:
    inner = open_storage((tmp_path / "store").as_uri(), Timeouts())
    return FaultyStorage(inner)


async def _synced(storage: FaultyStorage, **options: Any) -> Registry:
    registry = Registry(storage, **options)
    await registry.sync()
    return registry


def _weights(number: int) -> Weights:
    return Weights(f"sha256:{number:064x}", 8, 1000, ("q_proj",), "BF16", "acme/base", 512)


async def _publish(registry: Registry, name: str, number: int, *aliases: str) -> Entry:
    decide = partial(entries.publish, weights=_weights(number), aliases=aliases, now_ns=1)
    return await registry.change(name, decide)


async def _digest(registry: Registry, reference: str) -> int:
    version, _ = await registry.get(parse_reference(reference))
    return int(version.weights.digest.removeprefix("sha256:"), 16)


async def test_a_reference_resolves_by_name_version_and_alias(storage: FaultyStorage) -> None:
    registry = await _synced(storage)
    await _publish(registry, "a", 1, "stable")
    await _publish(registry, "a", 2)
    assert await _digest(registry, "a") == 2
    assert await _digest(registry, "a@1") == 1
    assert await _digest(registry, "a@stable") == 1
    registry.check_integrity()


@pytest.mark.parametrize(
    ("reference", "reason", "resource"),
    [
        ("b", Reason.ADAPTER_NOT_FOUND, "adapter"),
        ("b@1", Reason.ADAPTER_NOT_FOUND, "adapter"),
        ("a@9", Reason.ADAPTER_VERSION_NOT_FOUND, "adapter_version"),
        ("a@blue", Reason.ALIAS_NOT_FOUND, "alias"),
    ],
)
async def test_what_is_not_there_is_told_apart(
    storage: FaultyStorage, reference: str, reason: Reason, resource: str
) -> None:
    registry = await _synced(storage)
    await _publish(registry, "a", 1)
    with pytest.raises(RpcError) as caught:
        await registry.get(parse_reference(reference))
    assert caught.value.reason is reason
    assert caught.value.context.field == "adapter"
    assert caught.value.context.resource_type == resource


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@1",
        "A",
        "a b",
        "../a",
        "a/b",
        ".a",
        "a" * 65,
        "a@",
        "a@0",
        "a@01",
        "a@" + "9" * 16,
        "a@1@2",
        "a@x y",
        "a@" + "x" * 65,
        "é",
        "a\0",
        "a@\n1",
        "a\n",
        "٣",
        "a@٣",
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(RpcError) as caught:
        parse_reference(text)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.context.field == "adapter"


async def test_the_same_weights_make_no_second_version(storage: FaultyStorage) -> None:
    registry = await _synced(storage)
    first = await _publish(registry, "a", 1)
    assert await _publish(registry, "a", 1) == first
    aliased = await _publish(registry, "a", 1, "stable")
    assert [version.number for version in aliased.versions] == [1]
    assert aliased.revision == 2


async def test_a_version_number_is_never_given_twice(storage: FaultyStorage) -> None:
    registry = await _synced(storage)
    await _publish(registry, "a", 1)
    await _publish(registry, "a", 2)
    await registry.change("a", partial(entries.delete_version, number=2))
    await registry.change("a", entries.delete_all)
    assert (await _publish(registry, "a", 2)).versions[0].number == 3
    other = await _synced(storage)
    assert (await _publish(other, "a", 9)).versions[-1].number == 4


async def test_a_version_under_an_alias_is_in_use(storage: FaultyStorage) -> None:
    registry = await _synced(storage)
    await _publish(registry, "a", 1, "stable", "blue")
    with pytest.raises(RpcError) as caught:
        await registry.change("a", partial(entries.delete_version, number=1))
    assert caught.value.reason is Reason.ADAPTER_IN_USE
    assert "blue, stable" in caught.value.message
    await registry.change("a", partial(entries.delete_alias, alias="stable"))
    await registry.change("a", partial(entries.delete_alias, alias="blue"))
    gone = await registry.change("a", partial(entries.delete_version, number=1))
    assert not gone.is_live
    registry.check_integrity()


async def test_replicas_that_race_lose_no_change(storage: FaultyStorage) -> None:
    replicas = [await _synced(storage), await _synced(storage)]
    numbers = range(1, 201)
    await asyncio.gather(*(_publish(replicas[n % 2], f"a{n % 5}", n) for n in numbers))
    assert storage.conflicts > 0
    fresh = await _synced(storage)
    for replica in (*replicas, fresh):
        await replica.sync()
        replica.check_integrity()
        found = [replica.live_entry(f"a{n}") for n in range(5)]
        digests = {v.weights.digest for entry in found if entry for v in entry.versions}
        assert digests == {_weights(n).digest for n in numbers}
        for entry in found:
            assert entry is not None
            assert [version.number for version in entry.versions] == list(range(1, 41))
            assert entry.revision == 40


async def test_of_racing_aliases_each_moves_at_once(storage: FaultyStorage) -> None:
    replicas = [await _synced(storage), await _synced(storage)]
    for number in range(1, 11):
        await _publish(replicas[0], "a", number)
    moves = [(f"alias{n % 4}", n % 10 + 1) for n in range(200)]
    await asyncio.gather(
        *(
            replicas[i % 2].change("a", partial(entries.set_alias, alias=alias, number=number))
            for i, (alias, number) in enumerate(moves)
        )
    )
    for replica in replicas:
        await replica.sync()
    first, second = (replica.live_entry("a") for replica in replicas)
    assert first == second
    assert first is not None
    assert set(first.aliases) == {f"alias{n}" for n in range(4)}


async def test_a_change_of_another_replica_is_seen_after_a_sync(storage: FaultyStorage) -> None:
    here, there = await _synced(storage), await _synced(storage)
    await _publish(there, "a", 1)
    await _publish(there, "b", 1)
    await there.change("b", entries.delete_all)
    await here.sync()
    assert here.live_entry("a") == there.live_entry("a")
    assert here.live_entry("b") is None
    here.check_integrity()


async def test_a_miss_is_looked_up_once_and_then_remembered(storage: FaultyStorage) -> None:
    here, there = await _synced(storage), await _synced(storage)
    await _publish(there, "a", 1)
    assert await _digest(here, "a") == 1  # without a sync
    storage.calls = 0
    results = await asyncio.gather(
        *(here.get(parse_reference("b")) for _ in range(100)), return_exceptions=True
    )
    assert all(isinstance(result, RpcError) for result in results)
    assert storage.calls == 1
    await _publish(here, "b", 2)  # one's own changes are visible at once
    assert await _digest(here, "b") == 2


async def test_reads_go_on_while_storage_is_away(storage: FaultyStorage) -> None:
    registry = await _synced(storage)
    await _publish(registry, "a", 1)
    storage.down = True
    assert await _digest(registry, "a") == 1
    assert [entry.name for entry in registry.page(after="", prefix="")] == ["a"]
    for attempt in (_publish(registry, "a", 2), registry.sync(), _digest(registry, "b")):
        with pytest.raises(RpcError) as caught:
            await attempt
        assert caught.value.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
        assert caught.value.context.retry_after_s is not None
    storage.down = False
    await _publish(registry, "a", 2)
    assert await _digest(registry, "a") == 2


async def test_nothing_is_answered_before_the_first_sync(storage: FaultyStorage) -> None:
    registry = Registry(storage)
    with pytest.raises(RpcError) as caught:
        await registry.get(parse_reference("a"))
    assert caught.value.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
    with pytest.raises(RpcError):
        list(registry.page(after="", prefix=""))


async def test_a_write_whose_answer_was_lost_is_recognised(storage: FaultyStorage) -> None:
    registry = await _synced(storage)
    storage.create_twice = 1
    entry = await _publish(registry, "a", 1)
    assert entry.revision == 1
    assert [version.number for version in entry.versions] == [1]


@pytest.mark.parametrize("point", ["fail_before_create", "fail_after_create"])
async def test_a_crash_leaves_the_old_state_or_the_new_one(
    storage: FaultyStorage, point: str
) -> None:
    registry = await _synced(storage)
    old = await _publish(registry, "a", 1, "stable")
    setattr(storage, point, 1)
    with pytest.raises(RpcError):
        await _publish(registry, "a", 2, "stable")
    after = (await _synced(storage)).live_entry("a")
    assert after is not None
    if point == "fail_before_create":
        assert after == old
    else:
        assert after.aliases == {"stable": 2}
        assert len(after.versions) == 2
    again = await _publish(registry, "a", 2, "stable")  # trying again heals either
    assert again.aliases == {"stable": 2}
    assert len(again.versions) == 2


async def test_a_document_that_cannot_be_read_stops_only_its_adapter(
    storage: FaultyStorage,
) -> None:
    registry = await _synced(storage)
    await _publish(registry, "a", 1)
    await _publish(registry, "b", 1)
    await storage.create(document_path("a", 2), b"{half")
    await registry.sync()
    assert await _digest(registry, "a") == 1  # what was known is served on
    assert await _digest(registry, "b") == 1
    assert registry.referenced() is None
    with pytest.raises(RpcError) as caught:
        await _publish(registry, "a", 2)
    assert caught.value.reason is Reason.ADAPTER_CORRUPT
    await storage.delete(document_path("a", 2))
    await registry.sync()
    assert registry.referenced() == {_weights(1).digest}
    await _publish(registry, "a", 2)


async def test_a_folder_deleted_by_hand_is_gone_and_can_be_published_anew(
    storage: FaultyStorage,
) -> None:
    registry = await _synced(storage)
    await _publish(registry, "a", 1)
    await _publish(registry, "a", 2)
    for revision in (1, 2):
        await storage.delete(document_path("a", revision))
    await registry.sync()
    assert registry.live_entry("a") is None
    assert (await _publish(registry, "a", 3)).revision == 1
    registry.check_integrity()


async def test_foreign_objects_are_left_alone(storage: FaultyStorage) -> None:
    for path in ("registry/README", "registry/A/000000000001.json", "registry/a/1.json"):
        await storage.create(path, b"{}")
    registry = await _synced(storage)
    assert not list(registry.page(after="", prefix=""))


async def test_pages_follow_each_other_by_name(storage: FaultyStorage) -> None:
    registry = await _synced(storage)
    for name in ("b", "a-1", "a", "a.x", "c"):
        await _publish(registry, name, 1)
    assert [e.name for e in registry.page(after="", prefix="")] == ["a", "a-1", "a.x", "b", "c"]
    assert [e.name for e in registry.page(after="a", prefix="a")] == ["a-1", "a.x"]
    assert [e.name for e in registry.page(after="b", prefix="")] == ["c"]
    assert not list(registry.page(after="", prefix="zz"))


async def test_the_number_of_adapters_has_a_limit(storage: FaultyStorage) -> None:
    registry = await _synced(storage, adapters_max=1)
    await _publish(registry, "a", 1)
    registry.check_room_for("a")
    with pytest.raises(RpcError) as caught:
        registry.check_room_for("b")
    assert caught.value.reason is Reason.FIELD_LIMIT_EXCEEDED


async def test_a_watch_begins_with_everything_and_goes_on_with_changes(
    storage: FaultyStorage,
) -> None:
    registry = await _synced(storage)
    await _publish(registry, "a", 1)
    await _publish(registry, "b", 1)
    async with aclosing(registry.watch()) as changes:
        first = [await anext(changes) for _ in range(3)]
        assert [c.entry.name for c in first if isinstance(c, Updated)] == ["a", "b"]
        assert first[2] == Synced()
        waiting = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0)
        await _publish(registry, "b", 2)
        change = await waiting
        assert isinstance(change, Updated)
        assert len(change.entry.versions) == 2
        await registry.change("a", entries.delete_all)
        assert await anext(changes) == Deleted("a")


async def test_a_slow_watcher_gets_only_the_last_state(storage: FaultyStorage) -> None:
    registry = await _synced(storage)
    async with aclosing(registry.watch()) as changes:
        assert await anext(changes) == Synced()
        for number in range(1, 21):
            await _publish(registry, f"a{number % 2}", number)
        last = [await anext(changes) for _ in range(2)]
        assert [len(c.entry.versions) for c in last if isinstance(c, Updated)] == [10, 10]
        idle = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0.01)
        assert not idle.done()
        registry.end_watches()
        with pytest.raises(RpcError) as caught:
            await idle
        assert caught.value.reason is Reason.DRAINING


async def test_watches_have_a_limit(storage: FaultyStorage) -> None:
    registry = await _synced(storage, watchers_max=1)
    async with aclosing(registry.watch()) as first, aclosing(registry.watch()) as second:
        await anext(first)
        with pytest.raises(RpcError) as caught:
            await anext(second)
        assert caught.value.reason is Reason.TOO_MANY_REQUESTS


async def test_superseded_documents_are_collected_and_the_newest_never(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.adapter_store.collect.CHANGE_S_MAX", 0.0)
    registry = await _synced(storage)
    for number in range(1, 11):
        await _publish(registry, "a", number)
    await registry.change("a", entries.delete_all)
    await _publish(registry, "b", 1)
    young = Collector(storage, registry, safety_age_s=3600)
    assert await young.collect() == 0
    assert await Collector(storage, registry, safety_age_s=0).collect() == 8
    left = {info.path for info in await storage.list("registry")}
    kept = {document_path("a", revision) for revision in (9, 10, 11)}
    assert left == {*kept, document_path("b", 1)}
    fresh = await _synced(storage)
    assert fresh.live_entry("a") is None
    assert (await _publish(fresh, "a", 99)).versions[0].number == 11


async def test_a_change_that_took_too_long_is_decided_again(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = await _synced(storage)
    clock = itertools.chain([0.0, 1000.0], itertools.repeat(0.0))
    monkeypatch.setattr("services.adapter_store.registry.time.monotonic", lambda: next(clock))
    entry = await _publish(registry, "a", 1)
    assert [version.number for version in entry.versions] == [1]


def test_an_entry_survives_its_document() -> None:
    entry = entries.publish(Entry("a"), _weights(1), aliases=("x",), now_ns=5)
    read = from_json(to_json(entry), name="a", revision=0)
    assert read == entry


@pytest.mark.parametrize(
    ("what", "limit"), [("versions", entries.VERSIONS_MAX), ("aliases", entries.ALIASES_MAX)]
)
def test_an_adapter_has_a_limited_number_of(what: str, limit: int) -> None:
    def add(entry: Entry, number: int) -> Entry:
        if what == "versions":
            return entries.publish(entry, _weights(number), aliases=(), now_ns=0)
        return entries.set_alias(entry, f"x{number}", 1)

    entry = entries.publish(Entry("a"), _weights(1), aliases=(), now_ns=0)
    for number in range(2, limit + 1):
        entry = add(entry, number)
    entry = add(entry, 1)
    with pytest.raises(RpcError) as caught:
        add(entry, limit + 1)
    assert caught.value.reason is Reason.FIELD_LIMIT_EXCEEDED
