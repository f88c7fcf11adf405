"""Answers that are lost, writers that die or are late: each change is whole, once, or not there."""

import itertools
from dataclasses import replace
from functools import partial

import pytest

from services.adapter_store import aliases, changes
from services.adapter_store.entries import Canary
from services.adapter_store.references import parse_reference
from services.adapter_store.registry import Decide
from services.common.errors import RpcError
from tests.unit.adapter_store.registry_parts import (
    FaultyStorage,
    publish,
    synced,
)


async def test_a_write_whose_answer_was_lost_is_recognised(storage: FaultyStorage) -> None:
    registry = await synced(storage)
    storage.create_twice = 1
    entry = await publish(registry, "a", 1)
    assert entry.revision == 1
    assert [version.number for version in entry.versions] == [1]


@pytest.mark.parametrize("point", ["fail_before_create", "fail_after_create"])
async def test_a_crash_leaves_the_old_state_or_the_new_one(
    storage: FaultyStorage, point: str
) -> None:
    registry = await synced(storage)
    old = await publish(registry, "a", 1, "stable")
    setattr(storage, point, 1)
    with pytest.raises(RpcError):
        await publish(registry, "a", 2, "stable")
    after = (await synced(storage)).live_entry("a")
    assert after is not None
    if point == "fail_before_create":
        assert after == old
    else:
        assert after.aliases == {"stable": 2}
        assert len(after.versions) == 2
    again = await publish(registry, "a", 2, "stable")  # trying again heals either
    assert again.aliases == {"stable": 2}
    assert len(again.versions) == 2


CHANGES: dict[str, Decide] = {
    "canary": partial(aliases.set_canary, alias="stable", canary=Canary(2, 10)),
    "rollback": partial(aliases.roll_back, alias="moved"),
    "visibility": partial(changes.set_visibility, tenants=("acme",)),
    "pin": partial(changes.pin, reference=parse_reference("a@stable"), reason="busy", now_ns=1),
    "unpin": partial(changes.unpin, reference=parse_reference("a")),
    "delete": partial(changes.delete_version, number=3),
    "delete all": changes.delete_all,
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("point", ["fail_before_create", "fail_after_create"])
async def test_each_change_is_whole_or_not_there_after_a_crash(
    storage: FaultyStorage, point: str, what: str
) -> None:
    registry = await synced(storage)
    for number in range(1, 4):
        await publish(registry, "a", number)
    for alias, number in (("stable", 1), ("moved", 1), ("moved", 2)):
        await registry.change("a", partial(aliases.set_alias, alias=alias, number=number))
    old = await registry.change(
        "a", partial(changes.pin, reference=parse_reference("a"), reason="busy", now_ns=1)
    )
    setattr(storage, point, 1)
    with pytest.raises(RpcError):
        await registry.change("a", CHANGES[what])
    fresh = await synced(storage)
    fresh.check_integrity()
    wanted = old if point == "fail_before_create" else CHANGES[what](old)
    found = fresh.entry("a")
    stamps = replace(wanted, revision=found.revision, changed_ns=found.changed_ns)
    assert found == replace(stamps, change_id=found.change_id)
    assert found.revision == old.revision + (point == "fail_after_create")


async def test_a_rollback_that_took_too_long_is_not_done_twice(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = await synced(storage)
    await publish(registry, "a", 1, "x")
    await publish(registry, "a", 2, "x")
    clock = itertools.chain([0.0, 1000.0], itertools.repeat(0.0))
    monkeypatch.setattr("services.adapter_store.registry.time.monotonic", lambda: next(clock))
    entry = await registry.change("a", partial(aliases.roll_back, alias="x"))
    assert entry.aliases == {"x": 1}
    assert entry.revision == 3


async def test_a_late_writer_whose_revision_was_superseded_decides_again(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, other = await synced(storage), await synced(storage)
    await publish(registry, "a", 1)
    monkeypatch.setattr("services.adapter_store.registry.CHANGE_S_MAX", -1.0)
    create = storage.create

    async def create_and_be_overtaken(path: str, data: bytes) -> bool:
        monkeypatch.setattr(storage, "create", create)
        created = await create(path, data)
        await publish(other, "a", 3)
        return created

    monkeypatch.setattr(storage, "create", create_and_be_overtaken)
    entry = await publish(registry, "a", 2)
    assert [int(v.weights.digest[7:], 16) for v in entry.versions] == [1, 2, 3]


async def test_changes_are_dated_in_their_order(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = await synced(storage)
    first = await publish(registry, "a", 1)
    monkeypatch.setattr("services.adapter_store.registry.time.time_ns", lambda: 1)
    second = await publish(registry, "a", 2)  # by a clock that was set back
    assert second.changed_ns > first.changed_ns > 1


async def test_a_change_that_took_too_long_is_decided_again(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = await synced(storage)
    clock = itertools.chain([0.0, 1000.0], itertools.repeat(0.0))
    monkeypatch.setattr("services.adapter_store.registry.time.monotonic", lambda: next(clock))
    entry = await publish(registry, "a", 1)
    assert [version.number for version in entry.versions] == [1]
