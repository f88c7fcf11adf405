"""What the suite says of where adapters are is true: real services around a simulated engine."""

import asyncio
from pathlib import Path

import grpc
import pytest

from calumma.adapter_store.v1 import adapter_store_pb2
from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2
from calumma.scheduler.v1 import scheduler_pb2
from tests.support.suite_parts import ResidencyWatch, SuiteParts, suite_parts

DEVICE, HOST = common_pb2.ADAPTER_TIER_DEVICE, common_pb2.ADAPTER_TIER_HOST
STORE = common_pb2.ADAPTER_TIER_STORE


async def unload(
    parts: SuiteParts, digest: str, *, grace_s: float | None = None
) -> scheduler_pb2.UnloadAdapterResponse:
    request = scheduler_pb2.UnloadAdapterRequest(digest=digest)
    if grace_s is not None:
        request.grace.FromNanoseconds(int(grace_s * 1e9))
    stub = await parts.scheduler_stub()
    answer: scheduler_pb2.UnloadAdapterResponse = await stub.UnloadAdapter(request, timeout=40)
    return answer


async def test_a_used_adapter_is_shown_where_it_is_with_its_bytes_and_users(
    tmp_path: Path,
) -> None:
    async with suite_parts(tmp_path) as parts:
        await parts.start_worker(step_ms=20)
        ref = (await parts.publish("poet")).ref
        watch = await ResidencyWatch.open(parts)
        await watch.until(lambda it: "worker-1" in it.workers)
        assert watch.find(ref.digest) is None

        running = asyncio.create_task(parts.generate("poet", max_tokens=200))
        await watch.until(lambda it: (one := it.find(ref.digest)) is not None and one.users == 1)
        found = watch.find(ref.digest)
        assert found is not None
        assert (found.tier, found.size_bytes, found.pin_reason) == (DEVICE, ref.size_bytes, "")
        running.cancel()
        await watch.until(lambda it: (one := it.find(ref.digest)) is not None and one.users == 0)

        (state,) = (await parts.worker_state()).adapters
        assert (state.digest, state.tier, state.in_host) == (ref.digest, DEVICE, True)


async def test_an_unloaded_adapter_is_freed_and_confirmed_and_comes_again_when_asked_for(
    tmp_path: Path,
) -> None:
    async with suite_parts(tmp_path) as parts:
        await parts.start_worker()
        ref = (await parts.publish("poet")).ref
        watch = await ResidencyWatch.open(parts)
        first = await parts.generate("poet")
        assert first.completion.timings.adapter_tier == STORE
        await watch.until(lambda it: it.find(ref.digest) is not None)
        before = await parts.worker_state()

        answer = await unload(parts, ref.digest)
        assert list(answer.unloaded_workers) == ["worker-1"]
        assert list(answer.holding_workers) == []
        assert answer.freed_bytes >= ref.size_bytes
        after = await parts.worker_state()
        assert (len(before.adapters), len(after.adapters)) == (1, 0)
        assert before.adapter_blocks > after.adapter_blocks == 0
        await watch.until(lambda it: it.find(ref.digest) is None)

        again = await parts.generate("poet")
        assert again.completion.timings.adapter_tier == STORE
        assert len(again.token_ids) == len(first.token_ids)
        await watch.until(lambda it: it.find(ref.digest) is not None)


async def test_an_adapter_in_use_is_held_until_its_request_ends(tmp_path: Path) -> None:
    async with suite_parts(tmp_path) as parts:
        await parts.start_worker(step_ms=20)
        ref = (await parts.publish("poet")).ref
        watch = await ResidencyWatch.open(parts)
        running = asyncio.create_task(parts.generate("poet", max_tokens=100))
        await watch.until(lambda it: (one := it.find(ref.digest)) is not None and one.users == 1)

        holding = await unload(parts, ref.digest, grace_s=0.3)
        assert list(holding.holding_workers) == ["worker-1"]
        assert (holding.freed_bytes, list(holding.unloaded_workers)) == (0, [])
        assert not running.done()

        freed = await unload(parts, ref.digest)
        assert list(freed.unloaded_workers) == ["worker-1"]
        assert len((await asyncio.wait_for(running, 5)).token_ids) == 100
        assert len((await parts.worker_state()).adapters) == 0


