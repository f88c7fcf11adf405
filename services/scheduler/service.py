"""Puts the scheduler together and runs it."""

import asyncio
import time
import uuid
from typing import Final

from calumma.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from services.common.errors import Reason, RpcError
from services.common.interceptors import ServerInterceptor
from services.common.server import ServiceServer
from services.scheduler.config import SchedulerSettings
from services.scheduler.driver import Driver
from services.scheduler.gateways import GatewayStreams
from services.scheduler.journal import Journal
from services.scheduler.links import Links
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.performer import Performer
from services.scheduler.residency import Residency
from services.scheduler.servicer import SchedulerServicer
from services.scheduler.unloading import Unloading
from services.scheduler.workers import WorkerStreams

SERVICE: Final = scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name
LONG_LIVED: Final = frozenset({"Submit", "Attach", "WatchResidency"})
WATCH_INTERVAL_S: Final = 1.0
DRAIN_POLL_S: Final = 0.05
CLOSE_S: Final = 2.0  # for streams to carry their last message


async def start(settings: SchedulerSettings) -> "Scheduler":
    """Start a scheduler. It is ready when this returns."""
    scheduler = Scheduler(settings)
    await scheduler.start()
    return scheduler


class Scheduler:
    """A running scheduler."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self._settings = settings
        scheduler_id = f"scheduler-{uuid.uuid4().hex[:12]}"
        self._gateway_links = Links[scheduler_pb2.SubmitResponse]()
        self._worker_links = Links[scheduler_pb2.AttachResponse]()
        self._metrics = SchedulerMetrics()
        self._journal = (
            Journal(settings.record, size_bytes_max=settings.record_bytes_max)
            if settings.record is not None
            else None
        )
        recipe = settings.recipe()
        performer = Performer(
            self._gateway_links, self._worker_links, policy=recipe.policy, metrics=self._metrics
        )
        self._driver = Driver(
            recipe, performer, journal=self._journal, on_failure=self._end_streams
        )
        self._residency = Residency()
        self._workers = WorkerStreams(
            settings,
            scheduler_id=scheduler_id,
            driver=self._driver,
            links=self._worker_links,
            gateways=self._gateway_links,
            residency=self._residency,
        )
        gateways = GatewayStreams(
            settings,
            scheduler_id=scheduler_id,
            driver=self._driver,
            performer=performer,
            links=self._gateway_links,
            worker_addresses=self._workers.addresses,
        )
        self._unloading = Unloading(self._residency, self._worker_links)
        self._servicer = SchedulerServicer(
            scheduler_id,
            system=settings.system,
            driver=self._driver,
            gateways=gateways,
            workers=self._workers,
            residency=self._residency,
            unloading=self._unloading,
        )
        self._server = ServiceServer(settings, ServerInterceptor(long_lived=LONG_LIVED))
        self._tasks: list[asyncio.Task[None]] = []
        self._address = ""

    @property
    def address(self) -> str:
        """Bound "host:port"."""
        return self._address

    async def start(self) -> None:
        """Listen and drive."""
        self._server.add(
            SERVICE,
            lambda server: scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(
                self._servicer, server
            ),
        )
        self._tasks = [
            asyncio.create_task(self._driver.run(), name="driver"),
            asyncio.create_task(self._watch(), name="watch"),
        ]
        self._address = await self._server.start()
        await self._server.set_serving(SERVICE, serving=True)

    async def stop(self, grace_s: float) -> None:
        """Go on until no request is left, for `grace_s` at most; then send every peer away.

        Peers reconnect, to this address or to where it leads by then, and announce what they hold:
        a request that is still queued or running is not lost.
        """
        await self._server.set_serving(SERVICE, serving=False)
        deadline_s = time.monotonic() + grace_s
        # Idle is a state of the core, not an event.
        while time.monotonic() < deadline_s and not self._driver.is_idle():  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_S)
        self._residency.end()
        draining = RpcError(Reason.DRAINING, "the scheduler is going away", retry_after_s=0.1)
        self._gateway_links.close(draining, discard=False)
        self._worker_links.close(draining, discard=False)
        await self._server.stop(CLOSE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._workers.close()
        if self._journal is not None:
            await asyncio.to_thread(self._journal.close)

    def _end_streams(self) -> None:
        failure = RpcError(Reason.INTERNAL, "the scheduler starts afresh", retry_after_s=0.1)
        self._gateway_links.close(failure, discard=True)
        self._worker_links.close(failure, discard=True)

    async def _watch(self) -> None:
        """Cut off peers that stopped reading, and show the gauges."""
        stall_s = self._settings.stall_s
        while True:
            await asyncio.sleep(min(WATCH_INTERVAL_S, stall_s / 2))
            now = time.monotonic()
            self._gateway_links.cut_off_stalled(now, stall_s=stall_s)
            self._worker_links.cut_off_stalled(now, stall_s=stall_s)
            lengths = {queue.name: queue.length for queue in self._driver.snapshot().queues}
            self._metrics.observe(lengths, workers=len(self._worker_links))
