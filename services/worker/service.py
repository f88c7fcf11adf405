"""Composes a worker and starts it: engine first, then the listener, then the scheduler.

Ready means that the model is loaded and the engine warm, whether or not a scheduler is there.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, Literal

import grpc
import structlog

from calumma.worker.v1 import worker_pb2_grpc as pb_grpc
from services.common.base_model import DEFAULT_MODEL, locate
from services.common.clients import open_channel
from services.common.interceptors import ServerInterceptor
from services.common.server import ServiceServer
from services.core.replica import ReplicaScheduler
from services.core.types import Capacity
from services.worker.arena import HostArena
from services.worker.attach import Identity, SchedulerLink
from services.worker.config import WorkerSettings
from services.worker.downloads import AdapterDownloads
from services.worker.driver import Driver
from services.worker.engine import Engine, EngineInfo, EngineSettings, build_engine
from services.worker.engine_thread import EngineThread
from services.worker.host_cache import HostCache
from services.worker.measures import Measures
from services.worker.pinning import pin
from services.worker.pins import PinWatch
from services.worker.reports import Reports
from services.worker.residency import Residency
from services.worker.roster import Roster
from services.worker.servicer import LONG_LIVED, SERVICE, WorkerServicer
from services.worker.streams import TokenStreams

LOADER_THREADS: Final = 2  # hashing and copying; more would take cores from the steps
ABORT_S_MAX: Final = 5.0  # an aborted request has left after the step that it is in
STREAMS_S_MAX: Final = 2.0  # for the gateways to read their last frames
_log = structlog.get_logger("worker")


async def start(
    settings: WorkerSettings,
    *,
    build: Callable[[], Engine] | None = None,
    on_failure: Callable[[], None] | None = None,
) -> "Worker":
    """Load the model, listen, attach. `on_failure` is called when the worker can't go on.

    Raises BaseModelError and ValueError when the engine can't be built.
    """
    arena = HostArena(settings.host_cache_bytes)
    if _device(settings) == "cuda":
        await asyncio.to_thread(pin, arena.memory)
    engine = EngineThread(build or partial(build_engine, _engine_settings(settings)))
    try:
        info = await engine.start()
    except BaseException:
        await engine.stop()
        raise
    _log.info("engine_ready", engine=info.description, pool_blocks=info.pool_blocks)
    if info.without_native is not None:
        _log.info("no_native_step", reason=info.without_native)
    worker = Worker(settings, engine, info, arena=arena, on_failure=on_failure)
    await worker.start()
    return worker


class Worker:
    """A running worker. Its parts are public to tests."""

    def __init__(
        self,
        settings: WorkerSettings,
        engine: EngineThread,
        info: EngineInfo,
        *,
        arena: HostArena,
        on_failure: Callable[[], None] | None,
    ) -> None:
        self.settings = settings
        self._info = info
        self._engine = engine
        self._on_failure = on_failure
        self.has_failed = False
        self._store_channel = open_channel(settings.adapter_store)
        self._scheduler_channel = open_channel(settings.scheduler)
        self._loaders = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="loader")
        self._reports = Reports()
        self.measures = Measures()
        self.residency = Residency(
            engine=engine,
            fetch=AdapterDownloads(
                self._store_channel,
                read_timeout_s=settings.store_read_timeout_s,
            ).fetch,
            host_cache=HostCache(arena),
            measures=self.measures,
            executor=self._loaders,
            num_layers=info.num_layers,
            is_copied=_copies_adapters(settings),
        )
        self.streams = TokenStreams(
            away_s=settings.gateway_away_s,
            on_away=lambda gateway_id: self.driver.abandon(
                "the gateway's token stream was away", gateway_id=gateway_id
            ),
        )
        self.roster = Roster(self.streams, self._reports)
        self.core = ReplicaScheduler(settings.replica(), _capacity(info))
        self.driver = Driver(
            self.core,
            engine=engine,
            residency=self.residency,
            roster=self.roster,
            measures=self.measures,
            requests_max=8 * info.max_sequences + 64,
        )
        self._server = ServiceServer(settings, ServerInterceptor(long_lived=LONG_LIVED))
        self._link: SchedulerLink | None = None
        self._running: asyncio.Task[None] | None = None
        self._address = ""

    @property
    def address(self) -> str:
        """Bound "host:port"."""
        return self._address

    async def start(self) -> None:
        """Listen, become ready, attach."""
        self._server.add(SERVICE, self._register)
        self._address = await self._server.start()
        identity = Identity(
            worker_id=self.settings.worker_id,
            address=self.settings.advertise or self._address,
            info=self._info,
            capacity=_capacity(self._info),
            caches_prefixes=self.settings.replica().prefix_cache,
        )
        self._link = SchedulerLink(
            self._scheduler_channel,
            identity,
            driver=self.driver,
            roster=self.roster,
            reports=self._reports,
            measures=self.measures,
            residency=self.residency,
        )
        self._running = asyncio.create_task(self._run(self._link), name="worker")
        await self._server.set_serving(SERVICE, serving=True)

    async def drain(self, grace_s: float | None = None) -> int:
        """Take nothing new; wait for what runs; end the rest. Returns how many that were.

        Gateways submit the ended ones again, elsewhere.
        """
        self.driver.is_accepting = False
        self._reports.bell.set()
        await self._server.set_serving(SERVICE, serving=False)
        if self.has_failed:
            return 0
        if await self.driver.wait_idle(self.settings.grace_s if grace_s is None else grace_s):
            return 0
        aborted = self.driver.abandon("the worker was drained")
        await self.driver.wait_idle(ABORT_S_MAX)
        return aborted

    async def stop(self, grace_s: float) -> None:
        """Drain for at most `grace_s`, then end everything."""
        aborted = await self.drain(grace_s)
        _log.info("drained", aborted_requests=aborted)
        self.streams.close()
        if self._link is not None and not self.has_failed:
            await self._link.stop()
        await self._server.stop(STREAMS_S_MAX)
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await self.residency.stop()
        await asyncio.to_thread(self._loaders.shutdown)
        await self._engine.stop()
        await self._store_channel.close()
        await self._scheduler_channel.close()

    def _register(self, server: grpc.aio.Server) -> None:
        servicer = WorkerServicer(
            self.settings.worker_id,
            self._info,
            driver=self.driver,
            residency=self.residency,
            streams=self.streams,
            measures=self.measures,
            drain=self.drain,
        )
        pb_grpc.add_WorkerServiceServicer_to_server(servicer, server)

    async def _run(self, link: SchedulerLink) -> None:
        """The driver and the link, until cancelled. Either's failure is the worker's."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.driver.run(), name="driver")
                group.create_task(link.run(), name="attach")
                if self.settings.follow_pins:
                    pins = PinWatch(self._store_channel, self.driver.set_pins)
                    group.create_task(pins.run(), name="pins")
        except* Exception as failures:  # noqa: BLE001 - this process must be replaced
            _log.error("worker_failed", exc_info=failures)
            self.has_failed = True
            self.driver.is_accepting = False
            self.driver.abandon("the worker has failed")
            await self._server.set_serving(SERVICE, serving=False)
            if self._on_failure is not None:
                self._on_failure()


