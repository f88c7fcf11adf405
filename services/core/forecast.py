"""Which adapters will be asked for soon, from when they were asked for so far.

Chameleon's optional prefetch for requests that have not arrived, by the predictor of "Serverless in
the Wild" (Shahrad et al., ATC 2020), whose parameters the paper does not give. Chosen here:

- Gaps between an adapter's requests are counted in bins that grow by a factor from a second to
  more than a day. Old counts fade: they are halved when there are `_GAPS_MAX`. The chance that the
  next request comes within the horizon, given that none came since the last, is the share of the
  gaps longer than that in which it did. So a gap that is nearly always an hour says nothing for
  most of that hour, and much at its end: the pre-warming of that paper, without its two limits.
- Where the time of day is known, requests are also counted by hour, and the mean of past days'
  counts in this hour is a rate. The paper had no such thing; daily use is common.
- Last, the share that the adapter has in all uses (`services.core.demand`) times the present rate
  of requests. It says nothing of when, but lets a cache grow back after a burst of KV cache.

The chance is the largest of the three. At most `limit` adapters are known; beyond it the half that
was not asked for longest is forgotten.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.core.demand import Demand
from services.core.types import Adapter, AdapterDigest

Floats = NDArray[np.float64]

_BINS: Final = 40
_FACTOR: Final = 1.4  # 1.4^36 s is two days
_EDGES_S: Final[Floats] = np.concatenate([[0.0], _FACTOR ** np.arange(_BINS)])
_GAPS_MAX: Final = 64.0
_GAPS_MIN: Final = 4.0  # below, gaps say nothing
_DOUBT: Final = 0.5  # counted as a gap that is longer than all seen
_HOURS: Final = 24
_HOUR_S: Final = 3600.0
_NEW_DAY: Final = 0.5  # the weight of the latest day in an hour's mean
_RATE_SPAN_S: Final = 60.0
_ROWS_AT_FIRST: Final = 64


class Forecast:
    """Gaps and hours by adapter.

    `day_offset_s`: seconds since midnight when the machine's clock was 0; None: it is not known.
    """

    def __init__(self, *, day_offset_s: float | None, limit: int = 4096) -> None:
        assert limit >= 2
        self._day_offset_s = day_offset_s
        self._limit = limit
        self._adapters: list[Adapter | None] = []
        self._row_of: dict[AdapterDigest, int] = {}
        self._free: list[int] = []
        self._gaps: Floats = np.zeros((_ROWS_AT_FIRST, _BINS))
        self._last_s: Floats = np.zeros(_ROWS_AT_FIRST)
        self._hours: Floats = np.zeros((_ROWS_AT_FIRST, _HOURS))
        self._this_hour: Floats = np.zeros(_ROWS_AT_FIRST)
        self._hour: int | None = None
        self._rate_rps = 0.0
        self._rate_at_s = 0.0

    def __len__(self) -> int:
        return len(self._row_of)

    def note(self, adapter: Adapter, *, now: float) -> None:
        """A request for it has come."""
        self._turn_hour(now)
        fading = np.exp(-max(0.0, now - self._rate_at_s) / _RATE_SPAN_S)
        self._rate_rps = float(self._rate_rps * fading + 1.0 / _RATE_SPAN_S)
        self._rate_at_s = now
        row = self._row_of.get(adapter.digest)
        if row is None:
            row = self._add(adapter)
        else:
            self._count_gap(row, now - self._last_s[row])
        self._last_s[row] = now
        self._this_hour[row] += 1

    def forget(self, digest: AdapterDigest) -> None:
        """It will not be asked for again."""
        row = self._row_of.pop(digest, None)
        if row is None:
            return
        self._adapters[row] = None
        self._gaps[row] = self._hours[row] = 0.0
        self._this_hour[row] = 0.0
        self._free.append(row)

    def chances(
        self, demand: Demand, *, horizon_s: float, now: float
    ) -> list[tuple[Adapter, float]]:
        """Each known adapter and the chance of a request for it within the horizon."""
        self._turn_hour(now)
        count = len(self._adapters)
        best = np.maximum(self._by_gap(count, horizon_s, now), self._by_hour(count, horizon_s, now))
        fading = np.exp(-max(0.0, now - self._rate_at_s) / _RATE_SPAN_S)
        uses = float(self._rate_rps * fading) * horizon_s
        known = [(row, one) for row, one in enumerate(self._adapters) if one is not None]
        shares = -np.expm1(-uses * demand.chances_of([one.digest for _, one in known]))
        rows = [row for row, _ in known]
        chances = np.maximum(best[rows], shares).tolist() if known else []
        return [(one, chance) for (_, one), chance in zip(known, chances, strict=True)]

    def check_integrity(self) -> None:
        """Assert that rows have one owner each."""
        for digest, row in self._row_of.items():
            adapter = self._adapters[row]
            assert adapter is not None
            assert adapter.digest == digest
        assert len(self._row_of) + len(self._free) == len(self._adapters)

    def _by_gap(self, count: int, horizon_s: float, now: float) -> Floats:
        gaps = self._gaps[:count]
        sums = np.concatenate([np.zeros((count, 1)), np.cumsum(gaps, axis=1)], axis=1)
        idle_s = np.maximum(0.0, now - self._last_s[:count])
        shorter, until = _within(sums, idle_s), _within(sums, idle_s + horizon_s)
        total = sums[:, -1]
        chance = (until - shorter) / (total - shorter + _DOUBT)
        return np.where(total >= _GAPS_MIN, chance, 0.0)

    def _by_hour(self, count: int, horizon_s: float, now: float) -> Floats:
        hour = self._hour_of(now)
        if hour is None:
            return np.zeros(count)
        return -np.expm1(-self._hours[:count, hour] * horizon_s / _HOUR_S)

    def _hour_of(self, now: float) -> int | None:
        if self._day_offset_s is None:
            return None
        return int((self._day_offset_s + now) // _HOUR_S) % _HOURS

    def _turn_hour(self, now: float) -> None:
        """At the end of an hour its counts join the mean of that hour."""
        hour = self._hour_of(now)
        if hour == self._hour:
            return
        if self._hour is not None:
            column = self._hours[:, self._hour]
            column += _NEW_DAY * (self._this_hour - column)
            self._this_hour[:] = 0.0
        self._hour = hour

    def _count_gap(self, row: int, gap_s: float) -> None:
        place = int(np.searchsorted(_EDGES_S, max(0.0, gap_s), side="right")) - 1
        self._gaps[row, min(place, _BINS - 1)] += 1.0
        if self._gaps[row].sum() >= _GAPS_MAX:
            self._gaps[row] /= 2.0

    def _add(self, adapter: Adapter) -> int:
        if len(self._row_of) >= self._limit:
            self._forget_half()
        if self._free:
            row = self._free.pop()
            self._adapters[row] = adapter
        else:
            row = len(self._adapters)
            self._adapters.append(adapter)
            if row == len(self._last_s):
                self._gaps, self._hours = _doubled(self._gaps), _doubled(self._hours)
                self._last_s, self._this_hour = _doubled(self._last_s), _doubled(self._this_hour)
        self._row_of[adapter.digest] = row
        return row

    def _forget_half(self) -> None:
        oldest = sorted(self._row_of, key=lambda digest: self._last_s[self._row_of[digest]])
        for digest in oldest[: len(oldest) // 2]:
            self.forget(digest)


def _within(sums: Floats, times_s: Floats) -> Floats:
    """Gaps of each row up to its time, evenly spread within a bin. [rows, bins + 1], [rows]."""
    place = np.minimum(np.searchsorted(_EDGES_S, times_s, side="right") - 1, _BINS - 1)
    rows = np.arange(len(sums))
    begin_s, end_s = _EDGES_S[place], _EDGES_S[place + 1]
    share = np.minimum(1.0, (times_s - begin_s) / (end_s - begin_s))
    low, high = sums[rows, place], sums[rows, place + 1]
    return np.asarray(low + share * (high - low), dtype=np.float64)


def _doubled(array: Floats) -> Floats:
    return np.concatenate([array, np.zeros_like(array)])
