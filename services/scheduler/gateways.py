"""The Submit streams: what gateways say becomes events of the core.

A WorkItem that breaks the contract is rejected alone; the stream and its other requests go on.
"""

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from functools import partial
from typing import Final

from calumma.scheduler.v1 import scheduler_pb2
from services.common.errors import Reason, RpcError
from services.common.interceptors import annotate
from services.core import events
from services.core.types import GatewayId, Request
from services.scheduler import wire
from services.scheduler.config import SchedulerSettings
from services.scheduler.driver import Driver
from services.scheduler.links import Link, Links, check_room, converse, opening
from services.scheduler.performer import Performer
from services.scheduler.validation import check_id, check_work_item

SubmitRequest = scheduler_pb2.SubmitRequest
SubmitResponse = scheduler_pb2.SubmitResponse
CAUSE_CHARACTERS_MAX: Final = 64


class GatewayStreams:
    """Serves one Submit stream per gateway. `worker_addresses` is told to each at its welcome."""

    def __init__(
        self,
        settings: SchedulerSettings,
        *,
        scheduler_id: str,
        driver: Driver,
        performer: Performer,
        links: Links[SubmitResponse],
        worker_addresses: Callable[[], Iterable[scheduler_pb2.WorkerAddress]],
    ) -> None:
        self._settings = settings
        self._scheduler_id = scheduler_id
        self._driver = driver
        self._performer = performer
        self._links = links
        self._worker_addresses = worker_addresses

    async def serve(self, requests: AsyncIterator[SubmitRequest]) -> AsyncGenerator[SubmitResponse]:
        """One stream, from hello to the end."""
        hello = (await opening(requests, wait_s=self._settings.hello_timeout_s)).hello
        check_id(hello.gateway_id, "hello.gateway_id")
        annotate(gateway_id=hello.gateway_id)
        check_room(self._links, hello.gateway_id, peers_max=self._settings.max_gateways)
        # Every queued request may be rejected at the same instant.
        messages_max = self._settings.outbox_messages + self._settings.queue_limit
        link = Link[SubmitResponse](
            hello.gateway_id, messages_max=messages_max, on_end=self._detach
        )
        admit = partial(self._welcome, link)
        self._driver.post(wire.to_gateway_attached(hello), admit=admit)
        conversation = converse(link, requests, receive=partial(self._receive, link))
        async with contextlib.aclosing(conversation) as responses:
            async for response in responses:
                yield response

    def _welcome(self, link: Link[SubmitResponse]) -> bool:
        self._links.connect(link)
        welcome = scheduler_pb2.SubmitWelcome(scheduler_id=self._scheduler_id)
        link.send(SubmitResponse(welcome=welcome))
        for address in self._worker_addresses():
            link.send(SubmitResponse(worker=address))
        return True

    def _detach(self, link: Link[SubmitResponse]) -> None:
        self._driver.post(
            events.GatewayDetached(GatewayId(link.peer_id)),
            admit=partial(self._links.disconnect, link),
        )

    async def _receive(self, link: Link[SubmitResponse], request: SubmitRequest) -> None:
        await self._driver.room()
        match request.WhichOneof("message"):
            case "submit":
                self._submit(link, request.submit)
            case "cancel":
                cancel = request.cancel
                attempt = wire.to_attempt(cancel.attempt)
                self._driver.post(
                    events.RequestCancelled(attempt, cancel.cause[:CAUSE_CHARACTERS_MAX])
                )
            case "hello":
                raise RpcError(Reason.PROTOCOL_VIOLATION, "hello must come once, at the beginning")
            case _:
                raise RpcError(Reason.PROTOCOL_VIOLATION, "a message of no known kind")

    def _submit(self, link: Link[SubmitResponse], item: scheduler_pb2.WorkItem) -> None:
        try:
            check_work_item(item, gateway_id=link.peer_id)
        except RpcError as error:
            attempt = scheduler_pb2.Attempt(request_id=item.request_id, attempt=item.attempt)
            rejected = scheduler_pb2.RequestRejected(attempt=attempt, error=error.to_proto())
            link.send(SubmitResponse(rejected=rejected))
            return
        now = time.monotonic()
        request = wire.to_request(item, now=now)
        admit = partial(self._keep, request, item, now)
        self._driver.post(events.RequestSubmitted(request), admit=admit)

    def _keep(self, request: Request, item: scheduler_pb2.WorkItem, now: float) -> bool:
        self._performer.keep(request, item, now=now)
        return True
