"""Watches: what is sent, in what order, and where a broken one goes on."""

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import pytest

from services.adapter_store import changes
from services.adapter_store.documents import to_json
from services.adapter_store.entries import Entry, Weights
from services.adapter_store.references import parse_reference
from services.adapter_store.registry import Registry, RegistryLimits, document_path
from services.adapter_store.resuming import MARGIN_NS, Token, read_token
from services.adapter_store.storage import ObjectInfo
from services.adapter_store.watching import Change, Deleted, Synced, Updated
from services.common.errors import Reason, RpcError
from tests.unit.adapter_store.registry_parts import FaultyStorage, publish, synced

HOUR_NS = 3600 * 10**9


def _word(change: Change) -> str:
    match change:
        case Updated(entry):
            return f"+{entry.name}"
        case Deleted(name):
            return f"-{name}"
        case Synced(resumed):
            return "resumed" if resumed else "synced"


async def _until_synced(
    registry: Registry, token: str = "", *, pinned_only: bool = False
) -> tuple[list[str], str]:
    """What a watch sends up to its Synced, in words, and the token of that."""
    words: list[str] = []
    async with aclosing(registry.watch(token, pinned_only=pinned_only)) as told:
        async for message in told:
            words.append(_word(message.change))
            if isinstance(message.change, Synced):
                assert message.until_ns is not None
                return words, registry.token(message.until_ns)
            assert message.until_ns is None
    raise AssertionError


async def _write_old(storage: FaultyStorage, name: str, *, changed_ns: int) -> None:
    """A document whose change is long ago."""
    entry = changes.publish(Entry(name), _weights_of(name), now_ns=1)
    entry = replace(entry, revision=1, changed_ns=changed_ns, change_id="old")
    assert await storage.create(document_path(name, 1), to_json(entry))


def _weights_of(name: str) -> Weights:
    return Weights(f"sha256:{name * 64:.64}", 8, 10, ("q_proj",), "BF16", "", 1)


async def test_a_watch_begins_with_everything_and_goes_on_with_changes(
    storage: FaultyStorage,
) -> None:
    registry = await synced(storage)
    await publish(registry, "a", 1)
    await publish(registry, "b", 1)
    async with aclosing(registry.watch()) as told:
        assert [_word((await anext(told)).change) for _ in range(3)] == ["+a", "+b", "synced"]
        waiting = asyncio.ensure_future(anext(told))
        await asyncio.sleep(0)
        await publish(registry, "b", 2)
        change = (await waiting).change
        assert isinstance(change, Updated)
        assert len(change.entry.versions) == 2
        await registry.change("a", changes.delete_all)
        assert (await anext(told)).change == Deleted("a")


async def test_a_slow_watcher_gets_only_the_last_state(storage: FaultyStorage) -> None:
    registry = await synced(storage)
    async with aclosing(registry.watch()) as told:
        assert (await anext(told)).change == Synced()
        for number in range(1, 21):
            await publish(registry, f"a{number % 2}", number)
        last = [(await anext(told)).change for _ in range(2)]
        assert [len(c.entry.versions) for c in last if isinstance(c, Updated)] == [10, 10]
        idle = asyncio.ensure_future(anext(told))
        await asyncio.sleep(0.01)
        assert not idle.done()
        registry.end_watches()
        with pytest.raises(RpcError) as caught:
            await idle
        assert caught.value.reason is Reason.DRAINING


async def test_watches_have_a_limit(storage: FaultyStorage) -> None:
    registry = await synced(storage, limits=RegistryLimits(watchers=1))
    async with aclosing(registry.watch()) as first, aclosing(registry.watch()) as second:
        await anext(first)
        with pytest.raises(RpcError) as caught:
            await anext(second)
        assert caught.value.reason is Reason.TOO_MANY_REQUESTS


async def test_a_watch_goes_on_at_another_replica_with_what_has_changed(
    storage: FaultyStorage,
) -> None:
    for name in ("old", "older"):
        await _write_old(storage, name, changed_ns=time.time_ns() - HOUR_NS)
    await _write_old(storage, "undated", changed_ns=0)
    here = await synced(storage)
    words, token = await _until_synced(here)
    assert words == ["+old", "+older", "+undated", "synced"]
    await publish(here, "new", 1)
    await here.change("old", changes.delete_all)
    there = await synced(storage)
    words, later = await _until_synced(there, token)
    assert sorted(words[:-1]) == ["+new", "-old"]
    assert words[-1] == "resumed"
    assert read_token(later)


async def test_a_change_that_the_makers_of_a_token_had_not_seen_is_sent(
    storage: FaultyStorage,
) -> None:
    here, there = await synced(storage), await synced(storage)
    await publish(there, "unseen", 1)
    words, token = await _until_synced(here)  # it has not looked since
    assert words == ["synced"]
    words, _ = await _until_synced(there, token)
    assert words == ["+unseen", "resumed"]


