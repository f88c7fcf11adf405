"""`slo_odbs`, `slo_dbs`, `odbs`: UELLM's batches (2409.14961) as a live queue.

The rule that fills a batch, its two forms and what they leave open is in `static_batches`. Live,
requests come all the time and workers batch by the step, so here a batch is a turn: whenever the
last one is used up, the next is filled from the queue in order, and its members are dispatched in
that order, the head blocking, before anybody else. Newcomers wait for the next turn.

- A turn begins as soon as the one before has been dispatched. With `waits_for_batch` at most one
  turn per worker is unfinished, as with the static batches that the paper runs; which worker takes
  which member is the placer's choice in either case.
- The paper has no arrivals, so nothing starves there. Here the oldest request opens the next turn
  once it has waited `max_wait_s`, whatever its SLO, length and priority.

Fits: engines that run static batches, and tenants whose SLOs differ by far more than their service
times. Fails: with continuous batching nobody waits for the longest of a batch, so grouping by
length gains nothing and SLO order is what is left, without EDF's exactness; and a turn of `cap`
requests that has begun makes an urgent newcomer wait.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import chain

from services.core.keyed import KeyedQueue
from services.core.policies.ordered import OrderedPolicy, Waiter
from services.core.policies.static_batches import OpenBatch, UellmConfig
from services.core.queues import Outcome, Placer, PoolSize
from services.core.types import Attempt, RequestId


class Uellm(OrderedPolicy):
    """Turns of similar requests."""

    def __init__(self, config: UellmConfig | None = None) -> None:
        self._config = config or UellmConfig()
        super().__init__(self._config.name)
        self._queue: KeyedQueue[Waiter] = KeyedQueue()  # those without a turn
        self._turn: dict[RequestId, Waiter] = {}  # the turn's members, in order
        self._turns = 0  # begun so far
        self._workers = 1
        self._out: dict[Attempt, int] = {}  # dispatched, with the number of its turn
        self._unfinished: Counter[int] = Counter()  # members of a turn that are dispatched

    def take(self, place: Placer, *, now: float) -> Outcome:
        """The first of the turn, if it fits."""
        if not self._turn:
            self._begin_turn(now=now)
        return super().take(place, now=now)

    def release(self, attempt: Attempt, *, now: float) -> None:  # noqa: ARG002 - time is nothing to it
        """Its turn has one less to wait for."""
        turn = self._out.pop(attempt, None)
        if turn is not None:
            self._unfinished[turn] -= 1
            if self._unfinished[turn] == 0:
                del self._unfinished[turn]

    def resize(self, pool: PoolSize) -> None:
        """As many turns may be unfinished as there are workers."""
        self._workers = max(1, pool.workers)

    def check_integrity(self) -> None:
        """Assert as an order does, and that turns are within their limits."""
        super().check_integrity()
        self._queue.check_integrity()
        assert len(self._turn) <= self._config.cap
        assert self._unfinished == Counter(self._out.values())

    def _begin_turn(self, *, now: float) -> None:
        if len(self._unfinished) >= self._workers or not self._waiters:
            return
        self._settled = None
        self._turns += 1
        batch = OpenBatch(self._config)
        oldest = next(iter(self._waiters.values()))
        is_overdue = now >= oldest.since_s + self._config.max_wait_s
        candidate = oldest if is_overdue else self._queue.first()
        while candidate is not None and batch.admits(candidate.request):
            batch.add(candidate.request)
            self._queue.remove(candidate)
            self._turn[candidate.request_id] = candidate
            candidate = self._queue.first()

    def _enter(self, waiter: Waiter) -> bool:
        self._queue.push(self._config.key(waiter.request), waiter)
        return not self._turn

    def _leave(self, waiter: Waiter) -> None:
        if self._turn.pop(waiter.request_id, None) is None:
            self._queue.remove(waiter)

    def _front(self, count: int) -> list[Waiter]:
        return [waiter for waiter, _ in zip(self._turn.values(), range(count), strict=False)]

    def _in_order(self) -> Iterator[Waiter]:
        return chain(self._turn.values(), self._queue)

    def _charge(self, waiter: Waiter) -> None:
        if self._config.waits_for_batch:
            self._out[waiter.request.attempt] = self._turns
            self._unfinished[self._turns] += 1
