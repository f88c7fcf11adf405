"""Queue policies by name: `multilevel` (default) and `fifo` (the baseline)."""

from collections.abc import Iterator
from typing import Final

from services.core.config import MultilevelConfig
from services.core.multilevel import Multilevel
from services.core.queues import Place, PriorityFifo, Queued, QueuePolicy
from services.core.snapshots import QueueSnapshot
from services.core.types import Attempt, Request, RequestId

POLICY_NAMES: Final = ("multilevel", "fifo")


def build_policy(name: str, *, multilevel: MultilevelConfig | None = None) -> QueuePolicy:
    """The policy of that name; `multilevel` configures the one of that name."""
    match name:
        case "multilevel":
            return Multilevel(multilevel or MultilevelConfig())
        case "fifo":
            return Fifo()
        case _:
            raise ValueError(f"unknown queue policy {name!r}, have {', '.join(POLICY_NAMES)}")


class Fifo:
    """Strict order in one queue: if the first cannot start, nobody does. S-LoRA's order."""

    name = "fifo"

    def __init__(self) -> None:
        self._entries: dict[RequestId, Queued] = {}
        self._queue = PriorityFifo()

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, request: Request, *, now: float) -> None:
        """Queue a request."""
        queued = Queued(request, now)
        assert queued.request_id not in self._entries
        self._entries[queued.request_id] = queued
        self._queue.push(queued)

    def remove(self, request_id: RequestId) -> None:
        """A queued request leaves without being dispatched."""
        self._queue.remove(self._entries.pop(request_id))

    def take(self, place: Place, *, now: float) -> Request | None:  # noqa: ARG002 - time is nothing to it
        """The head, if it can be placed."""
        head = self._queue.head()
        if head is None or not place(head.request):
            return None
        self.remove(head.request_id)
        return head.request

    def release(self, attempt: Attempt) -> None:
        """It has no quotas."""

    def resize(self, pool_tokens: int) -> None:
        """It has no quotas."""

    def next_deadline(self, *, now: float) -> float | None:  # noqa: ARG002 - as above
        """Time changes nothing."""
        return None

    def upcoming(self) -> Iterator[Request]:
        """Queued requests in order."""
        return (queued.request for queued in self._queue)

    def queue_of(self, request_id: RequestId) -> str:
        """There is one queue."""
        assert request_id in self._entries
        return self.name

    def queues(self, *, now: float) -> tuple[QueueSnapshot, ...]:
        """The one queue."""
        return (self._queue.snapshot(self.name, now=now),)

    def check_integrity(self) -> None:
        """Assert that the queue holds the entries."""
        self._queue.check_integrity()
        assert {queued.request_id for queued in self._queue} == set(self._entries)
