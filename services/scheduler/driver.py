"""The one task that owns the core: it takes events from an inbox and performs what they decide.

Streams post events and never touch the core. What a stream must do in step with the core (take
over a peer's link, keep a payload) travels with the event as `admit`, so that it happens between
the same two events as in the core's view. When the core fails, which is a bug, its state is worth
nothing: all streams end, peers reconnect and announce what they hold to a fresh core.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from services.core.events import ClusterEvent
from services.core.snapshots import ClusterSnapshot
from services.scheduler.journal import CoreRecipe, Journal
from services.scheduler.performer import Performer

EVENTS_PER_ROUND_MAX: Final = 64  # then streams get a turn
TIMER_S_MAX: Final = 60.0
_log = structlog.get_logger("driver")


@dataclass(frozen=True, slots=True)
class _Entry:
    event: ClusterEvent
    admit: Callable[[], bool] | None


class Driver:
    """Owns the core. `inbox_events_max` bounds what streams may post ahead of it."""

    def __init__(
        self,
        recipe: CoreRecipe,
        performer: Performer,
        *,
        journal: Journal | None,
        on_failure: Callable[[], None],
        inbox_events_max: int = 4096,
    ) -> None:
        self._recipe = recipe
        self._performer = performer
        self._journal = journal
        self._on_failure = on_failure
        self._inbox_events_max = inbox_events_max
        self._inbox: deque[_Entry] = deque()
        self._wake = asyncio.Event()
        self._has_room = asyncio.Event()
        self._renew_core()

    async def room(self) -> None:
        """Wait until the inbox takes more. What slows a gateway down that submits too fast."""
        while len(self._inbox) >= self._inbox_events_max:
            self._has_room.clear()
            await self._has_room.wait()

    def post(self, event: ClusterEvent, *, admit: Callable[[], bool] | None = None) -> None:
        """Queue an event. `admit` runs just before the core gets it and may still refuse it."""
        self._inbox.append(_Entry(event, admit))
        self._wake.set()

    def snapshot(self) -> ClusterSnapshot:
        """The core's state, between two events."""
        return self._core.snapshot(now=time.monotonic())

    def is_idle(self) -> bool:
        """True when no request is queued, dispatched or about to be."""
        snapshot = self.snapshot()
        busy = any(queue.length for queue in snapshot.queues)
        return not (busy or self._inbox or any(worker.dispatched for worker in snapshot.workers))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wait()
            try:
                self._round()
            except Exception:  # noqa: BLE001 - whatever it was, the core cannot be trusted now
                _log.exception("core_failed")
                self._inbox.clear()
                self._performer.clear()
                self._renew_core()
                self._on_failure()

    async def _wait(self) -> None:
        """Until there is an event or a timer is due. Always gives the streams a turn."""
        await asyncio.sleep(0)
        if self._inbox:
            return
        self._wake.clear()
        deadline_s = self._core.next_deadline()
        left_s = TIMER_S_MAX if deadline_s is None else deadline_s - time.monotonic()
        if left_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, TIMER_S_MAX)):
                    await self._wake.wait()

    def _round(self) -> None:
        now = time.monotonic()
        for _ in range(min(len(self._inbox), EVENTS_PER_ROUND_MAX)):
            entry = self._inbox.popleft()
            if entry.admit is None or entry.admit():
                self._decide(entry.event, now=now)
        deadline_s = self._core.next_deadline()
        if deadline_s is not None and deadline_s <= now:
            self._decide(None, now=now)
        self._performer.flush()
        if self._journal is not None:
            self._journal.flush()
        self._has_room.set()

    def _decide(self, event: ClusterEvent | None, *, now: float) -> None:
        if self._journal is not None:
            self._journal.append(now, event)
        core = self._core
        decisions = core.tick(now=now) if event is None else core.handle(event, now=now)
        if self._journal is not None:
            self._journal.decided(decisions)
        for decision in decisions:
            self._performer.perform(decision, now=now)

    def _renew_core(self) -> None:
        self._core = self._recipe.build()
        if self._journal is not None:
            self._journal.begin(self._recipe)
