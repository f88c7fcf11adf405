import asyncio
from functools import partial

import pytest

from services.adapter_store import aliases, changes
from services.adapter_store.changes import Terms
from services.adapter_store.collect import Collector
from services.adapter_store.documents import from_json, to_json
from services.adapter_store.entries import Entry
from services.adapter_store.references import parse_reference
from services.adapter_store.registry import Registry, RegistryLimits, document_path
from services.common.errors import Reason, RpcError
from tests.unit.adapter_store.registry_parts import (
    FaultyStorage,
    digest,
    publish,
    synced,
    weights,
)


async def test_a_reference_resolves_by_name_version_and_alias(storage: FaultyStorage) -> None:
    registry = await synced(storage)
    await publish(registry, "a", 1, "stable")
    await publish(registry, "a", 2)
    assert await digest(registry, "a") == 2
    assert await digest(registry, "a@1") == 1
    assert await digest(registry, "a@stable") == 1
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
    registry = await synced(storage)
    await publish(registry, "a", 1)
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
    registry = await synced(storage)
    first = await publish(registry, "a", 1)
    assert await publish(registry, "a", 1) == first
    aliased = await publish(registry, "a", 1, "stable")
    assert [version.number for version in aliased.versions] == [1]
    assert aliased.revision == 2


async def test_a_version_number_is_never_given_twice(storage: FaultyStorage) -> None:
    registry = await synced(storage)
    await publish(registry, "a", 1)
    await publish(registry, "a", 2)
    await registry.change("a", partial(changes.delete_version, number=2))
    await registry.change("a", changes.delete_all)
    assert (await publish(registry, "a", 2)).versions[0].number == 3
    other = await synced(storage)
    assert (await publish(other, "a", 9)).versions[-1].number == 4


async def test_a_version_under_an_alias_is_in_use(storage: FaultyStorage) -> None:
    registry = await synced(storage)
    await publish(registry, "a", 1, "stable", "blue")
    with pytest.raises(RpcError) as caught:
        await registry.change("a", partial(changes.delete_version, number=1))
    assert caught.value.reason is Reason.ADAPTER_IN_USE
    assert "the alias blue, the alias stable" in caught.value.message
    await registry.change("a", partial(aliases.delete_alias, alias="stable"))
    await registry.change("a", partial(aliases.delete_alias, alias="blue"))
    gone = await registry.change("a", partial(changes.delete_version, number=1))
    assert not gone.is_live
    registry.check_integrity()


async def test_replicas_that_race_lose_no_change(storage: FaultyStorage) -> None:
    replicas = [await synced(storage), await synced(storage)]
    numbers = range(1, 201)
    await asyncio.gather(*(publish(replicas[n % 2], f"a{n % 5}", n) for n in numbers))
    assert storage.conflicts > 0
    fresh = await synced(storage)
    for replica in (*replicas, fresh):
        await replica.sync()
        replica.check_integrity()
        found = [replica.live_entry(f"a{n}") for n in range(5)]
        digests = {v.weights.digest for entry in found if entry for v in entry.versions}
        assert digests == {weights(n).digest for n in numbers}
        for entry in found:
            assert entry is not None
            assert [version.number for version in entry.versions] == list(range(1, 41))
            assert entry.revision == 40


