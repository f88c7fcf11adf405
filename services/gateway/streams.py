"""All requests in flight: routes what scheduler and workers say, and submits again what was lost.

Owns the timers: each request's deadline and the pause before another attempt. Everything runs on
the event loop, so each method sees and leaves a consistent table.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Generator, Iterable

import structlog

from services.common.clients import Backoff
from services.common.errors import Reason, RpcError
from services.core.types import Attempt
from services.gateway.outbox import Outbox
from services.gateway.requests import Effect, OwnedRequest, Placement, deadline_error
from services.gateway.types import Finish, Piece, TokenRun

_log = structlog.get_logger("streams")
_RETRY_AFTER_S = 1.0


class TokenStream:
    """One request in flight, as its servicer reads it."""

    def __init__(self, request: OwnedRequest) -> None:
        self.request = request
        self.backoff = Backoff()
        self.deadline: asyncio.TimerHandle | None = None
        self.retry: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Something changed for the reader."""
        self._changed.set()

    async def begun(self) -> None:
        """Wait until it is placed or has a token. Raises the error of one that fails before."""
        while not self.request.has_begun and not self.request.is_ended:
            await self._wait()
        if self.request.error is not None and not self.request.output:
            raise self.request.error

    async def ended(self) -> None:
        """Wait until the end. Raises the error of a request that failed."""
        while not self.request.is_ended:
            await self._wait()
        if self.request.error is not None:
            raise self.request.error

    async def pieces(self) -> AsyncIterator[Piece]:
        """Everything as it comes; a slow reader gets fewer, larger pieces. Raises its error."""
        while True:
            is_last = self.request.is_ended
            if piece := self.request.take():
                yield piece
            elif is_last:
                break
            else:
                await self._wait()
        if self.request.error is not None:
            raise self.request.error

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class RequestStreams:
    """The table of requests in flight."""

    def __init__(self, outbox: Outbox, *, requests_max: int, resubmissions_max: int) -> None:
        self._outbox = outbox
        self._requests_max = requests_max
        self._resubmissions_max = resubmissions_max
        self._client_ids: set[str] = set()
        self._streams: dict[str, TokenStream] = {}  # by wire id

    def __len__(self) -> int:
        return len(self._client_ids)

    def check_room(self) -> None:
        """Raises RpcError when as many requests as allowed are in flight."""
        if len(self._client_ids) >= self._requests_max:
            raise RpcError(
                Reason.TOO_MANY_REQUESTS,
                f"{self._requests_max} requests are in flight",
                stage="admission",
                retry_after_s=_RETRY_AFTER_S,
            )

    @contextlib.contextmanager
    def claim(self, client_id: str) -> Generator[None]:
        """Hold a client's request id, and a place. Raises RpcError when either is taken."""
        self.check_room()
        if client_id in self._client_ids:
            raise RpcError(
                Reason.REQUEST_ID_IN_USE,
                f"a request {client_id} is in flight",
                field="request_id",
                resource=("request", client_id),
            )
        self._client_ids.add(client_id)
        try:
            yield
        finally:
            self._client_ids.discard(client_id)

    @contextlib.contextmanager
    def open(self, request: OwnedRequest) -> Generator[TokenStream]:
        """Submit a request; leaving the block before its end cancels it."""
        stream = TokenStream(request)
        self._streams[request.admitted.wire_id] = stream
        left_s = request.admitted.deadline_s - time.monotonic()
        stream.deadline = asyncio.get_running_loop().call_later(left_s, self._expire, stream)
        self._outbox.submit(request)
        try:
            yield stream
        finally:
            stream.deadline.cancel()
            if not request.is_ended:
                self._end(stream, "client_cancelled")
            del self._streams[request.admitted.wire_id]

    def queued(self) -> list[OwnedRequest]:
        """Requests that the scheduler should have in its queue, oldest first."""
        return [
            stream.request
            for stream in self._streams.values()
            if stream.retry is None
            and stream.request.worker_id is None
            and not stream.request.is_ended
        ]

    def placed(self, worker_id: str | None = None) -> list[OwnedRequest]:
        """Requests at that worker, or at any."""
        return [
            stream.request
            for stream in self._streams.values()
            if not stream.request.is_ended
            and stream.request.worker_id is not None
            and worker_id in {None, stream.request.worker_id}
        ]

    def on_placed(self, attempt: Attempt, placement: Placement) -> None:
        if stream := self._streams.get(attempt.request_id):
            self._perform(stream, stream.request.place(attempt, placement))

    def on_rejected(self, attempt: Attempt, error: RpcError) -> None:
        stream = self._streams.get(attempt.request_id)
        if stream and stream.request.attempt == attempt and not stream.request.is_ended:
            stream.request.fail(error)
            stream.wake()

    def on_returned(self, attempt: Attempt) -> None:
        stream = self._streams.get(attempt.request_id)
        if stream and stream.request.attempt == attempt and not stream.request.is_ended:
            self._resubmit(stream)

    def on_tokens(self, worker_id: str, runs: Iterable[TokenRun]) -> None:
        now_s = time.monotonic()
        for run in runs:
            if stream := self._streams.get(run.request_id):
                self._perform(stream, stream.request.accept(run, worker_id, now_s))

    def on_worker_lost(self, worker_id: str) -> None:
        for request in self.placed(worker_id):
            stream = self._streams[request.admitted.wire_id]
            self._outbox.cancel(request.attempt, "superseded")
            self._resubmit(stream)

    def on_scheduler_lost(self) -> None:
        """The scheduler has been away for too long: end what no worker has."""
        for stream in self._streams.values():
            if stream.request.worker_id is None:
                self._fail(stream, scheduler_unavailable("queue"), "client_cancelled")

    def end_all(self) -> None:
        """This gateway is going away, and its clients may go on at another."""
        for stream in self._streams.values():
            self._fail(stream, gateway_draining(stream.request.stage), "client_cancelled")

    def _perform(self, stream: TokenStream, effect: Effect) -> None:
        match effect:
            case Effect.NOTHING:
                return
            case Effect.CHANGED:
                stream.wake()
            case Effect.STOPPED:
                self._end(stream, "stop_string")
            case Effect.LOST:
                self._outbox.cancel(stream.request.attempt, "superseded")
                self._resubmit(stream)

    def _resubmit(self, stream: TokenStream) -> None:
        request = stream.request
        stream.wake()
        if len(request.output) >= request.admitted.max_tokens:  # only the news of the end was lost
            request.complete(Finish.LENGTH)
            return
        if request.number > self._resubmissions_max:
            request.fail(
                RpcError(
                    Reason.WORKER_LOST,
                    f"{request.number} workers were lost under this request",
                    stage=request.stage,
                    retry_after_s=_RETRY_AFTER_S,
                )
            )
            return
        _log.info(
            "resubmit",
            request_id=request.admitted.client_id,
            worker_id=request.worker_id,
            attempt=request.number + 1,
            output_tokens=len(request.output),
        )
        request.begin_attempt()
        loop = asyncio.get_running_loop()
        stream.retry = loop.call_later(stream.backoff.next_delay_s(), self._submit_again, stream)

    def _submit_again(self, stream: TokenStream) -> None:
        stream.retry = None
        if not stream.request.is_ended:
            self._outbox.submit(stream.request)

    def _expire(self, stream: TokenStream) -> None:
        self._fail(stream, deadline_error(stream.request.stage), "deadline")

    def _fail(self, stream: TokenStream, error: RpcError, cause: str) -> None:
        if not stream.request.is_ended:
            stream.request.fail(error)
            self._end(stream, cause)

    def _end(self, stream: TokenStream, cause: str) -> None:
        """Nothing more is wanted from scheduler and worker."""
        if stream.retry is not None:
            stream.retry.cancel()
            stream.retry = None
        else:
            self._outbox.cancel(stream.request.attempt, cause)
        stream.wake()


def gateway_draining(stage: str) -> RpcError:
    """The error of requests that come too late, or last too long, for a gateway that stops."""
    return RpcError(
        Reason.DRAINING,
        "this gateway is going away",
        stage=stage,
        retry_after_s=_RETRY_AFTER_S,
    )


def scheduler_unavailable(stage: str) -> RpcError:
    """The error of requests that no scheduler takes."""
    return RpcError(
        Reason.SCHEDULER_UNAVAILABLE,
        "the scheduler can't be reached",
        stage=stage,
        retry_after_s=_RETRY_AFTER_S,
    )
