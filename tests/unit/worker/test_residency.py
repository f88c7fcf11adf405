"""Loads, evictions and failures in any order: memory in use is never anybody else's."""

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.common.adapter_container import ContainerHeader
from services.common.errors import Reason, RpcError
from services.core.types import Adapter, AdapterDigest
from services.worker.arena import HostArena
from services.worker.engine_thread import EngineThread
from services.worker.host_cache import HostCache
from services.worker.measures import Measures
from services.worker.outputs import Tier
from services.worker.residency import Residency
from tests.support.worker_peers import INFO, Blob, FaultyEngine, make_blob, quick_engine

BLOBS = {
    AdapterDigest(blob.digest): blob
    for blob in (make_blob(number, rank=1 + number % 5, layers=4) for number in range(8))
}


class _ReadingEngine(FaultyEngine):
    """Computes with host memory as an engine on the CPU does: the bytes must stay as they are.

    One that `copies` has memory of its own.
    """

    def __init__(self, *, copies: bool) -> None:
        super().__init__(quick_engine())
        self.payloads: dict[str, memoryview] = {}
        self.wrong: list[str] = []
        self._copies = copies

    def begin_adapter(
        self,
        digest: str,
        header: ContainerHeader,
        payload: memoryview,
        *,
        blocks: tuple[int, ...] = (),
    ) -> None:
        super().begin_adapter(digest, header, payload, blocks=blocks)
        self.payloads[digest] = payload

    def remove_adapter(self, digest: str) -> None:
        self.check(digest)
        super().remove_adapter(digest)
        del self.payloads[digest]

    def check(self, digest: str) -> None:
        if self.adapters[digest] == INFO.num_layers and not self._copies:
            data = BLOBS[AdapterDigest(digest)].data
            if bytes(self.payloads[digest]) != data[-len(self.payloads[digest]) :]:
                self.wrong.append(digest)


class _World:
    """A residency with a store that brings bytes in odd pieces."""

    def __init__(self, residency: Residency, engine: _ReadingEngine, dice: random.Random) -> None:
        self.residency = residency
        self.engine = engine
        self.dice = dice
        self.ended: dict[AdapterDigest, RpcError | None] = {}
        self.layers: list[tuple[AdapterDigest, int]] = []

    def load(self, digest: AdapterDigest) -> None:
        self.residency.load(
            _adapter(BLOBS[digest]),
            blocks=(),
            context=None,
            on_progress=lambda name, layers: self.layers.append((name, layers)),
            on_ended=self.ended.__setitem__,
        )

    async def ends(self, digest: AdapterDigest) -> RpcError | None:
        async with asyncio.timeout(10):
            while digest not in self.ended:
                await asyncio.sleep(0.001)
        return self.ended.pop(digest)


