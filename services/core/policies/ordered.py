"""What the simpler policies share: one order, a head, and a bounded way past it.

`OrderedPolicy` implements the whole contract around four questions that a policy answers: where a
waiter goes, how it leaves, who is in front, and what a dispatch means to it. `KeyedPolicy` answers
them for every order whose key is fixed when a request is queued: then a policy is a key function.

The head is offered first. If it fits no worker now, up to `bypasses` younger ones may pass it, in
order, as long as it lives; then everybody waits for it. With `bypasses` 0 the head blocks, which is
what S-LoRA's admission does and what the published baselines assume. Nobody is offered again before
the placer's version or the front of the order has changed.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from services.core.costs import StepCosts
from services.core.keyed import Key, KeyedQueue
from services.core.ledger import Fit
from services.core.queues import Outcome, Placer, PoolSize, Queued, Taken, wait_cause
from services.core.snapshots import QueueSnapshot, WaitCause
from services.core.types import Attempt, Request, RequestId

BYPASSES_MAX: Final = 63  # what `KeyedQueue.front` can list behind a head


@dataclass(slots=True, eq=False)
class Waiter(Queued):
    """A queued request and what kept it when it was offered last."""

    lacked: WaitCause = "nothing"

    def fits(self, place: Placer) -> bool:
        """Offer it to the workers; remember what they lack."""
        fit = place(self.request)
        if fit is Fit.FITS:
            return True
        self.lacked = wait_cause(fit)
        return False

    def waited_for(self, *, now: float) -> WaitCause:
        """What it waited for last, if it goes now."""
        return "order" if self.lacked == "nothing" and now > self.since_s else self.lacked

    @property
    def is_stopped_with_all(self) -> bool:
        """True if what it lacked, no other request can have either."""
        return self.lacked in {"batch_slots", "prefill"}


class OrderedPolicy(ABC):
    """A queue policy but for its order."""

    def __init__(self, name: str, *, bypasses: int = 0) -> None:
        if not 0 <= bypasses <= BYPASSES_MAX:
            raise ValueError(f"bypasses must be from 0 to {BYPASSES_MAX}, not {bypasses}")
        self._name = name
        self._bypasses = bypasses
        self._costs = StepCosts()
        self._waiters: OrderedDict[RequestId, Waiter] = OrderedDict()  # as they were queued
        self._settled: int | None = None  # the placer's version at which nobody could go

    # --- what an order answers -----------------------------------------------------------------

    @abstractmethod
    def _enter(self, waiter: Waiter) -> bool:
        """Put it in the order. True if it is near the front, or may be."""

    @abstractmethod
    def _leave(self, waiter: Waiter) -> None:
        """Take it out of the order."""

    @abstractmethod
    def _front(self, count: int) -> list[Waiter]:
        """The first ones in the order, at most so many."""

    @abstractmethod
    def _in_order(self) -> Iterator[Waiter]:
        """All of them, about in order."""

    def _charge(self, waiter: Waiter) -> None:  # noqa: B027 - most orders keep no accounts
        """It is about to leave for a worker."""

    # --- the contract --------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name it is built by."""
        return self._name

    def __len__(self) -> int:
        return len(self._waiters)

    def push(self, request: Request, *, now: float) -> None:
        """Queue a request."""
        waiter = Waiter(request, now)
        assert waiter.request_id not in self._waiters
        self._waiters[waiter.request_id] = waiter
        if self._enter(waiter):
            self._settled = None

    def remove(self, request_id: RequestId) -> None:
        """A queued request leaves without being dispatched."""
        self._settled = None
        self._leave(self._waiters.pop(request_id))

    def take(self, place: Placer, *, now: float) -> Outcome:
        """The head if it fits, else the first that fits of those that may pass it."""
        if self._settled == place.version:
            return None
        waiter = self._first_fitting(place)
        if waiter is not None:
            return self._dispatch(waiter, now=now)
        self._settled = place.version
        return None

    def release(self, attempt: Attempt, *, now: float) -> None:  # noqa: B027 - likewise
        """What runs is nothing to an order."""

    def resize(self, pool: PoolSize) -> None:  # noqa: B027 - likewise
        """Nor are the workers."""

    def learn(self, costs: StepCosts) -> None:
        """Those queued from now on are weighed by these costs."""
        self._costs = costs

    def next_deadline(self, *, now: float) -> float | None:  # noqa: ARG002 - time changes no order
        """Time alone changes nothing."""
        return None

    def upcoming(self) -> Iterator[Request]:
        """Queued requests, about in order."""
        return (waiter.request for waiter in self._in_order())

    def queue_of(self, request_id: RequestId) -> str:
        """There is one queue, called as the policy."""
        assert request_id in self._waiters
        return self._name

    def held_by(self, request_id: RequestId, *, now: float) -> WaitCause | None:  # noqa: ARG002
        """The order holds all but those that are offered to workers."""
        waiter = self._waiters[request_id]
        offered = [who for head in self._front(1) for who in (head, *self._may_pass(head))]
        return None if waiter in offered else "order"

    def queues(self, *, now: float) -> tuple[QueueSnapshot, ...]:
        """The one queue."""
        oldest = next(iter(self._waiters.values()), None)
        oldest_s = 0.0 if oldest is None else max(0.0, now - oldest.since_s)
        return (QueueSnapshot(self._name, len(self._waiters), oldest_s),)

    def check_integrity(self) -> None:
        """Assert that the order holds the waiters, each once."""
        ordered = list(self._in_order())
        assert len(ordered) == len(self._waiters)
        assert {waiter.request_id for waiter in ordered} == set(self._waiters)
        assert all(waiter.bypassed <= self._bypasses for waiter in ordered)

    # --- private -------------------------------------------------------------------------------

    def _first_fitting(self, place: Placer) -> Waiter | None:
        head = next(iter(self._front(1)), None)
        if head is None or head.fits(place):
            return head
        for waiter in self._may_pass(head):
            if waiter.fits(place):
                head.bypassed += 1
                return waiter
            if waiter.is_stopped_with_all:
                return None
        return None

    def _may_pass(self, head: Waiter) -> list[Waiter]:
        allowed = self._bypasses - head.bypassed
        if allowed <= 0 or head.is_stopped_with_all:
            return []
        return self._front(1 + allowed)[1:]

    def _dispatch(self, waiter: Waiter, *, now: float) -> Taken:
        queue = self.queue_of(waiter.request_id)
        self._charge(waiter)
        self.remove(waiter.request_id)
        return Taken(waiter.request, queue, waiter.waited_for(now=now))


class KeyedPolicy(OrderedPolicy):
    """A policy whose order is a key, fixed when a request is queued."""

    def __init__(self, name: str, *, bypasses: int = 0) -> None:
        super().__init__(name, bypasses=bypasses)
        self._queue: KeyedQueue[Waiter] = KeyedQueue()

    @abstractmethod
    def key(self, request: Request) -> Key:
        """Smaller goes first; ties by arrival here."""

    def _enter(self, waiter: Waiter) -> bool:
        return self._queue.push(self.key(waiter.request), waiter)

    def _leave(self, waiter: Waiter) -> None:
        self._queue.remove(waiter)

    def _front(self, count: int) -> list[Waiter]:
        return self._queue.front(count)

    def _in_order(self) -> Iterator[Waiter]:
        return iter(self._queue)

    def check_integrity(self) -> None:
        """Assert as an order does, and that the queue is sound."""
        super().check_integrity()
        self._queue.check_integrity()