async def test_a_pin_brings_the_adapter_without_a_request_and_outlives_the_worker(
    tmp_path: Path,
) -> None:
    async with suite_parts(tmp_path) as parts:
        await parts.start_worker()
        old = (await parts.publish("poet", aliases=["prod"])).ref
        await parts.publish("other", seed=9)
        store = await parts.store_stub()
        request = adapter_store_pb2.PinRequest(adapter="poet@prod", reason="first in every demo")
        await store.Pin(request)
        watch = await ResidencyWatch.open(parts)

        def is_pinned(it: ResidencyWatch, digest: str) -> bool:
            one = it.find(digest)
            return one is not None and (one.tier, one.pin_reason) == (DEVICE, "first in every demo")

        await watch.until(lambda it: is_pinned(it, old.digest))
        assert len(watch.workers["worker-1"].adapters) == 1

        await parts.stop_worker("worker-1")
        await watch.until(lambda it: not it.workers["worker-1"].attached)
        assert len(watch.workers["worker-1"].adapters) == 0
        await parts.start_worker()
        await watch.until(lambda it: is_pinned(it, old.digest))

        # The pin follows its alias.
        new = (await parts.publish("poet", seed=1)).ref
        alias = adapter_store_pb2.SetAliasRequest(name="poet", alias="prod", version=2)
        await store.SetAlias(alias)
        await watch.until(lambda it: is_pinned(it, new.digest))
        await watch.until(lambda it: (one := it.find(old.digest)) is None or not one.pin_reason)

        await store.Unpin(adapter_store_pb2.UnpinRequest(adapter="poet@prod"))
        await watch.until(lambda it: (one := it.find(new.digest)) is None or not one.pin_reason)


async def test_pins_stay_while_the_store_is_away(tmp_path: Path) -> None:
    async with suite_parts(tmp_path) as parts:
        ref = (await parts.publish("poet")).ref
        await (await parts.store_stub()).Pin(
            adapter_store_pb2.PinRequest(adapter="poet", reason="busy")
        )
        await parts.start_worker()
        watch = await ResidencyWatch.open(parts)
        await watch.until(lambda it: (one := it.find(ref.digest)) is not None and one.pin_reason)
        address = parts.store.address
        await parts.store.stop(0)
        answer = await parts.generate("poet")
        assert answer.completion.timings.adapter_tier == DEVICE
        (state,) = (await parts.worker_state()).adapters
        assert state.pin_reason == "busy"
        await parts.start_store(address)
        newer = (await parts.publish("poet", seed=1)).ref
        await watch.until(lambda it: (one := it.find(newer.digest)) is not None and one.pin_reason)


