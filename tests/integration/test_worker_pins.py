"""A worker's pins follow the watch of a store that does as it is told, over real gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any
from zlib import crc32

import grpc
import pytest

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from calumma.common.v1 import common_pb2
from services.common.clients import open_channel
from services.core.types import Pin
from services.worker import pins as pins_module
from services.worker.pins import PinWatch

WAIT_S = 10.0


def digest_of(number: int) -> str:
    return f"sha256:{number:064x}"


def adapter(
    name: str, *pins: tuple[str, str], versions: tuple[int, ...] = (1, 2), **aliases: int
) -> pb.Adapter:
    """An adapter whose versions have their number, and the name's checksum, as digest."""
    made = pb.Adapter(name=name, aliases=aliases)
    for number in versions:
        ref = common_pb2.AdapterRef(
            digest=digest_of(crc32(name.encode()) * 100 + number),
            name=name,
            version=number,
            rank=8 * number,
            size_bytes=1000 * number,
        )
        made.versions.add(ref=ref)
    for age, (selector, reason) in enumerate(pins):
        pinned = made.pins.add(selector=selector, reason=reason)
        pinned.create_time.FromSeconds(100 + age)
    return made


class Store:
    """Says what a test tells it to, on one watch at a time."""

    def __init__(self) -> None:
        self.requests: list[pb.WatchRequest] = []
        self.address = "127.0.0.1:0"
        self._messages: asyncio.Queue[pb.WatchResponse | grpc.StatusCode] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None

    async def listen(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        watch = grpc.unary_stream_rpc_method_handler(
            self._watch,
            request_deserializer=pb.WatchRequest.FromString,
            response_serializer=pb.WatchResponse.SerializeToString,
        )
        service = "calumma.adapter_store.v1.AdapterStoreService"
        handler = grpc.method_handlers_generic_handler(service, {"Watch": watch})
        self._server.add_generic_rpc_handlers((handler,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port(self.address)}"
        await self._server.start()

    async def close(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def updated(self, made: pb.Adapter, token: str = "") -> None:
        self._messages.put_nowait(pb.WatchResponse(updated=made, resume_token=token))

    def deleted(self, name: str, token: str = "") -> None:
        self._messages.put_nowait(pb.WatchResponse(deleted=name, resume_token=token))

    def synced(self, token: str = "t1", *, resumed: bool = False) -> None:
        synced = pb.WatchSynced(resumed=resumed)
        self._messages.put_nowait(pb.WatchResponse(synced=synced, resume_token=token))

    def fail(self, code: grpc.StatusCode) -> None:
        self._messages.put_nowait(code)

    async def _watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        while True:
            message = await self._messages.get()
            if isinstance(message, grpc.StatusCode):
                await context.abort(message, "on purpose")
                return
            yield message


class World:
    """A store, and what the watch has told of it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.told: list[tuple[Pin, ...]] = []

    @property
    def pinned(self) -> list[tuple[str, str]]:
        return [(pin.adapter.digest, pin.reason) for pin in self.told[-1]] if self.told else []

    async def until(self, *pins: tuple[str, str]) -> None:
        async with asyncio.timeout(WAIT_S):
            while self.pinned != list(pins):
                await asyncio.sleep(0.005)

    async def watched(self, times: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.store.requests) < times:
                await asyncio.sleep(0.005)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        store = Store()
        await store.listen()
        stack.push_async_callback(store.close)
        channel = await stack.enter_async_context(open_channel(store.address))
        it = World(store)
        run = asyncio.create_task(PinWatch(channel, it.told.append).run())
        stack.callback(run.cancel)
        yield it


def version(made: pb.Adapter, number: int) -> str:
    return next(one.ref.digest for one in made.versions if one.ref.version == number)


async def test_pins_mean_the_newest_a_number_or_an_alias_of_their_adapter(world: World) -> None:
    made = adapter("poet", ("", "a"), ("1", "b"), ("prod", "c"), versions=(1, 2, 3), prod=2)
    world.store.updated(made)
    world.store.synced()
    await world.until((version(made, 3), "a"), (version(made, 1), "b"), (version(made, 2), "c"))
    assert world.store.requests[0].pinned_only
    (newest, *_) = world.told[-1]
    assert (newest.adapter.rank, newest.adapter.size_bytes) == (24, 3000)


async def test_nothing_is_told_before_everything_is_known(world: World) -> None:
    first, second = adapter("a", ("", "x")), adapter("b", ("", "y"))
    world.store.updated(first)
    world.store.updated(second)
    await asyncio.sleep(0.2)
    assert world.told == []
    world.store.synced()
    await world.until((version(first, 2), "x"), (version(second, 2), "y"))
    assert len(world.told) == 1


async def test_pins_follow_changes_and_are_told_only_when_they_differ(world: World) -> None:
    world.store.synced()
    made = adapter("poet", ("prod", "x"), prod=1)
    world.store.updated(made)
    await world.until((version(made, 1), "x"))
    world.store.updated(adapter("poet", ("prod", "x"), prod=1, test=2))  # nothing for pins
    moved = adapter("poet", ("prod", "x"), prod=2)
    world.store.updated(moved)
    await world.until((version(moved, 2), "x"))
    world.store.deleted("poet")
    await world.until()
    assert len(world.told) == 3


async def test_a_pin_that_means_nothing_is_none(world: World) -> None:
    made = adapter("poet", ("9", "no version"), ("gone", "no alias"), ("1", "fine"))
    odd = adapter("odd", ("", "no size"))
    odd.versions[-1].ref.size_bytes = 0
    world.store.updated(odd)
    world.store.updated(made)
    world.store.synced()
    await world.until((version(made, 1), "fine"))


async def test_weights_that_are_pinned_twice_are_told_once_for_the_older_reason(
    world: World,
) -> None:
    made = adapter("poet", ("1", "older"), ("prod", "newer"), prod=1)
    world.store.updated(made)
    world.store.synced()
    await world.until((version(made, 1), "older"))


async def test_the_last_pins_stay_while_the_store_is_away_and_the_watch_goes_on_after(
    world: World,
) -> None:
    made, other = adapter("poet", ("", "x")), adapter("other", ("", "y"))
    world.store.updated(made)
    world.store.synced("t1")
    world.store.updated(other, token="t2")
    await world.until((version(other, 2), "y"), (version(made, 2), "x"))
    await world.store.close()
    await asyncio.sleep(0.2)
    assert len(world.told[-1]) == 2
    await world.store.listen()
    await world.watched(2)
    assert [request.resume_token for request in world.store.requests] == ["", "t2"]
    world.store.deleted("other", token="t3")
    world.store.synced("t3", resumed=True)
    await world.until((version(made, 2), "x"))


async def test_what_a_whole_snapshot_lacks_is_not_pinned_any_more(world: World) -> None:
    made, gone = adapter("poet", ("", "x")), adapter("gone", ("", "y"))
    world.store.updated(made)
    world.store.updated(gone)
    world.store.synced("t1")
    await world.until((version(gone, 2), "y"), (version(made, 2), "x"))
    world.store.fail(grpc.StatusCode.UNAVAILABLE)
    world.store.updated(made)
    world.store.synced("t2", resumed=False)
    await world.until((version(made, 2), "x"))


async def test_a_token_that_is_refused_is_not_sent_again(world: World) -> None:
    world.store.synced("bad")
    await world.watched(1)
    world.store.fail(grpc.StatusCode.UNAVAILABLE)
    await world.watched(2)
    world.store.fail(grpc.StatusCode.INVALID_ARGUMENT)
    await world.watched(3)
    assert [request.resume_token for request in world.store.requests] == ["", "bad", ""]


async def test_only_so_many_pins_are_told_the_oldest_ones(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pins_module, "PINS_MAX", 2)
    made = adapter("poet", ("3", "a"), ("1", "b"), ("2", "c"), versions=(1, 2, 3))
    world.store.updated(made)
    world.store.synced()
    await world.until((version(made, 3), "a"), (version(made, 1), "b"))
