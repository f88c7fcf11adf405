"""Who finds what: visibility, filters, pages and the limits of pins."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from services.adapter_store import changes
from services.adapter_store.changes import Terms
from services.adapter_store.documents import to_json
from services.adapter_store.entries import Entry, Version
from services.adapter_store.listing import LOOKED_AT_MAX, Filter, page_of
from services.adapter_store.references import parse_reference
from services.adapter_store.registry import Registry, RegistryLimits, document_path
from services.adapter_store.wire import adapter_to_proto
from services.common.errors import Reason, RpcError
from tests.unit.adapter_store.registry_parts import FaultyStorage, publish, synced, weights


async def _publish_with(registry: Registry, name: str, number: int, **terms: Any) -> Entry:
    decide = partial(changes.publish, weights=weights(number), terms=Terms(**terms), now_ns=1)
    return await registry.change(name, decide)


async def _get(registry: Registry, reference: str, tenant: str) -> Version:
    return (await registry.get(parse_reference(reference), tenant=tenant))[0]


async def _refusal(registry: Registry, reference: str, tenant: str) -> RpcError:
    with pytest.raises(RpcError) as caught:
        await _get(registry, reference, tenant)
    return caught.value


@pytest.mark.parametrize("selector", ["", "@1", "@7", "@stable", "@blue"])
async def test_what_a_tenant_may_not_see_is_unknown_to_it(
    storage: FaultyStorage, selector: str
) -> None:
    registry = await synced(storage)
    await _publish_with(registry, "hidden", 1, tenants=("acme",), aliases=("stable",))
    hidden = await _refusal(registry, f"hidden{selector}", "other")
    unknown = await _refusal(registry, f"unknown{selector}", "other")
    assert hidden.reason is unknown.reason is Reason.ADAPTER_NOT_FOUND
    assert hidden.message.replace("hidden", "unknown") == unknown.message
    assert replace(hidden.context, resource_name="") == replace(unknown.context, resource_name="")
    assert (await _get(registry, "hidden@stable", "acme")).number == 1
    assert (await _get(registry, "hidden", "")).number == 1


async def test_what_a_tenant_may_not_see_costs_storage_as_much_as_what_is_unknown(
    storage: FaultyStorage,
) -> None:
    registry = await synced(storage)
    await _publish_with(registry, "hidden", 1, tenants=("acme",))
    calls: list[int] = []
    for name in ("hidden", "unknown"):
        storage.calls = 0
        for _ in range(5):
            await _refusal(registry, name, "other")
        calls.append(storage.calls)
    assert calls == [1, 1]


async def test_a_miss_of_one_tenant_is_not_anothers(storage: FaultyStorage) -> None:
    here, there = await synced(storage), await synced(storage)
    await _refusal(here, "a", "other")
    await _publish_with(there, "a", 1, tenants=("acme",))
    assert (await _get(here, "a", "acme")).number == 1
    await _refusal(here, "a", "other")


async def test_a_change_of_visibility_is_seen_by_a_tenant_at_once(storage: FaultyStorage) -> None:
    registry = await synced(storage)
    await publish(registry, "a", 1)
    assert (await _get(registry, "a", "other")).number == 1
    await registry.change("a", partial(changes.set_visibility, tenants=("acme",)))
    await _refusal(registry, "a", "other")
    await registry.change("a", partial(changes.set_visibility, tenants=()))
    assert (await _get(registry, "a", "other")).number == 1


# Lists


@pytest.fixture
async def shelf(storage: FaultyStorage) -> Registry:
    registry = await synced(storage)
    await _publish_with(registry, "a", 1, labels={"team": "x", "lang": "de"})
    await _publish_with(registry, "b", 2, labels={"team": "x"})
    await _publish_with(registry, "b", 3, labels={"lang": "de"})
    await _publish_with(registry, "c", 1, tenants=("acme",))
    other = replace(weights(4), base_model="acme/other")
    await registry.change("d", partial(changes.publish, weights=other, now_ns=1))
    return registry


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (Filter(), "abcd"),
        (Filter(labels={"team": "x"}), "ab"),
        (Filter(labels={"team": "x", "lang": "de"}), "a"),
        (Filter(labels={"team": "y"}), ""),
        (Filter(base_model="acme/other"), "d"),
        (Filter(base_model="acme/base"), "abc"),
        (Filter(digest=weights(1).digest), "ac"),
        (Filter(digest=weights(1).digest, tenant="other"), "a"),
        (Filter(digest=weights(9).digest), ""),
        (Filter(tenant="acme"), "abcd"),
        (Filter(tenant="other"), "abd"),
        (Filter(tenant="other", labels={"lang": "de"}), "ab"),
    ],
)
async def test_a_list_has_what_passes_its_filter(
    shelf: Registry, wanted: Filter, found: str
) -> None:
    entries = shelf.page(after="", digest=wanted.digest)
    page = page_of(entries, wanted, size=10, write=adapter_to_proto)
    assert "".join(adapter.name for adapter in page.adapters) == found
    assert page.last is None


async def test_a_deleted_version_is_not_found_by_its_digest(shelf: Registry) -> None:
    await shelf.change("a", changes.delete_all)
    await shelf.change("b", partial(changes.delete_version, number=1))
    assert [e.name for e in shelf.page(after="", digest=weights(1).digest)] == ["c"]
    assert not list(shelf.page(after="", digest=weights(2).digest))
    shelf.check_integrity()


def test_a_page_looks_at_a_bounded_number_and_may_be_empty() -> None:
    seen: list[str] = []

    def endless() -> Iterator[Entry]:
        for number in range(10 * LOOKED_AT_MAX):
            entry = changes.publish(Entry(f"a{number:07d}"), weights(number), now_ns=0)
            seen.append(entry.name)
            yield entry

    page = page_of(endless(), Filter(labels={"x": "y"}), size=100, write=adapter_to_proto)
    assert page.adapters == []
    assert page.last == seen[-2]
    assert len(seen) <= LOOKED_AT_MAX + 2


async def test_pages_of_a_filtered_list_miss_nothing(storage: FaultyStorage) -> None:
    registry = await synced(storage)
    for number in range(1, 31):
        labels = {"third": "yes"} if number % 3 == 0 else {}
        await _publish_with(registry, f"a{number:02d}", number, labels=labels)
    found: list[str] = []
    after: str | None = ""
    while after is not None:
        entries = registry.page(after=after)
        page = page_of(entries, Filter(labels={"third": "yes"}), size=4, write=adapter_to_proto)
        found += [adapter.name for adapter in page.adapters]
        after = page.last
    assert found == [f"a{number:02d}" for number in range(3, 31, 3)]


# Pins


async def _pin(registry: Registry, name: str) -> None:
    reference = parse_reference(name)
    version, _ = await registry.get(reference)
    registry.check_room_for_pin(name, version.weights)
    await registry.change(name, partial(changes.pin, reference=reference, reason="busy", now_ns=1))


async def test_pinned_adapters_of_a_registry_have_a_limit(storage: FaultyStorage) -> None:
    registry = await synced(storage, limits=RegistryLimits(pinned_adapters=1))
    for number, name in enumerate("ab"):
        await publish(registry, name, number)
    await _pin(registry, "a")
    await _pin(registry, "a")  # it has its place
    with pytest.raises(RpcError) as caught:
        await _pin(registry, "b")
    assert caught.value.reason is Reason.FIELD_LIMIT_EXCEEDED
    await registry.change("a", partial(changes.unpin, reference=parse_reference("a")))
    await _pin(registry, "b")


async def test_pinned_bytes_of_a_registry_have_a_limit(storage: FaultyStorage) -> None:
    size_bytes = weights(1).size_bytes
    registry = await synced(storage, limits=RegistryLimits(pinned_bytes=2 * size_bytes))
    for number, name in enumerate(("a", "b", "c")):
        await publish(registry, name, number)
    await publish(registry, "a-too", 0)
    for name in ("a", "a-too", "b"):  # the same weights count once
        await _pin(registry, name)
    with pytest.raises(RpcError) as caught:
        await _pin(registry, "c")
    assert caught.value.reason is Reason.FIELD_LIMIT_EXCEEDED
    assert str(2 * size_bytes) in caught.value.message


# Thousands


async def test_thousands_of_adapters_are_read_found_and_listed(storage: FaultyStorage) -> None:
    count = 3000
    await asyncio.gather(*(storage.create(*_document(number)) for number in range(count)))
    registry = await synced(storage)
    registry.check_integrity()
    started_s = time.process_time()
    for number in range(0, count, 10):
        assert (await _get(registry, f"a{number:06d}@stable", "acme")).number == 1
    assert (time.process_time() - started_s) / (count / 10) < 0.001
    names: list[str] = []
    page_s: list[float] = []
    after: str | None = ""
    while after is not None:
        started_s = time.process_time()
        page = page_of(registry.page(after=after), Filter(), size=1000, write=adapter_to_proto)
        page_s.append(time.process_time() - started_s)
        names += [adapter.name for adapter in page.adapters]
        after = page.last
    assert names == [f"a{number:06d}" for number in range(count)]
    assert min(page_s) < 0.1
    storage.calls = 0
    await registry.sync()
    assert storage.calls == 1  # one listing, however many adapters


def _document(number: int) -> tuple[str, bytes]:
    entry = changes.publish(Entry(f"a{number:06d}"), weights(number), Terms(("stable",)), now_ns=1)
    return document_path(entry.name, 1), to_json(replace(entry, revision=1, changed_ns=1))