async def test_of_racing_aliases_each_moves_at_once(storage: FaultyStorage) -> None:
    replicas = [await synced(storage), await synced(storage)]
    for number in range(1, 11):
        await publish(replicas[0], "a", number)
    moves = [(f"alias{n % 4}", n % 10 + 1) for n in range(200)]
    await asyncio.gather(
        *(
            replicas[i % 2].change("a", partial(aliases.set_alias, alias=alias, number=number))
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
    here, there = await synced(storage), await synced(storage)
    await publish(there, "a", 1)
    await publish(there, "b", 1)
    await there.change("b", changes.delete_all)
    await here.sync()
    assert here.live_entry("a") == there.live_entry("a")
    assert here.live_entry("b") is None
    here.check_integrity()


async def test_a_miss_is_looked_up_once_and_then_remembered(storage: FaultyStorage) -> None:
    here, there = await synced(storage), await synced(storage)
    await publish(there, "a", 1)
    assert await digest(here, "a") == 1  # without a sync
    storage.calls = 0
    results = await asyncio.gather(
        *(here.get(parse_reference("b")) for _ in range(100)), return_exceptions=True
    )
    assert all(isinstance(result, RpcError) for result in results)
    assert storage.calls == 1
    await publish(here, "b", 2)  # one's own changes are visible at once
    assert await digest(here, "b") == 2


async def test_reads_go_on_while_storage_is_away(storage: FaultyStorage) -> None:
    registry = await synced(storage)
    await publish(registry, "a", 1)
    storage.down = True
    assert await digest(registry, "a") == 1
    assert [entry.name for entry in registry.page(after="", prefix="")] == ["a"]
    for attempt in (publish(registry, "a", 2), registry.sync(), digest(registry, "b")):
        with pytest.raises(RpcError) as caught:
            await attempt
        assert caught.value.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
        assert caught.value.context.retry_after_s is not None
    storage.down = False
    await publish(registry, "a", 2)
    assert await digest(registry, "a") == 2


async def test_nothing_is_answered_before_the_first_sync(storage: FaultyStorage) -> None:
    registry = Registry(storage)
    with pytest.raises(RpcError) as caught:
        await registry.get(parse_reference("a"))
    assert caught.value.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
    with pytest.raises(RpcError):
        list(registry.page(after="", prefix=""))


async def test_a_document_that_cannot_be_read_stops_only_its_adapter(
    storage: FaultyStorage,
) -> None:
    registry = await synced(storage)
    await publish(registry, "a", 1)
    await publish(registry, "b", 1)
    await storage.create(document_path("a", 2), b"{half")
    await registry.sync()
    assert await digest(registry, "a") == 1  # what was known is served on
    assert await digest(registry, "b") == 1
    assert registry.referenced() is None
    with pytest.raises(RpcError) as caught:
        await publish(registry, "a", 2)
    assert caught.value.reason is Reason.ADAPTER_CORRUPT
    await storage.delete(document_path("a", 2))
    await registry.sync()
    assert registry.referenced() == {weights(1).digest}
    await publish(registry, "a", 2)


async def test_a_folder_deleted_by_hand_is_gone_and_can_be_published_anew(
    storage: FaultyStorage,
) -> None:
    registry = await synced(storage)
    await publish(registry, "a", 1)
    await publish(registry, "a", 2)
    for revision in (1, 2):
        await storage.delete(document_path("a", revision))
    await registry.sync()
    assert registry.live_entry("a") is None
    assert (await publish(registry, "a", 3)).revision == 1
    registry.check_integrity()


async def test_foreign_objects_are_left_alone(storage: FaultyStorage) -> None:
    for path in ("registry/README", "registry/A/000000000001.json", "registry/a/1.json"):
        await storage.create(path, b"{}")
    registry = await synced(storage)
    assert not list(registry.page(after="", prefix=""))


async def test_pages_follow_each_other_by_name(storage: FaultyStorage) -> None:
    registry = await synced(storage)
    for name in ("b", "a-1", "a", "a.x", "c"):
        await publish(registry, name, 1)
    assert [e.name for e in registry.page(after="", prefix="")] == ["a", "a-1", "a.x", "b", "c"]
    assert [e.name for e in registry.page(after="a", prefix="a")] == ["a-1", "a.x"]
    assert [e.name for e in registry.page(after="b", prefix="")] == ["c"]
    assert not list(registry.page(after="", prefix="zz"))


async def test_the_number_of_adapters_has_a_limit(storage: FaultyStorage) -> None:
    registry = await synced(storage, limits=RegistryLimits(adapters=1))
    await publish(registry, "a", 1)
    registry.check_room_for("a")
    with pytest.raises(RpcError) as caught:
        registry.check_room_for("b")
    assert caught.value.reason is Reason.FIELD_LIMIT_EXCEEDED


async def test_superseded_documents_are_collected_and_the_newest_never(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.adapter_store.collect.CHANGE_S_MAX", 0.0)
    registry = await synced(storage)
    for number in range(1, 11):
        await publish(registry, "a", number)
    await registry.change("a", changes.delete_all)
    await publish(registry, "b", 1)
    young = Collector(storage, registry, safety_age_s=3600)
    assert await young.collect() == 0
    assert await Collector(storage, registry, safety_age_s=0).collect() == 8
    left = {info.path for info in await storage.list("registry")}
    kept = {document_path("a", revision) for revision in (9, 10, 11)}
    assert left == {*kept, document_path("b", 1)}
    fresh = await synced(storage)
    assert fresh.live_entry("a") is None
    assert (await publish(fresh, "a", 99)).versions[0].number == 11


def test_an_entry_survives_its_document() -> None:
    entry = changes.publish(Entry("a"), weights(1), Terms(("x",)), now_ns=5)
    read = from_json(to_json(entry), name="a", revision=0)
    assert read == entry


@pytest.mark.parametrize(
    ("what", "limit"), [("versions", changes.VERSIONS_MAX), ("aliases", aliases.ALIASES_MAX)]
)
def test_an_adapter_has_a_limited_number_of(what: str, limit: int) -> None:
    def add(entry: Entry, number: int) -> Entry:
        if what == "versions":
            return changes.publish(entry, weights(number), now_ns=0)
        return aliases.set_alias(entry, f"x{number}", 1)

    entry = changes.publish(Entry("a"), weights(1), now_ns=0)
    for number in range(2, limit + 1):
        entry = add(entry, number)
    entry = add(entry, 1)
    with pytest.raises(RpcError) as caught:
        add(entry, limit + 1)
    assert caught.value.reason is Reason.FIELD_LIMIT_EXCEEDED
