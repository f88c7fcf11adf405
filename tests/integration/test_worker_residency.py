"""What a worker says of its adapters, and how it lets go of one."""

import asyncio
from typing import Any

import pytest

from calumma.common.v1 import common_pb2
from calumma.worker.v1 import worker_pb2
from services.worker import attach, drops
from tests.support.worker_peers import Bench, bench, make_blob, quick_engine, work_item

DEVICE, HOST = common_pb2.ADAPTER_TIER_DEVICE, common_pb2.ADAPTER_TIER_HOST
STORE = common_pb2.ADAPTER_TIER_STORE


async def state(it: Bench) -> worker_pb2.GetStateResponse:
    gateway = await it.gateway(f"asker-{len(it.gateways)}", opens=False)
    answer: worker_pb2.GetStateResponse = await gateway.stub.GetState(worker_pb2.GetStateRequest())
    return answer


async def use(it: Bench, gateway: Any, number: int) -> common_pb2.AdapterRef:
    """One request of an adapter, from its coming to its end."""
    ref = it.store.add(make_blob(number))
    await it.scheduler.dispatch(work_item(f"use-{number}", adapter=ref))
    await gateway.ended(f"use-{number}")
    return ref


async def test_a_hello_says_what_is_in_host_memory() -> None:
    async with bench() as it:
        assert len(it.scheduler.hellos[0].host_cache.adapters) == 0
        ref = await use(it, await it.gateway(), 1)
        await it.scheduler.close()
        await it.scheduler.listen()
        await it.scheduler.attached(2)
        (kept,) = it.scheduler.hellos[1].host_cache.adapters
        assert (kept.digest, kept.size_bytes) == (ref.digest, ref.size_bytes)
        (resident,) = it.scheduler.hellos[1].status.resident
        assert (resident.digest, resident.size_bytes) == (ref.digest, ref.size_bytes)


async def test_host_memory_is_reported_when_it_changes_and_not_more_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attach, "HOST_CACHE_INTERVAL_S", 0.4)
    async with bench() as it:
        gateway = await it.gateway()
        for number in range(1, 5):
            await use(it, gateway, number)
        await it.scheduler.until(
            lambda: (
                bool(it.scheduler.host_caches) and len(it.scheduler.host_caches[-1].adapters) == 4
            )
        )
        told = len(it.scheduler.host_caches)
        assert told <= 3  # the first at once, the rest together
        for again in range(3):
            item = work_item(f"again-{again}", adapter=it.store.add(make_blob(1)))
            await it.scheduler.dispatch(item)
            await gateway.ended(f"again-{again}")
            await asyncio.sleep(0.3)
        assert len(it.scheduler.host_caches) == told


async def test_a_dropped_adapter_leaves_both_tiers_and_the_reports() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        ref, other = await use(it, gateway, 1), await use(it, gateway, 2)
        await it.scheduler.until(
            lambda: (
                bool(it.scheduler.host_caches) and len(it.scheduler.host_caches[-1].adapters) == 2
            )
        )
        await it.scheduler.drop(ref.digest)
        await it.scheduler.until(
            lambda: [one.digest for one in it.scheduler.statuses[-1].resident] == [other.digest]
        )
        await it.scheduler.until(
            lambda: [one.digest for one in it.scheduler.host_caches[-1].adapters] == [other.digest]
        )
        assert set(it.engine.adapters) == {other.digest}
        assert set(it.worker.residency.held()) == {other.digest}
        assert it.store.offsets == [0, 0]
        item = work_item("again", adapter=ref)
        await it.scheduler.dispatch(item)
        assert (await gateway.ended("again")).timings.adapter_tier == STORE


async def test_an_adapter_in_use_is_dropped_after_its_last_request() -> None:
    async with bench(engine=quick_engine(step_ms=10)) as it:
        gateway = await it.gateway()
        ref = it.store.add(make_blob(1))
        await it.scheduler.dispatch(work_item("long", adapter=ref, max_tokens=60))
        await gateway.has_tokens("long", 3)
        await it.scheduler.drop(ref.digest)
        await gateway.has_tokens("long", 20)
        assert ref.digest in it.worker.residency.held()
        await gateway.ended("long")
        await it.until(lambda: it.worker.residency.held() == {})
        assert it.engine.adapters == {}


async def test_an_adapter_that_is_only_in_host_memory_is_dropped_from_there() -> None:
    async with bench(engine=quick_engine(pool_blocks=24)) as it:
        gateway = await it.gateway()
        ref = await use(it, gateway, 1)
        number = 2
        while ref.digest in it.engine.adapters:  # until the pool has no room for the first one
            assert number < 60
            await use(it, gateway, number)
            number += 1
        assert ref.digest in it.worker.residency.near()
        await it.scheduler.drop(ref.digest)
        await it.until(lambda: ref.digest not in it.worker.residency.near())


async def test_an_adapter_that_is_dropped_while_it_loads_goes_when_its_requests_have_ended() -> (
    None
):
    async with bench() as it:
        gateway = await it.gateway()
        it.store.gate.clear()
        ref = it.store.add(make_blob(1))
        await it.scheduler.dispatch(work_item("cold", adapter=ref))
        await it.store.asked()
        await it.scheduler.drop(ref.digest)
        (loading,) = (await state(it)).adapters
        assert (loading.tier, loading.num_layers, loading.ready_layers) == (STORE, 4, 0)
        it.store.gate.set()
        ending = await gateway.ended("cold")
        assert not ending.HasField("error")
        await it.until(lambda: it.worker.residency.held() == {})
        assert it.engine.adapters == {}


async def test_a_drop_that_names_nothing_harms_nobody() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        for digest in ("", "poet", "sha256:" + "0" * 64, "x" * 10_000):
            await it.scheduler.drop(digest)
        ref = await use(it, gateway, 1)
        assert set(it.worker.residency.held()) == {ref.digest}


async def test_drops_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drops, "DROPS_MAX", 3)
    async with bench(engine=quick_engine(step_ms=10)) as it:
        gateway = await it.gateway()
        refs = [it.store.add(make_blob(number)) for number in range(1, 6)]
        for ref in refs:
            await it.scheduler.dispatch(work_item(f"r-{ref.digest}", adapter=ref, max_tokens=40))
        for ref in refs:
            await gateway.has_tokens(f"r-{ref.digest}", 1)
            await it.scheduler.drop(ref.digest)
        await it.until(lambda: len(it.worker.driver._drops._digests) == 3)
        await gateway.ended(*(f"r-{ref.digest}" for ref in refs))
        await it.until(lambda: not it.worker.driver._drops._digests)


async def test_the_state_has_the_caches_counts_and_tiers() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        ref = await use(it, gateway, 1)
        await it.scheduler.dispatch(work_item("again", adapter=ref))
        await gateway.ended("again")
        told = await state(it)
        counts = told.adapter_cache
        assert (counts.hits, counts.misses, counts.evictions) == (1, 1, 0)
        assert counts.downloaded_bytes == counts.loaded_bytes == ref.size_bytes
        (held,) = told.adapters
        assert (held.tier, held.in_host, held.num_layers) == (DEVICE, True, 0)
        await it.scheduler.drop(ref.digest)
        await it.until(lambda: it.worker.residency.held() == {})
        assert (await state(it)).adapter_cache.evictions == 1
