"""A queue ordered by a key that does not change while an entry waits.

A heap with lazy deletion finds the first entry in O(log n) but cannot list the ones behind it. So
the first few are kept apart in a sorted list, the window, and only the rest in the heap: policies
that let entries pass a blocked first one look at the window. Equal keys leave in order of arrival.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from typing import Final, Generic, TypeVar

E = TypeVar("E", bound=Hashable)
Key = float | tuple[float, ...]
_Item = tuple[Key, int, E]

_WINDOW_MAX: Final = 64  # beyond it the later half of the window goes to the heap
_STALE_MAX: Final = 64  # removed heap entries not worth a rebuild


class KeyedQueue(Generic[E]):
    """Entries by key, smallest first. `push`, `remove` and `first` cost O(log n)."""

    def __init__(self) -> None:
        self._items: dict[E, _Item[E]] = {}
        self._window: list[_Item[E]] = []  # sorted; all of it precedes all of the heap
        self._heap: list[_Item[E]] = []  # with removed ones
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, entry: E) -> bool:
        return entry in self._items

    def __iter__(self) -> Iterator[E]:
        """The window in order, then the rest about in order."""
        for item in tuple(self._window):
            yield item[2]
        for item in tuple(self._heap):
            if self._items.get(item[2]) is item:
                yield item[2]

    def push(self, key: Key, entry: E) -> bool:
        """Add an entry that is not in the queue. True if it is near the front, or may be."""
        assert entry not in self._items
        self._sequence += 1
        item = (key, self._sequence, entry)
        self._items[entry] = item
        window = self._window
        if window and item < window[-1]:
            insort(window, item)
            if len(window) > _WINDOW_MAX:
                self._shorten_window()
            return True
        heapq.heappush(self._heap, item)
        return len(self._items) <= _WINDOW_MAX

    def remove(self, entry: E) -> None:
        """Take out an entry that is in the queue."""
        item = self._items.pop(entry)
        window = self._window
        if window and item <= window[-1]:
            del window[bisect_left(window, item)]
        if len(self._heap) > 2 * len(self._items) + _STALE_MAX:
            self._heap = [one for one in self._heap if self._items.get(one[2]) is one]
            heapq.heapify(self._heap)

    def first(self) -> E | None:
        """The entry with the smallest key."""
        if not self._window:
            self._fill_window(1)
        return self._window[0][2] if self._window else None

    def front(self, count: int) -> list[E]:
        """The first `count` entries in order; no more than the window is meant for."""
        assert count <= _WINDOW_MAX
        if len(self._window) < count:
            self._fill_window(count)
        return [item[2] for item in self._window[:count]]

    def check_integrity(self) -> None:
        """Assert that window and heap hold the entries, in order."""
        live = [item for item in self._heap if self._items.get(item[2]) is item]
        assert self._window == sorted(self._window)
        assert len(self._window) + len(live) == len(self._items)
        assert all(self._items.get(item[2]) is item for item in self._window)
        assert not self._window or all(self._window[-1] < item for item in live)
        assert len(self._heap) <= 2 * len(self._items) + _STALE_MAX + len(self._window) + 1

    def _fill_window(self, count: int) -> None:
        while len(self._window) < count and self._heap:
            item = heapq.heappop(self._heap)
            if self._items.get(item[2]) is item:
                self._window.append(item)

    def _shorten_window(self) -> None:
        kept = _WINDOW_MAX // 2
        for item in self._window[kept:]:
            heapq.heappush(self._heap, item)
        del self._window[kept:]
