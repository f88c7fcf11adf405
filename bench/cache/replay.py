"""A sequence of uses through a cache of a fixed budget: the worker's own, or one that can foresee.

`Cached` drives `services.core.cache.AdapterCache` with a policy by name, as a worker does: a use of
an absent adapter evicts the policy's victims until it fits, and loads it. All adapters are in host
memory. Each use ends before the next begins, so that nothing but the policy decides.

The others know the future, or the truth, and are bounds:

- `Foreseeing` evicts whoever is used latest (Belady's MIN, the best for adapters of one size), or
  with `by_size` whoever has the largest product of the time until then and its size (greedy: no
  practical optimum is known for sizes that differ). Each misses more of what the other saves.
- `AllResident` loads each adapter once.
- `BestSet` keeps the set that would have been best of all fixed ones, those with the most uses per
  byte ("hits"), or the most uses ("bytes"). Where favourites never change no policy that cannot
  foresee does better in the long run, but for what the last of the budget's bytes leave over.
"""

from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.cache.regimes import Ints, Uses
from services.core.cache import AdapterCache, CachedAdapter
from services.core.eviction import build_eviction
from services.core.memory import SPARE_ALL

Flags = NDArray[np.bool_]

_BLOCK_BYTES: Final = 2**20
WARMUP: Final = 0.2  # of the requests are not counted
_NEVER: Final = 1 << 40
_LOAD_BYTE_S: Final = 1.0 / (10.15 * 2**20 * 1e3)  # of Chameleon's card


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of the requests after the warm-up."""

    hit_rate: float
    gib_per_1000: float  # loaded, per 1,000 requests


class Strategy(Protocol):
    """Who stays."""

    def hits(self, uses: Uses, budget_bytes: float, /) -> Flags:
        """Which of the uses found their adapter."""
        ...


def outcome(
    strategy: Strategy, uses: Uses, budget_bytes: float, *, warmup: float = WARMUP
) -> Outcome:
    """Replay all uses, and count those after the warm-up."""
    hits = strategy.hits(uses, budget_bytes)
    first = int(warmup * len(hits))
    counted, chosen = hits[first:], uses.chosen[first:]
    moved_bytes = float(uses.sizes[chosen][~counted].sum())
    return Outcome(float(counted.mean()), moved_bytes / 2**30 / len(counted) * 1000)


@dataclass(frozen=True, slots=True)
class Cached:
    """The worker's cache with a policy by name."""

    policy: str
    options: tuple[tuple[str, str], ...] = ()

    def hits(self, uses: Uses, budget_bytes: float, /) -> Flags:
        """Replay all uses."""
        adapters = uses.adapters
        cache = AdapterCache(build_eviction(self.policy, dict(self.options)))
        cache.set_near(frozenset(adapter.digest for adapter in adapters))
        cache.learn_load_byte_s(_LOAD_BYTE_S)
        blocks = [-(-adapter.size_bytes // _BLOCK_BYTES) for adapter in adapters]
        free_blocks = int(budget_bytes // _BLOCK_BYTES)
        hits = np.zeros(len(uses.chosen), dtype=np.bool_)
        for place, (index, now) in enumerate(
            zip(uses.chosen.tolist(), uses.times_s.tolist(), strict=True)
        ):
            digest = adapters[index].digest
            hits[place] = digest in cache
            if not hits[place]:
                free_blocks -= blocks[index]
                free_blocks += _evict(cache, -free_blocks, now)
                cache.begin_load(CachedAdapter(adapters[index], blocks[index], last_used_s=now))
                cache.end_load(digest)
            cache.use(digest, now=now)
            cache.unuse(digest, now=now)
        return hits


@dataclass(frozen=True, slots=True)
class Foreseeing:
    """Evicts by the next use, which it knows."""

    by_size: bool

    def hits(self, uses: Uses, budget_bytes: float, /) -> Flags:
        """Replay all uses."""
        sizes, next_use = uses.sizes, _next_uses(uses.chosen)
        due = np.full(len(sizes), _NEVER, dtype=np.float64)
        is_here = np.zeros(len(sizes), dtype=np.bool_)
        free_bytes = budget_bytes
        hits = np.zeros(len(uses.chosen), dtype=np.bool_)
        for place, index in enumerate(uses.chosen.tolist()):
            due[index] = next_use[place]
            hits[place] = is_here[index]
            if hits[place]:
                continue
            free_bytes -= sizes[index]
            while free_bytes < 0:
                here = np.flatnonzero(is_here)
                wait = due[here] - place
                worst = here[np.argmax(wait * sizes[here] if self.by_size else wait)]
                is_here[worst] = False
                free_bytes += sizes[worst]
            is_here[index] = True
        return hits


@dataclass(frozen=True, slots=True)
class AllResident:
    """Memory for all."""

    def hits(self, uses: Uses, _budget_bytes: float, /) -> Flags:
        """Every adapter's first use is a miss."""
        hits = np.ones(len(uses.chosen), dtype=np.bool_)
        hits[np.unique(uses.chosen, return_index=True)[1]] = False
        return hits


@dataclass(frozen=True, slots=True)
class BestSet:
    """One set of adapters, for ever; what is not in it is loaded for each use."""

    saves: Literal["hits", "bytes"]

    def hits(self, uses: Uses, budget_bytes: float, /) -> Flags:
        """The set fills the budget greedily."""
        sizes = uses.sizes
        counts = np.bincount(uses.chosen, minlength=len(sizes)).astype(np.float64)
        worth = counts / sizes if self.saves == "hits" else counts
        order = np.argsort(-worth, kind="stable")
        chosen = np.zeros(len(sizes), dtype=np.bool_)
        chosen[order[np.cumsum(sizes[order]) <= budget_bytes]] = True
        return np.asarray(chosen[uses.chosen], dtype=np.bool_)


def _evict(cache: AdapterCache, short_blocks: int, now: float) -> int:
    """Evict until so many blocks are had; how many there were."""
    if short_blocks <= 0:
        return 0
    gone, had = [], 0
    for digest in cache.victims(lambda _: None, spare=SPARE_ALL, now=now):
        gone.append(digest)
        had += cache.blocks_of(digest)
        if had >= short_blocks:
            break
    for digest in gone:
        cache.remove(digest)
    return had


def _next_uses(chosen: Ints) -> Ints:
    """Place of the next use of the same adapter, for each use."""
    next_use = np.full(len(chosen), _NEVER, dtype=np.int64)
    latest: dict[int, int] = {}
    for place in range(len(chosen) - 1, -1, -1):
        index = int(chosen[place])
        next_use[place] = latest.get(index, _NEVER)
        latest[index] = place
    return next_use