@contextlib.asynccontextmanager
async def _world(
    *, arena_bytes: int, is_copied: bool = False, seed: int = 0, fails: float = 0.0
) -> AsyncGenerator[_World]:
    dice = random.Random(seed)

    async def fetch(adapter: Adapter, into: memoryview, on_received: Callable[[int], None]) -> None:
        data, at = bytearray(BLOBS[adapter.digest].data), 0
        fault = dice.choice(["break", "flip"]) if dice.random() < fails else None
        while at < len(data):
            end = min(len(data), at + dice.randint(1, len(data) // 2))
            if fault and dice.random() < 0.5:
                if fault == "break":
                    raise RpcError(Reason.STORE_UNAVAILABLE, "on purpose")
                data[at] ^= 1
                fault = None
            into[at:end] = data[at:end]
            on_received(end)
            at = end
            await asyncio.sleep(dice.choice([0, 0, 0.001]))
        if fault:
            raise RpcError(Reason.STORE_UNAVAILABLE, "on purpose")

    engine = _ReadingEngine(copies=is_copied)
    thread = EngineThread(lambda: engine)
    await thread.start()
    with ThreadPoolExecutor(2) as executor:
        residency = Residency(
            engine=thread,
            fetch=fetch,
            host_cache=HostCache(HostArena(arena_bytes)),
            measures=Measures(),
            executor=executor,
            num_layers=INFO.num_layers,
            is_copied=is_copied,
        )
        yield _World(residency, engine, dice)
        await residency.stop()
    await thread.stop()
    assert engine.wrong == []


@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.parametrize("arena_bytes", [0, 12_000, 100_000])
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_whatever_happens_the_engine_reads_what_was_published(
    seed: int, arena_bytes: int, *, is_copied: bool
) -> None:
    async with _world(arena_bytes=arena_bytes, seed=seed, is_copied=is_copied, fails=0.3) as it:
        residency, loading, loaded = it.residency, set[AdapterDigest](), set[AdapterDigest]()
        for _ in range(250):
            _act(it, loading, loaded)
            await asyncio.sleep(it.dice.choice([0, 0.001]))
            for name in [name for name in loading if name in it.ended]:
                loading.remove(name)
                if it.ended.pop(name) is None:
                    loaded.add(name)
                else:
                    residency.clear(name)
            residency._engine.flush()
            residency.check_integrity()
            for name in loaded:
                it.engine.check(name)
        for digest in loading:
            if await it.ends(digest) is not None:
                residency.clear(digest)
        residency.check_integrity()
        assert all(layers < INFO.num_layers for _, layers in it.layers)


def _act(it: _World, loading: set[AdapterDigest], loaded: set[AdapterDigest]) -> None:
    digest = it.dice.choice(list(BLOBS))
    if digest in loaded:
        it.residency.evict(digest)
        loaded.remove(digest)
    elif digest not in loading and len(loading) < 4:
        it.load(digest)
        loading.add(digest)
    elif it.dice.random() < 0.2:
        it.residency.drop_host(digest)


async def test_an_adapter_that_is_leaving_is_loaded_again_after_that() -> None:
    async with _world(arena_bytes=100_000) as it:
        digest = next(iter(BLOBS))
        it.load(digest)
        assert await it.ends(digest) is None
        it.residency.evict(digest)
        it.load(digest)
        await asyncio.sleep(0.02)
        assert digest not in it.ended  # the engine has not been told to let go of the first
        it.residency._engine.flush()
        assert await it.ends(digest) is None
        assert it.residency.tier(digest) is Tier.DEVICE
        it.engine.check(digest)


async def test_host_memory_is_handed_over_at_once_where_nothing_is_copied() -> None:
    for is_copied, told in ((False, []), (True, [1, 2])):
        async with _world(arena_bytes=100_000, is_copied=is_copied) as it:
            digest = next(iter(BLOBS))
            it.load(digest)
            assert await it.ends(digest) is None
            it.residency.evict(digest)
            it.residency._engine.flush()
            it.layers.clear()
            it.load(digest)
            assert it.residency.tier(digest) is Tier.HOST
            assert await it.ends(digest) is None
            assert [layers for _, layers in it.layers] == told


async def test_an_engine_with_memory_of_its_own_leaves_the_arena_to_others() -> None:
    largest = sorted(BLOBS, key=lambda digest: len(BLOBS[digest].data))[-2:]
    arena_bytes = len(BLOBS[largest[-1]].data) + 256
    for is_copied, outside in ((True, False), (False, True)):
        async with _world(arena_bytes=arena_bytes, is_copied=is_copied) as it:
            for digest in largest:
                it.load(digest)
                assert await it.ends(digest) is None
            held = it.residency.held()
            assert {one.tier for one in held.values()} == {Tier.DEVICE}
            assert (it.residency._host_cache.arena.outside_bytes > 0) == outside


def _adapter(blob: Blob) -> Adapter:
    return Adapter(AdapterDigest(blob.digest), blob.rank, len(blob.data))


async def test_a_load_without_memory_does_nothing_to_the_one_that_is_leaving(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest = next(iter(BLOBS))
    uncaught: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: uncaught.append(what))
    async with _world(arena_bytes=0) as it:
        it.load(digest)
        assert await it.ends(digest) is None
        it.residency.evict(digest)

        def no_mapping(size_bytes: int) -> memoryview:
            raise ValueError("none left")

        with monkeypatch.context() as patched:
            patched.setattr("services.worker.arena._mapping", no_mapping)
            it.load(digest)
        error = await it.ends(digest)
        assert error is not None
        assert error.reason is Reason.TOO_MANY_REQUESTS
        it.residency.clear(digest)
        it.residency._engine.flush()
        it.load(digest)
        assert await it.ends(digest) is None
        it.residency.check_integrity()
        assert uncaught == []
