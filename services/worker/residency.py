"""Where adapters are: the adapter store, this worker's host memory, device memory.

The core decides what is in device memory; this performs it. A load takes the blob from the host
cache or else from the store, once however many requests wait, and hands it to the engine layer by
layer while it arrives. It belongs to nobody: requests that leave do not end it. Every load ends in
one call of `on_ended`. The store being down harms nobody whose adapter is here.

Memory that the engine has seen is used again only when the engine's thread has let go of it: an
adapter that was evicted, or whose load failed, is *leaving* until then, and a new load of it waits.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from typing import Final

import structlog
from opentelemetry import context as otel_context
from opentelemetry.context import Context

from services.common.adapter_container import ContainerError, read_header
from services.common.errors import Reason, RpcError
from services.core.types import Adapter, AdapterDigest
from services.worker.arena import Slab
from services.worker.engine import AdapterIncompatibleError
from services.worker.engine_thread import EngineThread
from services.worker.host_cache import HostCache
from services.worker.intake import COPIES_MAX, PARTS_MAX, ArrivingBytes, Intake, begin, parts
from services.worker.measures import LoadStages, Measures
from services.worker.outputs import Tier
from services.worker.paging import bring_pages

NO_MEMORY_RETRY_S: Final = 1.0  # other adapters leave as their requests end
_log = structlog.get_logger("residency")
# Fills memory with an adapter's blob and tells how many bytes are there.
Fetch = Callable[[Adapter, memoryview, Callable[[int], None]], Awaitable[None]]
# Told of a load how many layers can be used, from the first on.
OnProgress = Callable[[AdapterDigest, int], None]
OnEnded = Callable[[AdapterDigest, RpcError | None], None]


@dataclass(frozen=True, slots=True)
class HeldAdapter:
    """Where an adapter is now. `tier`: the nearest that has all of it; STORE while it comes."""

    adapter: Adapter
    tier: Tier
    in_host: bool
    ready_layers: int | None = None  # in device memory; of a load under way only


@dataclass(slots=True)
class _Load:
    adapter: Adapter
    blocks: tuple[int, ...]  # of the pool
    tier: Tier  # where it comes from
    slab: Slab
    asked_s: float
    ready_layers: int = 0
    first_layers_s: float | None = None  # since it was asked for
    in_engine: bool = False
    task: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class _Resident:
    adapter: Adapter
    slab: Slab | None  # where the engine's rows are; None: in memory of its own


@dataclass(frozen=True, slots=True)
class _Leaving:
    slab: Slab | None
    gone: asyncio.Event
    waits: bool = False  # what came of a load that failed: until the core knows of that


class Residency:
    """Adapters of this worker by tier. Its methods belong to the driver.

    `executor` does the hashing and the engine's part of loads. `is_copied`: the engine moves
    adapters to memory of its own. Then what is in host memory comes in parts, too, and needs not
    stay there; else host memory is what the engine computes with, and nothing is moved.
    """

    def __init__(
        self,
        *,
        engine: EngineThread,
        fetch: Fetch,
        host_cache: HostCache,
        measures: Measures,
        executor: Executor,
        num_layers: int,
        is_copied: bool,
    ) -> None:
        self._engine = engine
        self._fetch = fetch
        self._host_cache = host_cache
        self._measures = measures
        self._executor = executor
        self.num_layers = num_layers
        self._is_copied = is_copied
        self._parts_max = COPIES_MAX if is_copied else PARTS_MAX
        self._device: dict[AdapterDigest, _Resident] = {}
        self._loads: dict[AdapterDigest, _Load] = {}
        self._leaving: dict[AdapterDigest, _Leaving] = {}

    def tier(self, digest: AdapterDigest | None) -> Tier:
        """Where a request that comes now finds its adapter."""
        if digest is None:
            return Tier.NONE
        if digest in self._device:
            return Tier.DEVICE
        if digest in self._loads:
            return self._loads[digest].tier
        return Tier.HOST if digest in self._host_cache else Tier.STORE

    def held(self) -> dict[AdapterDigest, HeldAdapter]:
        """Every adapter in device or host memory or on its way there."""
        cache = self._host_cache
        held = {it.digest: HeldAdapter(it, Tier.HOST, in_host=True) for it in cache}
        for digest, load in self._loads.items():
            is_near = digest in cache
            tier = Tier.HOST if is_near else Tier.STORE
            held[digest] = HeldAdapter(load.adapter, tier, is_near, load.ready_layers)
        for digest, resident in self._device.items():
            held[digest] = HeldAdapter(resident.adapter, Tier.DEVICE, digest in cache)
        return held

    def near(self) -> frozenset[AdapterDigest]:
        """Adapters that load without the store. The same object while they do not change."""
        return self._host_cache.digests

    def load(
        self,
        adapter: Adapter,
        *,
        blocks: tuple[int, ...],
        context: Context | None,
        on_progress: OnProgress,
        on_ended: OnEnded,
    ) -> None:
        """Begin to bring the adapter into these blocks. `context`: the span it happens in.

        They are the adapter's until it was evicted, or until the end of a load that failed. By then
        no loader thread writes to them any more.
        """
        digest = adapter.digest
        assert digest not in self._loads
        assert digest not in self._device
        tier = self.tier(digest)
        try:
            slab = self._host_cache.get(digest) or self._host_cache.allocate(adapter.size_bytes)
        except MemoryError as error:
            failure = _as_rpc_error(error, adapter)
            asyncio.get_running_loop().call_soon(on_ended, digest, failure)
            return
        load = self._loads[digest] = _Load(adapter, blocks, tier, slab, time.monotonic())

        async def run() -> None:
            otel_context.attach(context or Context())
            error = await self._load(load, on_progress)
            del self._loads[digest]
            if error is None:
                self._device[digest] = _Resident(adapter, None if self._is_copied else slab)
                if self._is_copied:
                    slab.release()
            on_ended(digest, error)

        load.task = asyncio.create_task(run(), name=f"load {digest[:19]}")

    def evict(self, digest: AdapterDigest) -> None:
        """Take the adapter out of device memory."""
        slab = self._device.pop(digest).slab
        self._leaving[digest] = _Leaving(slab, asyncio.Event())
        self._remove(digest)

    def clear(self, digest: AdapterDigest) -> None:
        """Take out of the engine what came of a load that failed, now that the core knows of it.

        Before that it may still let a request use the layers that came.
        """
        leaving = self._leaving.get(digest)
        if leaving is not None and leaving.waits:
            self._leaving[digest] = replace(leaving, waits=False)
            self._remove(digest)

    def drop_host(self, digest: AdapterDigest) -> bool:
        """Forget the copy in host memory. False, and nothing happens, while it is being loaded.

        Memory that the engine still uses is given back when the adapter is evicted.
        """
        if digest in self._loads:
            return False
        self._host_cache.drop(digest)
        return True

    async def stop(self) -> None:
        """End the loads under way, without a report."""
        tasks = [load.task for load in self._loads.values() if load.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def check_integrity(self) -> None:
        """Assert that memory is held by those who use it, and by nobody else."""
        self._host_cache.check_integrity()
        held = (self._device.values(), self._loads.values(), self._leaving.values())
        slabs = (holder.slab for holders in held for holder in holders)
        users = Counter(slab for slab in slabs if slab is not None)
        for slab, count in users.items():
            assert slab.users == count + self._host_cache.uses(slab)
        outside_bytes = sum(slab.size_bytes for slab in users if not slab.is_inside)
        assert outside_bytes == self._host_cache.arena.outside_bytes
        inside = sum(slab.is_inside and not self._host_cache.uses(slab) for slab in users)
        assert self._host_cache.arena.slabs == inside + len(self._host_cache)

    async def _load(self, load: _Load, on_progress: OnProgress) -> RpcError | None:
        digest = load.adapter.digest
        if digest in self._leaving:
            await self._leaving[digest].gone.wait()
        try:
            if load.tier is Tier.HOST:
                stages = await self._load_from_host(load, on_progress)
            else:
                stages = await self._load_from_store(load, on_progress)
                self._host_cache.put(load.adapter, load.slab)
        except Exception as error:  # noqa: BLE001 - every load ends in one event
            if load.in_engine:
                self._leaving[digest] = _Leaving(load.slab, asyncio.Event(), waits=True)
            else:
                load.slab.release()
            return _as_rpc_error(error, load.adapter)
        self._measures.record_load(stages, load.tier, load.adapter.size_bytes)
        _log.info(
            "adapter_loaded",
            digest=digest,
            tier=load.tier,
            bytes=load.adapter.size_bytes,
            **{name: round(value or 0.0, 6) for name, value in asdict(stages).items()},
        )
        return None

    async def _load_from_store(self, load: _Load, on_progress: OnProgress) -> LoadStages:
        view = load.slab.view
        intake = Intake(
            load.adapter,
            view,
            blocks=load.blocks,
            engine=self._engine,
            num_layers=self.num_layers,
            parts_max=self._parts_max,
            on_layers=self._reporter(load, on_progress),
        )
        arriving = ArrivingBytes(intake, self._executor)
        first_s: float | None = None

        def on_received(received_bytes: int) -> None:
            nonlocal first_s
            first_s = first_s or time.monotonic()
            arriving.note(received_bytes)

        # Nobody waits for that: it is over before the store answers, or helps with the rest.
        self._executor.submit(bring_pages, view)
        try:
            await self._fetch(load.adapter, view, on_received)
            received_s = time.monotonic()
            await arriving.finish()
        finally:
            await arriving.settle()
            load.in_engine = intake.has_begun
        ready_s = time.monotonic()
        first_s = first_s or received_s
        return LoadStages(
            wait_s=first_s - load.asked_s,
            download_s=received_s - first_s,
            engine_s=ready_s - received_s,
            first_layers_s=load.first_layers_s,
        )

    async def _load_from_host(self, load: _Load, on_progress: OnProgress) -> LoadStages:
        report = self._reporter(load, on_progress)
        began_s = time.monotonic()

        def hand_over() -> None:
            nonlocal began_s
            began_s = time.monotonic()
            view = load.slab.view
            begin(self._engine, load.adapter, read_header(view), blob=view, blocks=load.blocks)
            load.in_engine = True
            parts_max = self._parts_max if self._is_copied else 1
            for layers in parts(self.num_layers, parts_max):
                self._engine.extend_adapter(load.adapter.digest, layers)
                if layers < self.num_layers:
                    report(layers)

        await asyncio.get_running_loop().run_in_executor(self._executor, hand_over)
        return LoadStages(
            wait_s=began_s - load.asked_s,
            download_s=0.0,
            engine_s=time.monotonic() - began_s,
            first_layers_s=load.first_layers_s,
        )

    def _reporter(self, load: _Load, on_progress: OnProgress) -> Callable[[int], None]:
        """What a loader thread calls with the layers that can be used."""
        loop = asyncio.get_running_loop()

        def tell(layers: int) -> None:
            if self._loads.get(load.adapter.digest) is load:
                load.ready_layers = layers
                if load.first_layers_s is None:
                    load.first_layers_s = time.monotonic() - load.asked_s
                on_progress(load.adapter.digest, layers)

        def report(layers: int) -> None:
            loop.call_soon_threadsafe(tell, layers)

        return report

    def _remove(self, digest: AdapterDigest) -> None:
        """Take it out of the engine, and then give its memory back."""

        def on_removed() -> None:
            leaving = self._leaving.pop(digest)
            if leaving.slab is not None:
                leaving.slab.release()
            leaving.gone.set()

        self._engine.remove_adapter(digest, on_removed)


def _as_rpc_error(error: Exception, adapter: Adapter) -> RpcError:
    match error:
        case RpcError():
            _log.warning("adapter_load_failed", digest=adapter.digest, reason=error.reason)
            return error
        case MemoryError():
            _log.error("no_memory_for_adapter", digest=adapter.digest, error=str(error))
            return RpcError(
                Reason.TOO_MANY_REQUESTS,
                "the worker has no memory for the adapter at the moment",
                stage="adapter_load",
                resource=("adapter", adapter.digest),
                retry_after_s=NO_MEMORY_RETRY_S,
            )
        case AdapterIncompatibleError():
            reason = Reason.ADAPTER_BASE_MISMATCH
        case ContainerError():
            reason = Reason.ADAPTER_CORRUPT
        case _:
            reason = Reason.INTERNAL
    bug = error if reason is Reason.INTERNAL else None
    _log.warning(
        "adapter_load_failed",
        digest=adapter.digest,
        reason=reason,
        error=str(error),
        exc_info=bug,
    )
    message = "the adapter could not be loaded" if reason is Reason.INTERNAL else str(error)
    return RpcError(reason, message, stage="adapter_load", resource=("adapter", adapter.digest))
