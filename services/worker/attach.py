"""The worker's stream to the scheduler: it announces itself, reports, and takes requests in.

The stream is opened again, with backoff, for as long as the worker lives. Running requests do not
notice: they need the gateways only. Whatever the scheduler missed is in the next hello.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Final

import grpc
import structlog

from calumma.common.v1 import common_pb2
from calumma.scheduler.v1 import scheduler_pb2 as pb
from calumma.scheduler.v1 import scheduler_pb2_grpc as pb_grpc
from services.common.clients import Backoff
from services.common.errors import RpcError
from services.core.types import Adapter, AdapterDigest, Capacity, GatewayId
from services.worker import wire
from services.worker.driver import Driver
from services.worker.engine import EngineInfo
from services.worker.measures import Measures
from services.worker.reports import Reports
from services.worker.residency import Residency
from services.worker.roster import Roster

STATUS_INTERVAL_S: Final = 0.05
HOST_CACHE_INTERVAL_S: Final = 1.0
WELCOME_S_MAX: Final = 5.0
FLUSH_S_MAX: Final = 1.0
HINTS_MAX: Final = 64
_log = structlog.get_logger("attach")
_Call = Any  # grpc.aio.StreamStreamCall; its stubs disagree on the type parameters


@dataclass(frozen=True, slots=True)
class Identity:
    """Who attaches. `address`: what gateways dial."""

    worker_id: str
    address: str
    info: EngineInfo
    capacity: Capacity
    caches_prefixes: bool


class SchedulerLostError(Exception):
    """The stream ended, or cannot be used any more."""


class _Paced:
    """When to say again what changes often: at most once per interval, and only if it changed.

    The bell rings when a change that came too early may be told.
    """

    def __init__(self, interval_s: float, *, sent: object, bell: asyncio.Event) -> None:
        self._interval_s = interval_s
        self._sent = sent
        self._bell = bell
        self._next_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def is_due(self) -> bool:
        """False while it is too early; then the bell will ring."""
        now = time.monotonic()
        wait_s = self._next_s - now
        if wait_s > 0:
            if self._timer is None:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(wait_s + 0.001, self._bell.set)
            return False
        self._timer = None
        self._next_s = now + self._interval_s
        return True

    def has_changed(self, value: object) -> bool:
        """Whether `value` is to be sent now."""
        if value == self._sent:
            return False
        self._sent = value
        return True


class SchedulerLink:
    """Keeps one Attach stream open."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        identity: Identity,
        *,
        driver: Driver,
        roster: Roster,
        reports: Reports,
        measures: Measures,
        residency: Residency,
    ) -> None:
        self._stub = pb_grpc.SchedulerServiceStub(channel)
        self._identity = identity
        self._driver = driver
        self._roster = roster
        self._reports = reports
        self._measures = measures
        self._residency = residency
        self._backoff = Backoff()
        self._is_stopping = False
        self._was_attached = True  # so that a first failure is logged, and its repetitions are not
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Until `stop`, or cancelled."""
        while not self._is_stopping:
            try:
                await self._attach()
            except (
                grpc.aio.AioRpcError,
                asyncio.InvalidStateError,  # a write to a call that has just ended
                TimeoutError,
                SchedulerLostError,
            ) as error:
                log = _log.warning if self._was_attached else _log.debug
                log("scheduler_lost", error=_said(error))
                self._was_attached = False
            if not self._is_stopping:
                await asyncio.sleep(self._backoff.next_delay_s())
        self._stopped.set()

    async def stop(self) -> None:
        """Send what is pending and end the stream. Bounded by `FLUSH_S_MAX`."""
        self._is_stopping = True
        self._reports.bell.set()
        try:
            await asyncio.wait_for(self._stopped.wait(), FLUSH_S_MAX)
        except TimeoutError:
            _log.info("last_reports_not_sent")

    async def _attach(self) -> None:
        """One stream, from its hello to its end."""
        call: _Call = self._stub.Attach()
        tasks: list[asyncio.Task[None]] = []
        try:
            self._reports.open()
            near = self._residency.near()
            hello = self._hello()
            await asyncio.wait_for(self._greet(call, hello), WELCOME_S_MAX)
            self._backoff.reset()
            bell = self._reports.bell
            write = self._write(
                call,
                status=_Paced(STATUS_INTERVAL_S, sent=hello.status, bell=bell),
                host_cache=_Paced(HOST_CACHE_INTERVAL_S, sent=near, bell=bell),
            )
            tasks = [asyncio.create_task(self._read(call)), asyncio.create_task(write)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()
            self._reports.close()

    async def _greet(self, call: _Call, hello: pb.WorkerHello) -> None:
        await call.write(pb.AttachRequest(hello=hello))
        answer = await call.read()
        if answer is grpc.aio.EOF or not answer.HasField("welcome"):
            raise SchedulerLostError("no welcome")
        self._was_attached = True
        scheduler_id = answer.welcome.scheduler_id
        _log.info("attached", scheduler_id=scheduler_id, running=len(hello.running))

    # --- out --------------------------------------------------------------------------------

    async def _write(self, call: _Call, *, status: _Paced, host_cache: _Paced) -> None:
        bell = self._reports.bell
        while True:
            if self._reports.has_overflowed:
                raise SchedulerLostError("it has stopped reading")
            for report in self._reports.take():
                await call.write(wire.report_to(report))
            if self._is_stopping:
                await call.done_writing()
                return
            if status.is_due():
                now_status = self._status()
                if status.has_changed(now_status):
                    await call.write(pb.AttachRequest(status=now_status))
            if host_cache.is_due() and host_cache.has_changed(self._residency.near()):
                await call.write(pb.AttachRequest(host_cache=self._host_cache()))
            await bell.wait()
            bell.clear()

    def _hello(self) -> pb.WorkerHello:
        identity = self._identity
        return pb.WorkerHello(
            worker_id=identity.worker_id,
            address=identity.address,
            base_model_digest=identity.info.model_digest,
            capacity=wire.capacity_to(identity.capacity),
            running=[wire.running_to(live) for live in self._roster.unended()],
            status=self._status(),
            host_cache=self._host_cache(),
        )

    def _host_cache(self) -> pb.HostCache:
        held = self._residency.held().values()
        return wire.host_cache_to(it.adapter for it in held if it.in_host)

    def _status(self) -> pb.WorkerStatus:
        return wire.status_to(
            self._driver.snapshot(),
            draining=not self._driver.is_accepting,
            step_s=float(f"{self._measures.step_s:.1g}"),  # coarse, so that it rarely changes
            costs=self._driver.costs,
        )

    # --- in ---------------------------------------------------------------------------------

    async def _read(self, call: _Call) -> None:
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                raise SchedulerLostError("it has ended the stream")
            self._take(message)

    def _take(self, message: pb.AttachResponse) -> None:
        match message.WhichOneof("message"):
            case "dispatch":
                for item in message.dispatch.items:
                    self._dispatch(item)
            case "abort":
                self._driver.abort(wire.attempt_from(message.abort.attempt))
            case "prefetch":
                self._driver.prefetch(_adapters(message.prefetch.adapters[:HINTS_MAX]))
            case "drop":
                self._drop(message.drop.digest)
            case "welcome" | None:  # None: a kind of message that a newer scheduler knows
                pass

    def _drop(self, digest: str) -> None:
        if wire.is_digest(digest):
            self._driver.drop_adapter(AdapterDigest(digest))
        else:
            _log.warning("bad_digest", digest=digest[:80])

    def _dispatch(self, item: pb.WorkItem) -> None:
        attempt = wire.item_attempt(item)
        if attempt is None:
            _log.warning("anonymous_work_item", request_id=item.request_id[:64])
            return
        try:
            work = wire.work_from(
                item,
                self._identity.info,
                caches_prefixes=self._identity.caches_prefixes,
                now=time.monotonic(),
            )
        except RpcError as error:
            self._driver.refuse(attempt, GatewayId(item.gateway_id), error)
        else:
            self._driver.dispatch(work)


def _adapters(refs: "list[common_pb2.AdapterRef]") -> tuple[Adapter, ...]:
    """Those that can be read; a hint is not worth an error."""
    adapters: list[Adapter] = []
    for ref in refs:
        try:
            adapters.append(wire.adapter_from(ref))
        except RpcError as error:
            _log.warning("bad_hint", reason=error.reason, message=error.message)
    return tuple(adapters)


def _said(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
