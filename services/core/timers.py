"""Timers keyed by what they are for: when is the next one due, and which are due now.

A heap with lazy deletion. Cancelled entries are dropped when they surface, or all together once
they are the majority, so memory follows the number of live timers.
"""

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Timers(Generic[K]):
    """At most one timer per key. Timers due at the same time fire in the order they were set."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, K]] = []
        self._live: dict[K, tuple[float, int]] = {}
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, key: K) -> bool:
        return key in self._live

    def set(self, key: K, *, at_s: float) -> None:
        """Start the key's timer, or move it."""
        self._sequence += 1
        self._live[key] = (at_s, self._sequence)
        heapq.heappush(self._heap, (at_s, self._sequence, key))
        self._compact()

    def cancel(self, key: K) -> None:
        """Stop the key's timer if there is one."""
        self._live.pop(key, None)
        self._compact()

    def next_s(self) -> float | None:
        """When the earliest timer is due."""
        self._drop_stale()
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> list[K]:
        """Remove and return the keys whose time has come, earliest first."""
        due: list[K] = []
        if not self._heap or self._heap[0][0] > now:
            return due
        self._drop_stale()
        while self._heap and self._heap[0][0] <= now:
            key = heapq.heappop(self._heap)[2]
            del self._live[key]
            due.append(key)
            self._drop_stale()
        return due

    def pop_first_due(self, now: float) -> K | None:
        """Remove and return the key whose time came first, if any has come."""
        due_s = self.next_s()
        if due_s is None or due_s > now:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._live[key]
        return key

    def check_integrity(self) -> None:
        """Assert that every live timer is in the heap and that stale entries are bounded."""
        entries = {(at_s, sequence, key) for at_s, sequence, key in self._heap}
        assert all((at, seq, key) in entries for key, (at, seq) in self._live.items())
        assert len(self._heap) <= 2 * len(self._live) + _STALE_MAX

    def _drop_stale(self) -> None:
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)

    def _is_live(self, entry: tuple[float, int, K]) -> bool:
        at_s, sequence, key = entry
        return self._live.get(key) == (at_s, sequence)

    def _compact(self) -> None:
        if len(self._heap) > 2 * len(self._live) + _STALE_MAX:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)


_STALE_MAX = 64  # entries not worth a rebuild


def earliest(*times_s: float | None) -> float | None:
    """The smallest of the times that are set."""
    return min((time_s for time_s in times_s if time_s is not None), default=None)
