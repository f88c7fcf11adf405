"""What the gateway has to tell the scheduler, in order, while the stream is up or down.

Holds at most one entry per attempt: a request that is cancelled before its submission was sent
leaves no trace. Submissions are bounded by the requests in flight, cancellations by a number.
A stream that breaks swallows what was on its way. Submissions are then told again from the table
of requests, the latest cancellations from here; cancelling twice is harmless.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from services.core.types import Attempt
from services.gateway.requests import OwnedRequest

CANCELS_MAX: Final = 10_000
CANCELS_RETOLD: Final = 256


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop an attempt, wherever it is."""

    attempt: Attempt
    cause: str


class Outbox:
    """A queue of submissions and cancellations with one reader."""

    def __init__(self) -> None:
        self._submits: dict[Attempt, OwnedRequest] = {}
        self._retold: frozenset[Attempt] = frozenset()  # submits that the scheduler may have
        self._cancels: dict[Attempt, Cancel] = {}
        self._told_cancels: deque[Cancel] = deque(maxlen=CANCELS_RETOLD)
        self._filled = asyncio.Event()
        self._told = asyncio.Event()  # the reader has come back for more and found nothing

    def submit(self, request: OwnedRequest) -> None:
        self._submits[request.attempt] = request
        self._filled.set()

    def cancel(self, attempt: Attempt, cause: str) -> None:
        if self._submits.pop(attempt, None) is not None and attempt not in self._retold:
            return
        if len(self._cancels) >= CANCELS_MAX:  # the oldest will run to its own end
            self._cancels.pop(next(iter(self._cancels)))
        self._cancels[attempt] = Cancel(attempt, cause)
        self._filled.set()

    def restart(self, queued: Iterable[OwnedRequest]) -> None:
        """A new stream is up: these, and no others, are to be submitted on it."""
        told = {cancel.attempt: cancel for cancel in self._told_cancels}
        self._cancels = {**told, **self._cancels}
        self._told_cancels.clear()
        self._submits = {request.attempt: request for request in queued}
        self._retold = frozenset(self._submits)
        self._filled.set()

    @property
    def is_empty(self) -> bool:
        return not self._submits and not self._cancels

    async def told(self) -> None:
        """Wait until the reader has told everything."""
        self._told.clear()
        self._filled.set()
        await self._told.wait()

    async def get(self) -> OwnedRequest | Cancel:
        """The next thing to tell. Cancellations first: they free what others wait for."""
        while self.is_empty:
            self._filled.clear()
            self._told.set()
            await self._filled.wait()
        if self._cancels:
            cancel = self._cancels.pop(next(iter(self._cancels)))
            self._told_cancels.append(cancel)
            return cancel
        return self._submits.pop(next(iter(self._submits)))