async def test_a_change_by_a_clock_that_is_late_is_sent(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = await synced(storage), await synced(storage)
    _, token = await _until_synced(here)
    now_ns = time.time_ns
    with monkeypatch.context() as late:
        late.setattr("services.adapter_store.registry.time.time_ns", lambda: now_ns() - 200 * 10**9)
        await publish(there, "late", 1)
    words, _ = await _until_synced(there, token)
    assert words == ["+late", "resumed"]


@pytest.mark.parametrize(
    "token",
    [
        "garbage",
        "1." + "0" * 32 + ".5",
        "1.." + "9" * 500,
        "é",
        "1.{id}.0",
        "1.{id}.-5",
        "2.{id}.5",
        "1.{id}." + "9" * 19,
        "1.{id}.5\n",
    ],
)
async def test_a_watch_with_a_token_that_says_nothing_begins_anew(
    storage: FaultyStorage, token: str
) -> None:
    registry = await synced(storage)
    _, valid = await _until_synced(registry)
    known = read_token(valid)
    assert known is not None
    await _write_old(storage, "old", changed_ns=1)
    await registry.sync()
    words, _ = await _until_synced(registry, token.replace("{id}", known.registry_id))
    assert words == ["+old", "synced"]


async def test_a_token_of_another_registry_begins_anew(
    storage: FaultyStorage, tmp_path_factory: pytest.TempPathFactory
) -> None:
    _, token = await _until_synced(await synced(storage))
    other = FaultyStorage.at(tmp_path_factory.mktemp("other"))
    await _write_old(other, "a", changed_ns=1)
    words, _ = await _until_synced(await synced(other), token)
    assert words == ["+a", "synced"]


async def test_a_token_from_before_documents_were_deleted_by_hand_begins_anew(
    storage: FaultyStorage,
) -> None:
    registry = await synced(storage)
    await publish(registry, "gone", 1)
    await publish(registry, "kept", 1)
    await registry.sync()
    _, token = await _until_synced(registry)
    await storage.delete(document_path("gone", 1))
    await registry.sync()
    assert (await _until_synced(registry, token))[0] == ["+kept", "synced"]
    await registry.sync()
    _, token = await _until_synced(registry)
    assert (await _until_synced(registry, token))[0][-1] == "resumed"


async def test_a_token_moves_on_only_when_nothing_is_left_to_send(storage: FaultyStorage) -> None:
    registry = await synced(storage)
    async with aclosing(registry.watch()) as told:
        first = (await anext(told)).until_ns
        await publish(registry, "a", 1)
        await publish(registry, "b", 1)
        await registry.sync()
        assert (await anext(told)).until_ns == first
        last = (await anext(told)).until_ns
    assert first is not None
    assert last is not None
    assert last > first


async def test_a_token_is_of_the_last_look_into_storage(storage: FaultyStorage) -> None:
    registry = await synced(storage)
    _, before = await _until_synced(registry)
    storage.down = True
    with pytest.raises(RpcError):
        await registry.sync()
    assert (await _until_synced(registry))[1] == before  # it can't promise more than it knows


async def test_a_token_is_older_than_the_listing_that_it_stands_for(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = await synced(storage)
    listed_ns: list[int] = []
    listing = storage.list

    async def noted(prefix: str) -> list[ObjectInfo]:
        listed_ns.append(time.time_ns())
        return await listing(prefix)

    monkeypatch.setattr(storage, "list", noted)
    await registry.sync()
    token = read_token((await _until_synced(registry))[1])
    assert token is not None
    assert token.until_ns <= listed_ns[0]


async def test_a_token_promises_nothing_of_a_document_that_could_not_be_read(
    storage: FaultyStorage,
) -> None:
    registry = await synced(storage)
    _, before = await _until_synced(registry)
    await storage.create(document_path("a", 1), b'{"format":99}')
    await registry.sync()
    assert (await _until_synced(registry))[1] == before
    assert (await _until_synced(await synced(storage)))[1] == ""


async def test_where_no_id_can_be_written_a_watch_works_and_has_no_token(
    storage: FaultyStorage,
) -> None:
    storage.fail_before_create = 1
    registry = await synced(storage)
    assert await _until_synced(registry) == (["synced"], "")
    await registry.sync()
    assert (await _until_synced(registry))[1]


async def test_all_replicas_give_a_registry_one_id(storage: FaultyStorage) -> None:
    replicas = [Registry(storage) for _ in range(8)]
    await asyncio.gather(*(replica.sync() for replica in replicas))
    tokens = {read_token(replica.token(1)) for replica in replicas}
    assert len(tokens) == 1
    assert None not in tokens


def test_a_token_survives_being_text() -> None:
    token = Token("ab" * 16, MARGIN_NS)
    assert read_token(str(token)) == token


# Pins


async def _pin(registry: Registry, reference: str) -> None:
    parsed = parse_reference(reference)
    await registry.change(
        parsed.name, partial(changes.pin, reference=parsed, reason="busy", now_ns=1)
    )


async def _unpin(registry: Registry, reference: str) -> None:
    parsed = parse_reference(reference)
    await registry.change(parsed.name, partial(changes.unpin, reference=parsed))


async def test_a_watch_of_pins_is_told_of_nothing_else(storage: FaultyStorage) -> None:
    registry = await synced(storage)
    for name in ("a", "b", "c"):
        await publish(registry, name, 1)
    await _pin(registry, "b")
    async with aclosing(registry.watch(pinned_only=True)) as told:
        assert [_word((await anext(told)).change) for _ in range(2)] == ["+b", "synced"]
        await publish(registry, "a", 2)  # not its business
        await _pin(registry, "c")
        assert (await anext(told)).change == Updated(registry.entry("c"))
        await _unpin(registry, "b")
        assert (await anext(told)).change == Deleted("b")
        await registry.change("a", changes.delete_all)
        await registry.change("c", changes.delete_all)
        assert (await anext(told)).change == Deleted("c")


async def test_a_watch_of_pins_goes_on_with_what_was_unpinned_meanwhile(
    storage: FaultyStorage,
) -> None:
    registry = await synced(storage)
    for name in ("a", "b"):
        await publish(registry, name, 1)
        await _pin(registry, name)
    words, token = await _until_synced(registry, pinned_only=True)
    assert words == ["+a", "+b", "synced"]
    await _unpin(registry, "a")
    words, _ = await _until_synced(await synced(storage), token, pinned_only=True)
    assert sorted(words) == ["+b", "-a", "resumed"]
