"""The Attach streams: what workers say becomes events of the core.

Owns what the core need not know of a worker: its address, which every gateway is told, and the base
model, which all workers must share; what it holds goes to `services.scheduler.residency`, too. A
worker is known from its hello until its stream has been down for the grace period.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import partial

import structlog

from calumma.scheduler.v1 import scheduler_pb2
from services.common.errors import Reason, RpcError
from services.common.interceptors import annotate
from services.core import events
from services.core.types import WorkerId
from services.scheduler import wire
from services.scheduler.config import SchedulerSettings
from services.scheduler.driver import Driver
from services.scheduler.links import Link, Links, check_room, converse, opening
from services.scheduler.residency import Residency
from services.scheduler.validation import check_worker_hello

AttachRequest = scheduler_pb2.AttachRequest
AttachResponse = scheduler_pb2.AttachResponse
SubmitResponse = scheduler_pb2.SubmitResponse
_log = structlog.get_logger("workers")


@dataclass(slots=True)
class _Worker:
    hello: scheduler_pb2.WorkerHello
    leaving: asyncio.TimerHandle | None = field(default=None)  # runs while its stream is down


class WorkerStreams:
    """Serves one Attach stream per worker and tells the gateways who comes and goes."""

    def __init__(
        self,
        settings: SchedulerSettings,
        *,
        scheduler_id: str,
        driver: Driver,
        links: Links[AttachResponse],
        gateways: Links[SubmitResponse],
        residency: Residency,
    ) -> None:
        self._settings = settings
        self._scheduler_id = scheduler_id
        self._driver = driver
        self._links = links
        self._gateways = gateways
        self._residency = residency
        self._workers: dict[str, _Worker] = {}

    async def serve(self, requests: AsyncIterator[AttachRequest]) -> AsyncGenerator[AttachResponse]:
        """One stream, from hello to the end."""
        hello = (await opening(requests, wait_s=self._settings.hello_timeout_s)).hello
        check_worker_hello(hello)
        annotate(worker_id=hello.worker_id, address=hello.address)
        check_room(self._links, hello.worker_id, peers_max=self._settings.max_workers)
        link = Link[AttachResponse](
            hello.worker_id, messages_max=self._settings.outbox_messages, on_end=self._detach
        )
        admit = partial(self._welcome, link, hello)
        self._driver.post(wire.to_worker_attached(hello), admit=admit)
        conversation = converse(link, requests, receive=partial(self._receive, link))
        async with contextlib.aclosing(conversation) as responses:
            async for response in responses:
                yield response

    def addresses(self) -> Iterator[scheduler_pb2.WorkerAddress]:
        """Every known worker, for a gateway that has just come."""
        for worker in self._workers.values():
            yield _address(worker.hello, attached=True)

    def find(self, worker_id: WorkerId) -> wire.WorkerReports | None:
        """Address and last reports of a known worker."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return None
        return wire.WorkerReports(worker.hello.address, *self._residency.reports(worker_id))

    def close(self) -> None:
        """Stop the grace periods that run."""
        for worker in self._workers.values():
            if worker.leaving is not None:
                worker.leaving.cancel()

    def _welcome(self, link: Link[AttachResponse], hello: scheduler_pb2.WorkerHello) -> bool:
        refusal = self._refusal(hello)
        if refusal is not None:
            link.close(refusal)
            return False
        known = self._workers.get(hello.worker_id)
        if known is not None and known.leaving is not None:
            known.leaving.cancel()
        self._workers[hello.worker_id] = _Worker(hello)
        self._residency.attach(hello)
        self._links.connect(link)
        link.send(
            AttachResponse(welcome=scheduler_pb2.AttachWelcome(scheduler_id=self._scheduler_id))
        )
        self._gateways.broadcast(SubmitResponse(worker=_address(hello, attached=True)))
        _log.info("worker_attached", worker_id=hello.worker_id, address=hello.address)
        return True

    def _refusal(self, hello: scheduler_pb2.WorkerHello) -> RpcError | None:
        """Why the worker cannot join: it serves another base model than one that is here."""
        for worker_id, worker in self._workers.items():
            served = worker.hello.base_model_digest
            if worker_id != hello.worker_id and served != hello.base_model_digest:
                return RpcError(
                    Reason.PROTOCOL_VIOLATION,
                    f"this scheduler's workers serve base model {served}, "
                    f"this worker serves {hello.base_model_digest}",
                    field="hello.base_model_digest",
                )
        return None

    def _detach(self, link: Link[AttachResponse]) -> None:
        self._driver.post(
            events.WorkerDetached(WorkerId(link.peer_id)), admit=partial(self._begin_grace, link)
        )

    def _begin_grace(self, link: Link[AttachResponse]) -> bool:
        if not self._links.disconnect(link):
            return False
        loop = asyncio.get_running_loop()
        worker = self._workers[link.peer_id]
        worker.leaving = loop.call_later(self._settings.worker_grace_s, self._leave, link.peer_id)
        _log.info("worker_detached", worker_id=link.peer_id)
        return True

    def _leave(self, worker_id: str) -> None:
        worker = self._workers.pop(worker_id)
        self._residency.leave(worker_id)
        self._gateways.broadcast(SubmitResponse(worker=_address(worker.hello, attached=False)))
        _log.info("worker_left", worker_id=worker_id)

    async def _receive(self, link: Link[AttachResponse], request: AttachRequest) -> None:
        await self._driver.room()
        worker_id = WorkerId(link.peer_id)
        match request.WhichOneof("message"):
            case "status":
                report = wire.to_worker_reported(worker_id, request.status)
                self._driver.post(report, admit=partial(self._note_status, link, request.status))
            case "started":
                attempt = wire.to_attempt(request.started.attempt)
                self._driver.post(events.RequestStarted(worker_id, attempt))
            case "prefilled":
                attempt = wire.to_attempt(request.prefilled.attempt)
                self._driver.post(events.RequestPrefilled(worker_id, attempt))
            case "finished":
                attempt = wire.to_attempt(request.finished.attempt)
                output_tokens = request.finished.output_tokens
                self._driver.post(events.RequestFinished(worker_id, attempt, output_tokens))
            case "host_cache":
                if self._links.is_current(link):
                    self._residency.report_host_cache(worker_id, request.host_cache)
            case "hello":
                raise RpcError(Reason.PROTOCOL_VIOLATION, "hello must come once, at the beginning")
            case _:
                raise RpcError(Reason.PROTOCOL_VIOLATION, "a message of no known kind")

    def _note_status(self, link: Link[AttachResponse], status: scheduler_pb2.WorkerStatus) -> bool:
        """Keep the status for reports. False once the stream is not the worker's current one."""
        if not self._links.is_current(link):
            return False
        self._residency.report_status(link.peer_id, status)
        return True


def _address(hello: scheduler_pb2.WorkerHello, *, attached: bool) -> scheduler_pb2.WorkerAddress:
    return scheduler_pb2.WorkerAddress(
        worker_id=hello.worker_id,
        address=hello.address,
        attached=attached,
        max_context_tokens=hello.capacity.max_context_tokens if attached else 0,
    )
