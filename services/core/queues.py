"""The contract of a queue policy, and the order that all policies share.

A policy decides which queued request goes next. It knows sizes, waits and how much of the workers'
memory each of its queues has out, but no workers: the cluster machine offers it `place`, which says
whether some worker can start a request at once and remembers which one. `take` asks for as few
requests as it can, removes the first that may go and can be placed, and returns it; the machine
calls it until it returns None. So a policy stays work-conserving by construction: it alone decides
when to stop asking.

Order within a queue: higher priority first, then requests that come back (their clients are in the
middle of an answer), then arrival.
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from services.core.snapshots import QueueSnapshot
from services.core.types import Attempt, Request, RequestId

Place = Callable[[Request], bool]


class QueuePolicy(Protocol):
    """Queues of requests and the order in which they leave."""

    @property
    def name(self) -> str:
        """The name it is built by."""
        ...

    def __len__(self) -> int: ...

    def push(self, request: Request, *, now: float) -> None:
        """Queue a request."""
        ...

    def remove(self, request_id: RequestId) -> None:
        """A queued request leaves without being dispatched."""
        ...

    def take(self, place: Place, *, now: float) -> Request | None:
        """Remove and return the next request to dispatch, the last one that `place` accepted."""
        ...

    def release(self, attempt: Attempt) -> None:
        """A worker is done with a request; unknown ones (adopted by the cluster) are ignored."""
        ...

    def resize(self, pool_tokens: int) -> None:
        """The workers that take requests can hold so many tokens of KV cache in total."""
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
