"""Which adapter is asked for, request by request, where caches do well and where they do not.

Each regime is a sequence of adapters and a residency budget: a share of all adapters' bytes. Sizes
are those of Chameleon's set-up, ranks 8 to 128 in turn, 2 MiB per rank. Time only orders requests
and moves hot sets on; 8 requests come per second, but in ServeGen's traffic, which keeps its day.

- zipf 100: Chameleon's 100 adapters. zipf 500: five times as many; the budgets are the mean memory
  that the KV cache leaves of a whole and of half a pool at that rate (`bench.cache.served`).
- uniform: no favourites at all. Nothing but sizes can be learned.
- locality: half of the requests repeat one of the last 30 adapters that were asked for.
- shift: every minute, or every five, the favourites change.
- scan: half of the requests go through all adapters in turn.
- servegen: one adapter per client of a production service, over two of its days, with the rates
  that each had in every ten minutes; shuffled: the same requests in any order.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bench.workload import AdapterPool, Popularity
from bench.workload.public_data import data_folder
from services.core.types import Adapter

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

RATE_RPS: Final = 8.0
_REPEATED: Final = 0.5
_RECENT: Final = 30
_SERVEGEN: Final = "servegen/m-large.npz"
_WINDOW_S: Final = 600.0
_FIRST_WINDOW: Final = 288  # of its 14 days the third and fourth, in windows of ten minutes
_WINDOWS: Final = 288


@dataclass(frozen=True, slots=True)
class Uses:
    """Requests for adapters, in order: times in seconds and places in `adapters`."""

    adapters: tuple[Adapter, ...]
    times_s: Floats
    chosen: Ints

    @property
    def sizes(self) -> Floats:
        """Bytes of each adapter."""
        return np.array([float(adapter.size_bytes) for adapter in self.adapters])


@dataclass(frozen=True, slots=True)
class Regime:
    """A sequence of uses by name, and the share of all adapters that may be resident."""

    name: str
    kind: str  # "zipf": favourites that never change, or "other"
    budget: float
    adapters: int = 500
    popularity: Popularity = field(default_factory=Popularity)
    has_locality: bool = False
    is_servegen: bool = False
    is_shuffled: bool = False

    @property
    def is_available(self) -> bool:
        """False if it needs data that is not here."""
        return not self.is_servegen or (data_folder() / _SERVEGEN).is_file()

    def uses(self, requests: int, *, seed: int) -> Uses:
        """So many requests."""
        make: Callable[[int, np.random.Generator], Uses]
        make = self._servegen if self.is_servegen else self._drawn
        rng = np.random.default_rng([seed, 17])
        uses = make(requests, rng)
        if self.is_shuffled:
            return Uses(uses.adapters, uses.times_s, rng.permutation(uses.chosen))
        return uses

    def _drawn(self, requests: int, rng: np.random.Generator) -> Uses:
        times_s = np.cumsum(rng.exponential(1.0 / RATE_RPS, requests))
        pool = AdapterPool(self.adapters)
        chosen = self.popularity.draw(times_s, pool, rng)
        if self.has_locality:
            chosen = _repeat_recent(chosen, rng)
        return Uses(pool.adapters(), times_s, chosen)

    def _servegen(self, requests: int, rng: np.random.Generator) -> Uses:
        with np.load(data_folder() / _SERVEGEN) as arrays:
            rates = arrays["rate"][:, _FIRST_WINDOW : _FIRST_WINDOW + _WINDOWS].astype(np.float64)
        shares = rates.sum(axis=0) / rates.sum()
        windows = np.sort(rng.choice(_WINDOWS, requests, p=shares))
        chosen = np.empty(requests, dtype=np.int64)
        for window in np.unique(windows):
            mine = windows == window
            weights = rates[:, window] / rates[:, window].sum()
            chosen[mine] = rng.choice(len(weights), mine.sum(), p=weights)
        times_s = np.sort((windows + rng.random(requests)) * _WINDOW_S)
        return Uses(AdapterPool(len(rates)).adapters(), times_s, chosen)


REGIMES: Final = (
    Regime("zipf 100", "zipf", 0.5, adapters=100),
    Regime("zipf 500, whole pool", "zipf", 0.35),
    Regime("zipf 500, half pool", "zipf", 0.17),
    Regime("uniform 500", "other", 0.17, popularity=Popularity(adapters="uniform")),
    Regime("locality", "other", 0.17, has_locality=True),
    Regime("shift, 60 s", "other", 0.17, popularity=Popularity(shift_s=60.0)),
    Regime("shift, 300 s", "other", 0.17, popularity=Popularity(shift_s=300.0)),
    Regime("scan", "other", 0.17, popularity=Popularity(scan_share=0.5)),
    Regime("servegen", "other", 0.17, is_servegen=True),
    Regime("servegen, shuffled", "zipf", 0.17, is_servegen=True, is_shuffled=True),
)


def _repeat_recent(chosen: Ints, rng: np.random.Generator) -> Ints:
    repeats = rng.random(len(chosen)) < _REPEATED
    back = rng.integers(1, _RECENT + 1, len(chosen))
    uses = chosen.copy()
    for place in np.flatnonzero(repeats):
        if back[place] <= place:
            uses[place] = uses[place - back[place]]
    return uses
