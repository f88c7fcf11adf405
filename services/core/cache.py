"""Adapters in a worker's device memory: loading, in use, wanted or idle.

Chameleon's cache (§4.2): no fixed size. An adapter that nobody uses stays in whatever blocks the KV
cache leaves, until memory forces it out. Who may be forced out:

1. in use by an admitted request, or still loading: never;
2. wanted by a waiting request or by a hint: last, the least urgent first (the paper gives no order
   among the wanted ones; the one that is needed latest goes first here);
3. idle: by the eviction policy's score.

Pinned adapters are wanted ones, more urgent than every request that waits.

This module keeps the entries and ranks victims. Blocks are counted by `services.core.pool`.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from services.core.demand import Demand
from services.core.events import ResidentAdapter
from services.core.eviction_cost import Cost
from services.core.eviction_view import EvictionPolicy, Floats, IdleAdapters, UseTable
from services.core.snapshots import CacheCounts
from services.core.types import Adapter, AdapterDigest

Urgency = tuple[int, int]  # smaller is more urgent
Wanted = Callable[[AdapterDigest], Urgency | None]  # None: nobody waits for it


@dataclass(slots=True)
class CachedAdapter:
    """One adapter and its use. Times as the machine's `now`."""

    adapter: Adapter
    blocks: int
    last_used_s: float
    is_loaded: bool = False
    users: int = 0
    is_ahead: bool = False  # kept or loaded for a request that has not been admitted
    near_load_s: float | None = None  # when its load from host memory began; None: a download
    ready_layers: int = 0  # that steps may use while it is loading
    progressed_s: float = 0.0  # when the last of them came, or its load began
    layer_s: float = 0.0  # that each of those that came last took
    began_s: float = 0.0  # when its load began
    is_prefetched: bool = False  # loaded for a hint or a forecast, and not used yet
    slot: int = -1  # in the cache's table, once its load has begun
    score: float | None = None  # when it was last named as a victim, since its last use


_VALUE: Final = Cost()  # whatever the policy: of an adapter against something else
_FEW: Final = 16  # victims are ranked so many at a time, because few are asked for


