"""WatchResidency and UnloadAdapter over real gRPC, with workers that say what a test tells them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest

from calumma.common.v1 import common_pb2
from calumma.scheduler.v1 import scheduler_pb2
from services.common.errors import Reason, RpcError
from services.scheduler import residency, unloading
from services.scheduler.config import SchedulerSettings
from services.scheduler.service import Scheduler, start
from tests.support.scheduler_peers import WorkerPeer, device_status, digest_of, host_cache

DEVICE, HOST = common_pb2.ADAPTER_TIER_DEVICE, common_pb2.ADAPTER_TIER_HOST
WAIT_S = 5.0


class World:
    """One scheduler and whoever a test connects to it."""

    def __init__(self, scheduler: Scheduler, stack: AsyncExitStack) -> None:
        self.scheduler = scheduler
        self.stack = stack
        self._client = self._peer("client")

    def _peer(self, worker_id: str) -> WorkerPeer:
        peer = WorkerPeer(self.scheduler.address, worker_id)
        self.stack.push_async_callback(peer.close)
        return peer

    async def worker(self, worker_id: str, **fields: Any) -> WorkerPeer:
        return await self._peer(worker_id).connect(**fields)

    def watch(self) -> Any:
        return self._client.stub.WatchResidency(scheduler_pb2.WatchResidencyRequest())

    def unload(self, adapter: int | str, *, grace_s: float | None = None) -> "asyncio.Future[Any]":
        digest = adapter if isinstance(adapter, str) else digest_of(adapter)
        request = scheduler_pb2.UnloadAdapterRequest(digest=digest)
        if grace_s is not None:
            request.grace.FromNanoseconds(int(grace_s * 1e9))
        call = self._client.stub.UnloadAdapter(request, timeout=WAIT_S)
        return asyncio.ensure_future(_result(call))


async def _result(call: Any) -> Any:
    return await call


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        scheduler = await start(SchedulerSettings(listen="127.0.0.1:0", worker_grace_s=0.2))
        stack.push_async_callback(scheduler.stop, 0)
        yield World(scheduler, stack)


async def next_news(call: Any) -> dict[str, scheduler_pb2.WorkerResidency]:
    message = await asyncio.wait_for(call.read(), WAIT_S)
    assert message is not grpc.aio.EOF
    return {one.worker_id: one for one in message.workers}


def adapters(one: scheduler_pb2.WorkerResidency) -> dict[str, int]:
    return {it.digest: it.tier for it in one.adapters}


def reason_of(error: BaseException) -> Reason:
    assert isinstance(error, grpc.aio.AioRpcError)
    refusal = RpcError.from_rpc(error)
    assert refusal is not None
    return refusal.reason


async def test_the_first_message_has_every_worker_with_the_nearest_tier_of_each_adapter(
    world: World,
) -> None:
    await world.worker("w1", device=[1, 2], host=[2, 3])
    await world.worker("w2")
    news = await next_news(world.watch())
    assert set(news) == {"w1", "w2"}
    assert adapters(news["w1"]) == {digest_of(1): DEVICE, digest_of(2): DEVICE, digest_of(3): HOST}
    assert [it.size_bytes for it in news["w1"].adapters] == [1000, 1000, 1000]
    assert (news["w2"].attached, adapters(news["w2"])) == (True, {})


async def test_later_messages_have_only_workers_that_hold_something_else(world: World) -> None:
    first = await world.worker("w1", device=[1])
    second = await world.worker("w2", device=[1])
    call = world.watch()
    await next_news(call)
    await second.report(device_status(1, free_blocks=17))  # nothing of it is residency
    await first.report(device_status(1, 4, users=2, pin_reason="demo"))
    news = await next_news(call)
    assert set(news) == {"w1"}
    assert [(it.users, it.pin_reason) for it in news["w1"].adapters] == [(2, "demo")] * 2
    await second.report_host(8)
    news = await next_news(call)
    assert adapters(news["w2"]) == {digest_of(1): DEVICE, digest_of(8): HOST}


async def test_a_watcher_hears_at_most_every_half_second_and_then_the_newest(world: World) -> None:
    worker = await world.worker("w1")
    call = world.watch()
    await next_news(call)
    loop = asyncio.get_running_loop()
    times: list[float] = []
    for number in range(1, 41):
        await worker.report_host(number)
        await asyncio.sleep(0.025)
    while True:
        news = await next_news(call)
        times.append(loop.time())
        if adapters(news["w1"]) == {digest_of(40): HOST}:
            break
    assert len(times) <= 4


async def test_a_worker_that_has_left_is_told_as_holding_nothing(world: World) -> None:
    worker = await world.worker("w1", device=[1])
    call = world.watch()
    await next_news(call)
    await worker.close()
    news = await next_news(call)
    assert (news["w1"].attached, adapters(news["w1"])) == (False, {})
    await world.worker("w1", host=[2])
    news = await next_news(call)
    assert (news["w1"].attached, adapters(news["w1"])) == (True, {digest_of(2): HOST})


async def test_watches_are_bounded_and_end_with_the_scheduler(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.scheduler._residency, "_watches_max", 2)
    open_calls = [world.watch(), world.watch()]
    for call in open_calls:
        await next_news(call)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await next_news(world.watch())
    assert reason_of(caught.value) is Reason.TOO_MANY_REQUESTS
    open_calls[0].cancel()
    async with asyncio.timeout(WAIT_S):
        while world.scheduler._residency._watches == 2:
            await asyncio.sleep(0.01)
    await next_news(world.watch())
    await world.scheduler.stop(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await next_news(open_calls[1])
    assert reason_of(caught.value) is Reason.DRAINING


async def test_the_state_has_what_each_worker_holds_in_both_tiers(world: World) -> None:
    worker = await world.worker("w1", device=[1], host=[1, 2])
    await worker.report_host(5)
    async with asyncio.timeout(WAIT_S):
        while True:
            (known,) = (await worker.state()).workers
            if known.host_cache == host_cache(5):
                break
            await asyncio.sleep(0.01)
    assert known.status.resident[0].size_bytes == 1000


async def test_an_unload_waits_until_every_holder_reports_without_the_adapter(
    world: World,
) -> None:
    first = await world.worker("w1", device=[1, 2], host=[1])
    second = await world.worker("w2", host=[1])
    third = await world.worker("w3", device=[2])
    unload = world.unload(1)
    for worker in (first, second):
        assert (await worker.take("drop")).digest == digest_of(1)
    await first.report(device_status(2))
    await second.report_host()
    await asyncio.sleep(0.2)
    assert not unload.done()  # the first still has it in host memory
    await first.report_host()
    answer = await unload
    assert list(answer.unloaded_workers) == ["w1", "w2"]
    assert list(answer.holding_workers) == []
    assert answer.freed_bytes == 3000
    # It may be on its way to one that does not hold it yet.
    assert (await third.take("drop")).digest == digest_of(1)


async def test_an_unload_ends_with_its_grace_and_names_who_still_holds(world: World) -> None:
    first = await world.worker("w1", device=[1])
    await world.worker("w2", device=[1])
    unload = world.unload(1, grace_s=0.4)
    await first.take("drop")
    await first.report(device_status())
    answer = await unload
    assert list(answer.unloaded_workers) == ["w1"]
    assert list(answer.holding_workers) == ["w2"]
    assert answer.freed_bytes == 1000


async def test_a_worker_that_attaches_meanwhile_with_the_adapter_is_told_too(world: World) -> None:
    first = await world.worker("w1", device=[1])
    unload = world.unload(1)
    await first.take("drop")
    late = await world.worker("w2", host=[1])
    await first.report(device_status())
    assert (await late.take("drop")).digest == digest_of(1)
    await late.report_host()
    assert list((await unload).unloaded_workers) == ["w1", "w2"]


async def test_a_worker_that_comes_back_with_the_adapter_is_told_again(world: World) -> None:
    first = await world.worker("w1", device=[1])
    unload = world.unload(1)
    await first.take("drop")
    again = await world.worker("w1", device=[1])
    await again.take("drop")
    await again.report(device_status())
    assert list((await unload).unloaded_workers) == ["w1"]


async def test_a_worker_that_leaves_has_confirmed_nothing(world: World) -> None:
    first = await world.worker("w1", device=[1])
    unload = world.unload(1)
    await first.take("drop")
    await first.close()
    answer = await unload
    assert list(answer.unloaded_workers) == list(answer.holding_workers) == []
    assert answer.freed_bytes == 0


async def test_an_adapter_that_is_loaded_again_does_not_keep_its_unload_waiting(
    world: World,
) -> None:
    first = await world.worker("w1", device=[1])
    second = await world.worker("w2", device=[1])
    unload = world.unload(1)
    await first.take("drop")
    await first.report(device_status())
    await asyncio.sleep(0.2)
    await first.report(device_status(1, users=1))
    await second.report(device_status())
    answer = await unload
    assert list(answer.unloaded_workers) == ["w1", "w2"]
    assert first.waiting("drop") == 0


async def test_an_adapter_that_nobody_holds_is_unloaded_at_once(world: World) -> None:
    await world.worker("w1", device=[2])
    answer = await world.unload(1)
    assert answer == scheduler_pb2.UnloadAdapterResponse()


@pytest.mark.parametrize(
    ("adapter", "grace_s", "field"),
    [
        ("", None, "digest"),
        ("sha256:12", None, "digest"),
        ("sha256:" + "G" * 64, None, "digest"),
        ("poet", None, "digest"),
        (1, -1.0, "grace"),
        (1, unloading.GRACE_S_MAX + 1, "grace"),
    ],
)
async def test_a_bad_unload_is_refused_with_the_field(
    world: World, adapter: int | str, grace_s: float | None, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.unload(adapter, grace_s=grace_s)
    refusal = RpcError.from_rpc(caught.value)
    assert refusal is not None
    assert (refusal.reason, refusal.context.field) == (Reason.INVALID_FIELD, field)


async def test_unloads_under_way_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = await world.worker("w1", device=[1, 2, 3])
    monkeypatch.setattr(world.scheduler._unloading, "_unloads_max", 2)
    under_way = [world.unload(number, grace_s=1.0) for number in (1, 2)]
    for _ in under_way:
        await worker.take("drop")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.unload(3)
    assert reason_of(caught.value) is Reason.TOO_MANY_REQUESTS
    await asyncio.gather(*under_way)
    await worker.report(device_status())
    assert (await world.unload(9)).freed_bytes == 0


def test_holders_are_who_has_it_in_any_tier_by_size_or_by_blocks() -> None:
    known = residency.Residency()
    hello = scheduler_pb2.WorkerHello(worker_id="w1", status=device_status(1))
    hello.capacity.block_bytes = 64
    hello.status.resident[0].size_bytes = 0  # an older worker does not say
    known.attach(hello)
    assert known.holders(digest_of(1)) == {"w1": 128}
    known.report_host_cache("w1", host_cache(1))
    assert known.holders(digest_of(1)) == {"w1": 1128}
    known.report_status("w1", device_status())
    assert known.holders(digest_of(1)) == {"w1": 1000}
    known.leave("w1")
    assert known.holders(digest_of(1)) == {}