def _engine_settings(settings: WorkerSettings) -> EngineSettings:
    model = settings.model
    if model is None and settings.engine == "torch":
        model = DEFAULT_MODEL
    return EngineSettings(
        kind=settings.engine,
        model=None if model is None else locate(model),
        device=_device(settings),
        dtype=settings.dtype,
        tier=settings.tier,
        max_sequences=settings.max_requests,
        max_context_tokens=settings.max_context_tokens,
        memory_bytes=settings.memory_bytes,
        block_tokens=settings.block_tokens,
        profile=settings.profile,
        seed=settings.seed,
        threads=settings.thread_count,
        tensor_parallel=settings.tensor_parallel,
    )


def _device(settings: WorkerSettings) -> Literal["cpu", "cuda"]:
    if settings.device != "auto":
        return settings.device
    if settings.engine == "simulated":
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _copies_adapters(settings: WorkerSettings) -> bool:
    """Whether the engine copies adapters; else it uses host memory as it is."""
    is_split = settings.tensor_parallel > 1  # each shard has its own part
    return settings.engine == "simulated" or _device(settings) == "cuda" or is_split


def _capacity(info: EngineInfo) -> Capacity:
    return Capacity(
        pool_blocks=info.pool_blocks,
        block_bytes=info.block_bytes,
        block_tokens=info.block_tokens,
        max_requests=info.max_sequences,
        max_context_tokens=info.max_context_tokens,
        num_layers=info.num_layers,
    )
