"""Counts by adapter, for the few adapters that most requests are for; the others share one count.

Thousands of adapters must not become thousands of series, so at most `shown_max` have counts of
their own. Candidates to become one of them are counted by space-saving (Metwally, Agrawal and El
Abbadi, ICDT 2005): a newcomer takes the place of the candidate with the fewest requests and
inherits its count as its possible error. A candidate is shown when it has surely had twice the
requests of the least shown one, so that near equals do not take turns. All weights are halved now
and then, so that what was popular once gives way.

A request counts once, under the name that applied when it came: no count ever goes down while it is
shown. No I/O and no clock.
"""

import heapq
from dataclasses import dataclass, field
from typing import Final

OTHER: Final = "_other"  # no adapter can have this name
SHOWN_MAX: Final = 50
CANDIDATES_MAX: Final = 512
HALVE_EVERY: Final = 100_000  # requests
_LEAD: Final = 2.0
_SURELY_MIN: Final = 8.0  # requests: fewer are no reason to be shown instead of another

Counts = dict[tuple[str, str], int]  # by adapter and label


@dataclass(slots=True)
class _Shown:
    weight: float
    by_label: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Candidate:
    count: float
    error: float  # of the count, at most


class PopularAdapters:
    """Requests by adapter and one more label of few values."""

    def __init__(self, *, shown_max: int = SHOWN_MAX, candidates_max: int = CANDIDATES_MAX) -> None:
        self._shown_max = shown_max
        self._candidates_max = candidates_max
        self._shown: dict[str, _Shown] = {}
        self._other = _Shown(0.0)
        self._candidates: dict[str, _Candidate] = {}
        self._by_count: list[tuple[float, str]] = []  # heap; a count may have grown since
        self._least_weight = 0.0  # no shown one has less
        self._until_halved = HALVE_EVERY

    def add(self, adapter: str, label: str) -> None:
        """One request for the adapter."""
        self._until_halved -= 1
        if self._until_halved == 0:
            self._halve()
        shown = self._shown.get(adapter)
        if shown is None:
            shown = self._show(adapter) if self._is_popular(adapter) else self._other
        shown.weight += 1
        shown.by_label[label] = shown.by_label.get(label, 0) + 1

    def counts(self) -> Counts:
        """What to show now. May be called by another thread."""
        named = [*self._shown.copy().items(), (OTHER, self._other)]
        return {
            (adapter, label): count
            for adapter, shown in named
            for label, count in shown.by_label.copy().items()
        }

    def check_integrity(self) -> None:
        """Assert the bounds, and that the heap has every candidate."""
        assert len(self._shown) <= self._shown_max
        assert len(self._candidates) <= self._candidates_max
        assert len(self._by_count) == len(self._candidates)
        assert {name for _, name in self._by_count} == set(self._candidates)
        assert not self._shown.keys() & self._candidates.keys()

    def _is_popular(self, adapter: str) -> bool:
        """Count a request of an adapter that is not shown. Should it be?"""
        if len(self._shown) < self._shown_max:
            return True
        candidate = self._candidates.get(adapter)
        if candidate is None:
            candidate = self._admit(adapter)
        candidate.count += 1
        surely = candidate.count - candidate.error
        if surely <= max(_SURELY_MIN, _LEAD * self._least_weight):
            return False
        self._least_weight = min(shown.weight for shown in self._shown.values())
        return surely > _LEAD * self._least_weight

    def _admit(self, adapter: str) -> _Candidate:
        inherited = 0.0
        if len(self._candidates) >= self._candidates_max:
            inherited = self._drop_least()
        candidate = self._candidates[adapter] = _Candidate(inherited, inherited)
        heapq.heappush(self._by_count, (inherited, adapter))
        return candidate

    def _drop_least(self) -> float:
        """Forget the candidate with the fewest requests. How many?"""
        while True:
            count, name = self._by_count[0]
            now = self._candidates[name].count
            if now == count:
                heapq.heappop(self._by_count)
                del self._candidates[name]
                return count
            heapq.heapreplace(self._by_count, (now, name))

    def _show(self, adapter: str) -> _Shown:
        weight = 0.0
        candidate = self._candidates.pop(adapter, None)
        if candidate is not None:
            weight = candidate.count - candidate.error
            self._rebuild_heap()
            least = min(self._shown, key=lambda name: self._shown[name].weight)
            del self._shown[least]
        shown = self._shown[adapter] = _Shown(weight)
        return shown

    def _halve(self) -> None:
        self._until_halved = HALVE_EVERY
        self._least_weight /= 2
        for shown in self._shown.values():
            shown.weight /= 2
        for candidate in self._candidates.values():
            candidate.count /= 2
            candidate.error /= 2
        self._rebuild_heap()

    def _rebuild_heap(self) -> None:
        self._by_count = [(entry.count, name) for name, entry in self._candidates.items()]
        heapq.heapify(self._by_count)