async def test_a_worker_that_comes_back_says_what_it_has(tmp_path: Path) -> None:
    async with suite_parts(tmp_path) as parts:
        await parts.start_worker()
        ref = (await parts.publish("poet")).ref
        await parts.generate("poet")
        watch = await ResidencyWatch.open(parts)
        await watch.until(lambda it: it.find(ref.digest) is not None)
        # A second scheduler on the same port knows nothing but what workers tell it.
        address = parts.scheduler.address
        await parts.scheduler.stop(0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.until(lambda _: False)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await parts.start_scheduler(address)
        again = await ResidencyWatch.open(parts)
        await again.until(lambda it: it.find(ref.digest) is not None)
        stub = await parts.scheduler_stub()
        state = await stub.GetState(scheduler_pb2.GetStateRequest())
        (known,) = state.workers
        assert [it.digest for it in known.host_cache.adapters] == [ref.digest]
        assert [it.size_bytes for it in known.status.resident] == [ref.size_bytes]


async def test_an_adapter_that_is_in_memory_is_still_unknown_to_other_tenants(
    tmp_path: Path,
) -> None:
    async with suite_parts(tmp_path) as parts:
        await parts.start_worker()
        ref = (await parts.publish("secret", tenants=["default"])).ref
        other = await parts.start_gateway(tenant="globex")
        await parts.generate("secret")
        watch = await ResidencyWatch.open(parts)
        await watch.until(lambda it: it.find(ref.digest) is not None)
        refusals: list[str | None] = []
        for name in ("secret", "made-up"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await parts.generate(name, gateway_address=other.address)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            refusals.append((caught.value.details() or "").replace(name, "NAME"))
        assert refusals[0] == refusals[1]
        assert (await parts.generate("secret")).adapter.digest == ref.digest


class Churn:
    """Clients that publish, unload and generate one name, and a history of what they saw."""

    CLIENTS, GENERATIONS, VERSIONS = 8, 12, 6

    def __init__(self, parts: SuiteParts, first: str) -> None:
        self._parts = parts
        self.digests = {1: first}
        self.seen: list[tuple[float, float, int]] = []  # begun, ended, version
        self.freed = 0

    async def run(self) -> None:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(self._publish())
            group.create_task(self._unload())
            for _ in range(self.CLIENTS):
                group.create_task(self._generate())

    def check_order(self) -> None:
        """A request that begins after another has ended never gets older weights."""
        for begun_s, _, version in self.seen:
            before = [earlier for _, ended_s, earlier in self.seen if ended_s < begun_s]
            assert version >= max(before, default=1)

    async def _generate(self) -> None:
        clock = asyncio.get_running_loop().time
        for _ in range(self.GENERATIONS):
            begun_s = clock()
            answer = await self._parts.generate("poet", max_tokens=6)
            assert len(answer.token_ids) == 6
            self.seen.append((begun_s, clock(), answer.adapter.version))

    async def _publish(self) -> None:
        for seed in range(1, self.VERSIONS):
            await asyncio.sleep(0.2)
            ref = (await self._parts.publish("poet", seed=seed)).ref
            self.digests[ref.version] = ref.digest

    async def _unload(self) -> None:
        while len(self.seen) < self.CLIENTS * self.GENERATIONS:
            for digest in list(self.digests.values()):
                answer = await unload(self._parts, digest, grace_s=0.2)
                self.freed += len(answer.unloaded_workers)
            await asyncio.sleep(0.05)


async def test_publishing_unloading_and_generating_at_once_looks_like_one_after_the_other(
    tmp_path: Path,
) -> None:
    async with suite_parts(tmp_path) as parts:
        for number in (1, 2):
            await parts.start_worker(f"worker-{number}", step_ms=4)
        churn = Churn(parts, (await parts.publish("poet")).ref.digest)
        await churn.run()
        churn.check_order()
        assert len({version for _, _, version in churn.seen}) > 1
        assert churn.freed > 1
        for digest in churn.digests.values():
            assert list((await unload(parts, digest)).holding_workers) == []
        for worker_id in parts.workers:
            assert len((await parts.worker_state(worker_id)).adapters) == 0


async def test_a_request_ends_on_the_weights_that_it_began_with_and_new_ones_get_the_new(
    tmp_path: Path,
) -> None:
    async with suite_parts(tmp_path) as parts:
        await parts.start_worker(step_ms=10)
        old = (await parts.publish("poet")).ref
        stub = await parts.gateway_stub()
        request = gateway_pb2.GenerateStreamRequest(prompt="go", adapter="poet")
        request.stopping.max_tokens = 150
        request.stopping.ignore_eos = True
        call = stub.GenerateStream(request, timeout=20)
        started = (await call.read()).started
        assert (started.adapter.digest, started.adapter.version) == (old.digest, 1)

        new = (await parts.publish("poet", seed=1)).ref
        async with asyncio.timeout(10):
            while (fresh := await parts.generate("poet")).adapter.version == 1:
                await asyncio.sleep(0.02)
        assert (fresh.adapter.digest, fresh.adapter.version) == (new.digest, 2)
        assert old.digest != new.digest

        tokens: list[int] = []
        while (message := await call.read()) is not grpc.aio.EOF:
            tokens += message.chunk.token_ids
        assert len(tokens) == 150
        held = {it.digest for it in (await parts.worker_state()).adapters}
        assert held == {old.digest, new.digest}
