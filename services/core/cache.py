"""Adapters in a worker's device memory: loading, in use, wanted or idle.

Chameleon's cache (§4.2): no fixed size. An adapter that nobody uses stays in whatever blocks the KV
cache leaves, until memory forces it out. Who may be forced out:

1. in use by an admitted request, or still loading: never;
2. wanted by a waiting request or by a hint: last, the least urgent first (the paper gives no order
   among the wanted ones; the one that is needed latest goes first here);
3. idle: by the eviction policy's score.

This module keeps the entries and ranks victims. Blocks are counted by `services.core.pool`.
"""

import heapq
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from services.core.events import ResidentAdapter
from services.core.eviction import EvictionPolicy, Usage
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
    window: int = 0
    uses: int = 0
    uses_before: int = 0
    is_ahead: bool = False  # kept or loaded for a request that has not been admitted
    near_load_s: float | None = None  # when its load from host memory began; None: a download


class AdapterCache:
    """The adapters that hold blocks of the pool."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._entries: dict[AdapterDigest, CachedAdapter] = {}
        self._loading: dict[AdapterDigest, CachedAdapter] = {}
        self._idle: dict[AdapterDigest, CachedAdapter] = {}  # loaded, without a user: evictable
        self.evictable_blocks = 0  # that could be had by evicting every adapter that may be
        self.used_blocks = 0  # of adapters with a user, loading ones included

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

    def resident(self) -> tuple[ResidentAdapter, ...]:
        """What is loaded, for a report."""
        return tuple(
            ResidentAdapter(digest, entry.blocks, entry.users)
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

    def end_load(self, digest: AdapterDigest) -> CachedAdapter:
        """The load succeeded."""
        entry = self._loading.pop(digest)
        entry.is_loaded = True
        if entry.users == 0:
            self._idle[digest] = entry
            self.evictable_blocks += entry.blocks
        return entry

    def remove(self, digest: AdapterDigest) -> None:
        """It was evicted, or its load failed."""
        self._loading.pop(digest, None)
        entry = self._entries.pop(digest)
        assert entry.users == 0
        if self._idle.pop(digest, None) is not None:
            self.evictable_blocks -= entry.blocks

    def use(self, digest: AdapterDigest, *, now: float) -> None:
        """An admitted request uses it: it stays until as many `unuse`."""
        entry = self._entries[digest]
        if entry.users == 0:
            self.used_blocks += entry.blocks
            if self._idle.pop(digest, None) is not None:
                self.evictable_blocks -= entry.blocks
        entry.users += 1
        entry.is_ahead = False
        entry.last_used_s = now
        self._count_use(entry, int(now // self._policy.window_s))

    def unuse(self, digest: AdapterDigest, *, now: float) -> None:
        """One user has left."""
        entry = self._entries[digest]
        assert entry.users > 0
        entry.users -= 1
        entry.last_used_s = now
        if entry.users == 0:
            self.used_blocks -= entry.blocks
            if entry.is_loaded:
                self._idle[digest] = entry
                self.evictable_blocks += entry.blocks

    def victims(self, wanted: Wanted, *, spare: Urgency, now: float) -> Iterator[AdapterDigest]:
        """Adapters that may go, first to go first; wanted ones only if less urgent than `spare`."""
        idle: list[Usage] = []
        late: list[tuple[Urgency, AdapterDigest]] = []
        for digest, entry in self._idle.items():
            urgency = wanted(digest)
            if urgency is None:
                idle.append(_usage(entry))
            elif urgency > spare:
                late.append((urgency, digest))
        scores = self._policy.scores(idle, now=now)
        ranked = list(zip(scores, (usage.digest for usage in idle), strict=True))
        heapq.heapify(ranked)  # few are asked for, so not sorted
        while ranked:
            yield heapq.heappop(ranked)[1]
        for _, digest in sorted(late, reverse=True):
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

    def _count_use(self, entry: CachedAdapter, window: int) -> None:
        if window != entry.window:
            entry.uses_before = entry.uses if window == entry.window + 1 else 0
            entry.window, entry.uses = window, 0
        entry.uses += 1


def _is_idle(entry: CachedAdapter) -> bool:
    return entry.is_loaded and entry.users == 0


def _usage(entry: CachedAdapter) -> Usage:
    return Usage(
        entry.adapter.digest,
        entry.blocks,
        entry.last_used_s,
        entry.window,
        entry.uses,
        entry.uses_before,
    )