class AdapterCache:
    """The adapters that hold blocks of the pool."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._rules = policy.rules
        self._table = UseTable(self._rules.window_s)
        self._near: frozenset[AdapterDigest] = frozenset()
        self._entries: dict[AdapterDigest, CachedAdapter] = {}
        self._loading: dict[AdapterDigest, CachedAdapter] = {}
        self._idle: dict[AdapterDigest, CachedAdapter] = {}  # loaded, without a user: evictable
        self.evictable_blocks = 0  # that could be had by evicting every adapter that may be
        self.used_blocks = 0  # of adapters with a user, loading ones included
        self._hits = self._misses = self._evictions = 0
        self._prefetches = self._prefetch_hits = self._prefetch_wastes = 0

    def __contains__(self, digest: AdapterDigest) -> bool:
        return digest in self._entries

    def __iter__(self) -> Iterator[CachedAdapter]:
        return iter(self._entries.values())

    def is_loaded(self, digest: AdapterDigest) -> bool:
        """True once its load has ended."""
        return digest in self._entries and digest not in self._loading

    def is_evictable(self, digest: AdapterDigest) -> bool:
        """True if it is loaded and nobody uses it."""
        return digest in self._idle

    def has_users(self, digest: AdapterDigest) -> bool:
        """True if an admitted request uses it."""
        entry = self._entries.get(digest)
        return entry is not None and entry.users > 0

    def blocks_of(self, digest: AdapterDigest) -> int:
        """Blocks that it holds."""
        return self._entries[digest].blocks

    def last_used_s(self, digest: AdapterDigest) -> float:
        """When its last user came or left."""
        return self._entries[digest].last_used_s

    def saved_s(self, digest: AdapterDigest, *, now: float) -> float:
        """Seconds that keeping it is expected to save at the next request, per block it holds."""
        slot = np.array([self._entries[digest].slot], dtype=np.int64)
        return float(_VALUE.scores(IdleAdapters(self._table, slot, now=now))[0])

    @property
    def loading(self) -> int:
        """Loads under way."""
        return len(self._loading)

    @property
    def is_loading_ahead(self) -> bool:
        """True while an adapter is loaded from host memory for a request not yet admitted."""
        loads = self._loading.values()
        return any(entry.is_ahead and entry.near_load_s is not None for entry in loads)

    def downloads(self, near: Container[AdapterDigest]) -> int:
        """Loads under way of adapters that are not near, in host memory."""
        return sum(digest not in near for digest in self._loading)

    def unclaimed_loading_blocks(self, *, besides: AdapterDigest | None = None) -> int:
        """Blocks that loads without a user hold; out of reach until they end."""
        return sum(
            entry.blocks
            for digest, entry in self._loading.items()
            if entry.users == 0 and digest != besides
        )

    @property
    def demand(self) -> Demand:
        """How often which adapter is used, here or not."""
        return self._table.demand

    @property
    def counts(self) -> CacheCounts:
        """What the cache came to so far."""
        return CacheCounts(
            self._hits,
            self._misses,
            self._evictions,
            self._prefetches,
            self._prefetch_hits,
            self._prefetch_wastes,
        )

    def resident(
        self, pin_reasons: Mapping[AdapterDigest, str] | None = None
    ) -> tuple[ResidentAdapter, ...]:
        """What is loaded, for a report."""
        reasons = pin_reasons or {}
        return tuple(
            ResidentAdapter(
                digest,
                entry.blocks,
                entry.users,
                entry.adapter.size_bytes,
                reasons.get(digest, ""),
            )
            for digest, entry in self._entries.items()
            if entry.is_loaded
        )

    def abandoned(self) -> list[AdapterDigest]:
        """The idle adapters that are not kept for a request to come."""
        return [digest for digest, entry in self._idle.items() if not entry.is_ahead]

    def keep_only(self, digests: Container[AdapterDigest]) -> None:
        """Of the loaded adapters, these are kept for requests to come."""
        for digest, entry in self._entries.items():
            if entry.is_loaded:
                entry.is_ahead = digest in digests

    def begin_load(self, entry: CachedAdapter) -> None:
        """A load starts; the adapter holds its blocks from now on."""
        digest = entry.adapter.digest
        assert digest not in self._entries
        self._entries[digest] = self._loading[digest] = entry
        self._prefetches += entry.is_prefetched
        entry.slot = self._table.add(entry.adapter, entry.blocks, now=entry.last_used_s)
        self._table.set_far(entry.slot, is_far=digest not in self._near)
        entry.progressed_s = entry.last_used_s

    def end_load(self, digest: AdapterDigest, *, now: float | None = None) -> CachedAdapter:
        """The load succeeded. `now` if what it took shall be learned."""
        entry = self._loading.pop(digest)
        entry.is_loaded = True
        if now is not None and entry.near_load_s is None:
            self._table.downloads.learn(entry.adapter.size_bytes, now - entry.began_s)
        if entry.users == 0:
            self._enter_idle(entry)
        return entry

    def progress(self, digest: AdapterDigest, layers: int, *, now: float) -> int:
        """Of an adapter that is loading so many layers have come. How many may be used now?"""
        entry = self._loading[digest]
        new_layers = layers - entry.ready_layers
        if new_layers > 0:
            entry.layer_s = (now - entry.progressed_s) / new_layers
            entry.ready_layers, entry.progressed_s = layers, now
        return entry.ready_layers

    def ready_layers(self, digest: AdapterDigest) -> int | None:
        """How many layers of it may be used while it is loading; None: it is loaded."""
        entry = self._entries[digest]
        return None if entry.is_loaded else entry.ready_layers

    def loaded_by_s(self, digest: AdapterDigest, *, num_layers: int) -> float:
        """When all its layers will have come if the others come as fast as the last ones."""
        entry = self._entries[digest]
        return entry.progressed_s + entry.layer_s * (num_layers - entry.ready_layers)

    def remove(self, digest: AdapterDigest) -> None:
        """It was evicted, or its load failed."""
        is_load = self._loading.pop(digest, None) is not None
        entry = self._entries.pop(digest)
        assert entry.users == 0
        self._evictions += not is_load
        if entry.score is not None:
            self._policy.note_evicted(entry.score)
        self._prefetch_wastes += entry.is_prefetched
        if digest in self._idle:
            self._leave_idle(entry)
        self._table.remove(entry.slot)

    def set_near(self, digests: frozenset[AdapterDigest]) -> None:
        """These are in host memory: to load them again needs no download."""
        changed = digests ^ self._near
        self._near = digests
        for digest in changed:
            entry = self._entries.get(digest)
            if entry is not None:
                self._table.set_far(entry.slot, is_far=digest not in digests)

    def learn_load_byte_s(self, load_byte_s: float) -> None:
        """So long takes a byte from host memory."""
        self._table.load_byte_s = load_byte_s

    def reload_s(self, adapter: Adapter) -> float:
        """Seconds that it would take to load it."""
        is_far = adapter.digest not in self._near
        return self._table.reload_one_s(adapter.size_bytes, is_far=is_far)

    def use(self, digest: AdapterDigest, *, now: float) -> None:
        """An admitted request uses it: it stays until as many `unuse`."""
        entry = self._entries[digest]
        self._hits += entry.is_loaded
        self._misses += not entry.is_loaded
        self._prefetch_hits += entry.is_prefetched
        if entry.users == 0:
            self.used_blocks += entry.blocks
            if entry.is_loaded:
                self._leave_idle(entry)
        entry.users += 1
        entry.score = None
        entry.is_ahead = entry.is_prefetched = False
        entry.last_used_s = now
        self._table.use(entry.slot, clock=self._policy.clock, now=now)
        self._table.demand.use(digest)

    def unuse(self, digest: AdapterDigest, *, now: float) -> None:
        """One user has left."""
        entry = self._entries[digest]
        assert entry.users > 0
        entry.users -= 1
        entry.last_used_s = now
        self._table.touch(entry.slot, now=now)
        if entry.users == 0:
            self.used_blocks -= entry.blocks
            if entry.is_loaded:
                self._enter_idle(entry)

    def victims(self, wanted: Wanted, *, spare: Urgency, now: float) -> Iterator[AdapterDigest]:
        """Adapters that may go, first to go first; wanted ones only if less urgent than `spare`."""
        idle = self._table.idle(now=now)
        scores = self._policy.scores(idle)
        late: list[tuple[Urgency, int, AdapterDigest]] = []
        for place, index in enumerate(self._ranked(idle, scores)):
            digest = self._table.digests[idle.slots[index]]
            assert digest is not None
            urgency = wanted(digest)
            if urgency is None:
                self._entries[digest].score = float(scores[index])
                yield digest
            elif urgency > spare:
                late.append((urgency, -place, digest))
        if self._rules.wanted_order == "urgency":
            late.sort(reverse=True)
        for _, _, digest in late:
            yield digest

    def check_integrity(self) -> None:
        """Assert that counts are sound."""
        idle = {digest for digest, entry in self._entries.items() if _is_idle(entry)}
        assert idle == set(self._idle)
        assert self.evictable_blocks == sum(entry.blocks for entry in self._idle.values())
        assert self.used_blocks == sum(entry.blocks for entry in self if entry.users)
        for digest, entry in self._entries.items():
            assert entry.adapter.digest == digest
            assert entry.users >= 0
            assert entry.blocks >= 0
            assert entry.is_loaded == (digest not in self._loading)
        assert all(digest in self._entries for digest in self._loading)
        slots = {entry.slot for entry in self._idle.values()}
        assert slots == set(self._table.idle(now=0.0).slots.tolist())
        self._table.demand.check_integrity()

    def _ranked(self, idle: IdleAdapters, scores: Floats) -> Iterator[int]:
        """Places in `idle`, the lowest score first: a few at once, then all others."""
        limit = np.inf if len(scores) <= _FEW else np.partition(scores, _FEW)[_FEW]
        for places in (np.flatnonzero(scores <= limit), np.flatnonzero(scores > limit)):
            slots, tie = idle.slots[places], self._rules.tie
            yield from places[self._table.ranked(slots, scores[places], tie=tie)].tolist()

    def _enter_idle(self, entry: CachedAdapter) -> None:
        self._idle[entry.adapter.digest] = entry
        self.evictable_blocks += entry.blocks
        self._table.set_idle(entry.slot, is_idle=True)

    def _leave_idle(self, entry: CachedAdapter) -> None:
        del self._idle[entry.adapter.digest]
        self.evictable_blocks -= entry.blocks
        self._table.set_idle(entry.slot, is_idle=False)


def _is_idle(entry: CachedAdapter) -> bool:
    return entry.is_loaded and entry.users == 0
