"""The contract of a queue policy, and containers that policies share.

A policy decides which queued request goes next. It knows sizes, waits and how much of the workers'
memory each of its queues has out, but no workers: the cluster machine offers it a `Placer`, which
says whether some worker can start a request at once, remembers which one, and predicts. `take` asks
for as few requests as it can and returns one outcome; the machine calls it until it returns None.
So a policy stays work-conserving by construction: it alone decides when to stop asking.

Order within a first-come queue: higher priority first, then requests that come back (their clients
are in the middle of an answer), then arrival.
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

from services.core.costs import StepCosts
from services.core.decisions import RejectReason
from services.core.ledger import Fit
from services.core.snapshots import QueueSnapshot, WaitCause
from services.core.types import Attempt, Request, RequestId


class Placer(Protocol):
    """What the cluster machine offers a policy while it takes."""

    @property
    def version(self) -> int:
        """Changes whenever one that was refused may fit: until then asking again is in vain."""
        ...

    @property
    def free_tokens(self) -> int:
        """Most KV tokens that any one worker has unpromised: who needs more cannot go."""
        ...

    def __call__(self, request: Request) -> Fit:
        """Whether some worker can start it now; if it FITS the worker is remembered.

        BATCH_SLOTS and PREFILL mean that no worker takes any request now: stop asking.
        """
        ...

    def is_near(self, request: Request) -> bool:
        """True if some worker has its adapter or expects it, or if it has none."""
        ...

    def free_in_s(self, request: Request) -> float:
        """Predicted seconds until some worker's memory suffices for it; inf if that is unknown."""
        ...


@dataclass(frozen=True, slots=True)
class PoolSize:
    """What the workers that take requests can hold together."""

    kv_tokens: int
    token_bytes: float  # bytes of KV cache per token, to weigh adapters by
    workers: int
    max_requests: int


class Taken(NamedTuple):
    """This request goes to the worker that the placer chose for it; it was the last one asked."""

    request: Request
    queue: str
    waited_for: WaitCause


@dataclass(frozen=True, slots=True)
class Squashed:
    """This attempt, dispatched and not yet released, is stopped; its gateway submits it again."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Refused:
    """This queued request shall not run."""

    request_id: RequestId
    reason: Literal[RejectReason.DEADLINE_UNREACHABLE]


Outcome = Taken | Squashed | Refused | None


def wait_cause(fit: Fit) -> WaitCause:
    """What a request waits for that was answered so."""
    return _CAUSES[fit]


_CAUSES: Final[dict[Fit, WaitCause]] = {
    Fit.FITS: "order",
    Fit.MEMORY: "memory",
    Fit.ADAPTER: "adapter",
    Fit.BATCH_SLOTS: "batch_slots",
    Fit.PREFILL: "prefill",
}


class QueuePolicy(Protocol):
    """Queues of requests and the order in which they leave."""

    @property
    def name(self) -> str:
        """The name it is built by."""
        ...

    def __len__(self) -> int: ...

    def push(self, request: Request, *, now: float) -> None:
        """Queue a request. Attempts after the first have waited since their `arrived_s`."""
        ...

    def remove(self, request_id: RequestId) -> None:
        """A queued request leaves without being dispatched."""
        ...

    def take(self, place: Placer, *, now: float) -> Outcome:
        """The next thing to do; a request that is Taken or Refused has left its queue."""
        ...

    def release(self, attempt: Attempt, *, now: float) -> None:
        """A worker is done with a request; unknown ones (adopted by the cluster) are ignored."""
        ...

    def resize(self, pool: PoolSize) -> None:
        """The workers that take requests have changed."""
        ...

    def learn(self, costs: StepCosts) -> None:
        """What work costs now, by what workers measured."""
        ...

    def next_deadline(self, *, now: float) -> float | None:
        """When time alone will change what `take` does."""
        ...

    def upcoming(self) -> Iterator[Request]:
        """Queued requests, about in the order in which they will go."""
        ...

    def queue_of(self, request_id: RequestId) -> str:
        """Name of the queue that a request waits in."""
        ...

    def held_by(self, request_id: RequestId, *, now: float) -> WaitCause | None:
        """What of the policy's own holds a queued request; None if only a worker is missing."""
        ...

    def queues(self, *, now: float) -> tuple[QueueSnapshot, ...]:
        """The present state, for reports."""
        ...

    def check_integrity(self) -> None:
        """Assert all that must hold between calls."""
        ...


@dataclass(slots=True, eq=False)
class Queued:
    """A request in a queue. `bypassed` counts the younger ones that went before it."""

    request: Request
    since_s: float
    bypassed: int = 0

    @property
    def request_id(self) -> RequestId:
        """Its request's id."""
        return self.request.attempt.request_id


_Rank = tuple[int, bool]


class PriorityFifo:
    """One queue. All operations cost O(log of the distinct priorities), iteration is lazy."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []  # most urgent first
        self._fifos: dict[_Rank, OrderedDict[RequestId, Queued]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Queued]:
        for rank in self._ranks:
            yield from self._fifos[rank].values()

    def head(self) -> Queued | None:
        """Who is first."""
        return next(iter(self), None)

    def push(self, queued: Queued) -> None:
        """Add at the end of its rank."""
        rank = _rank(queued.request)
        if rank not in self._fifos:
            insort(self._ranks, rank)
            self._fifos[rank] = OrderedDict()
        self._fifos[rank][queued.request_id] = queued
        self._length += 1

    def remove(self, queued: Queued) -> None:
        """Take out one that is in it."""
        rank = _rank(queued.request)
        fifo = self._fifos[rank]
        del fifo[queued.request_id]
        self._length -= 1
        if not fifo:
            del self._fifos[rank]
            self._ranks.remove(rank)

    def snapshot(self, name: str, *, now: float) -> QueueSnapshot:
        """Its length and the age of its oldest request."""
        firsts = (next(iter(fifo.values())).since_s for fifo in self._fifos.values())
        return QueueSnapshot(name, self._length, max(0.0, now - min(firsts, default=now)))

    def check_integrity(self) -> None:
        """Assert that lengths and ranks agree."""
        assert self._length == sum(len(fifo) for fifo in self._fifos.values())
        assert self._ranks == sorted(self._fifos)
        assert all(self._fifos.values())


def _rank(request: Request) -> _Rank:
    return (-request.priority, request.attempt.number == 1)
