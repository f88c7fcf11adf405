"""The simulated scheduler service: a ClusterScheduler, its timer, and who gets its decisions."""

from collections.abc import Iterable
from typing import Protocol, assert_never

from bench.sim.clients import GATEWAY, Work
from bench.sim.loop import Alarm, EventLoop
from services.core.cluster import ClusterScheduler
from services.core.decisions import (
    Abort,
    ClusterDecision,
    Dispatch,
    Forget,
    Prefetch,
    Reject,
    Return,
)
from services.core.events import (
    ClusterEvent,
    GatewayAttached,
    RequestCancelled,
    RequestSubmitted,
)
from services.core.types import Adapter, Attempt, WorkerId


class Peers(Protocol):
    """Whom the scheduler talks to; each call arrives after the link's latency."""

    def dispatch(self, worker_id: WorkerId, work: Work) -> None: ...
    def abort(self, worker_id: WorkerId, attempt: Attempt) -> None: ...
    def prefetch(self, worker_id: WorkerId, adapters: tuple[Adapter, ...]) -> None: ...
    def reject(self, attempt: Attempt, reason: str) -> None: ...
    def give_back(self, attempt: Attempt) -> None: ...


class SimScheduler:
    """Keeps the payload of what is queued, as the live performer does."""

    def __init__(
        self, loop: EventLoop, core: ClusterScheduler, peers: Peers, *, checks_integrity: bool
    ) -> None:
        self.core = core
        self.returns = 0  # of requests that were squashed, or whose worker was lost
        self._loop = loop
        self._peers = peers
        self._checks_integrity = checks_integrity
        self._works: dict[Attempt, Work] = {}
        self._alarm = Alarm(loop, next_deadline=core.next_deadline, ring=self._tick)
        self.handle(GatewayAttached(GATEWAY, placed=()))

    def submit(self, work: Work) -> None:
        """A gateway's submission has come."""
        self._works[work.request.attempt] = work
        self.handle(RequestSubmitted(work.request))

    def cancel(self, attempt: Attempt, cause: str) -> None:
        """A gateway does not want it any more."""
        self.handle(RequestCancelled(attempt, cause))

    def handle(self, event: ClusterEvent) -> None:
        """Take in what happened."""
        self._perform(self.core.handle(event, now=self._loop.now))

    def check_empty(self) -> None:
        """Assert that nothing is left of requests that have all ended."""
        assert not self._works
        snapshot = self.core.snapshot(now=self._loop.now)
        assert not snapshot.queued
        for worker in snapshot.workers:
            assert worker.dispatched == 0
            assert worker.reserved_blocks == 0

    def _tick(self) -> None:
        self._perform(self.core.tick(now=self._loop.now))

    def _perform(self, decisions: Iterable[ClusterDecision]) -> None:
        if self._checks_integrity:
            self.core.check_integrity()
        for decision in decisions:
            match decision:
                case Dispatch():
                    self._dispatch(decision)
                case Reject(_, attempt, reason):
                    self._works.pop(attempt, None)
                    self._peers.reject(attempt, reason)
                case Return(_, attempt):
                    self.returns += 1
                    self._peers.give_back(attempt)
                case Abort(worker_id, attempt):
                    self._peers.abort(worker_id, attempt)
                case Forget(attempt):
                    self._works.pop(attempt, None)
                case Prefetch(worker_id, adapters):
                    self._peers.prefetch(worker_id, adapters)
                case _:
                    assert_never(decision)
        self._alarm.set()

    def _dispatch(self, decision: Dispatch) -> None:
        work = self._works.pop(decision.attempt)
        client = work.client
        if client.dispatched_s is None:
            client.dispatched_s = self._loop.now
        client.queue, client.waited_for = decision.queue, decision.waited_for
        self._peers.dispatch(decision.worker_id, work)
