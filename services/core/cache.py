"""Adapters in a worker's device memory: loading, in use, wanted or idle.

Chameleon's cache (§4.2): no fixed size. An adapter that nobody uses stays in whatever blocks the KV
cache leaves, until memory forces it out. Who may be forced out:

1. in use by an admitted request, or still loading: never;
2. wanted by a waiting request or by a hint: last, the least urgent first (the paper gives no order
   among the wanted ones; the one that is needed latest goes first here);
3. idle: by the eviction policy's score.

This module keeps the entries and ranks victims. Blocks are counted by `services.core.pool`.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from services.core.events import ResidentAdapter
from services.core.eviction import EvictionPolicy, Usage
from services.core.types import Adapter, AdapterDigest

Urgency = tuple[int, int]  # smaller is more urgent


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

    @property
    def is_evictable(self) -> bool:
        """True unless someone uses it or its load is under way."""
        return self.is_loaded and self.users == 0


class AdapterCache:
    """The adapters that hold blocks of the pool."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._entries: dict[AdapterDigest, CachedAdapter] = {}
        self._loading: dict[AdapterDigest, CachedAdapter] = {}

    def __contains__(self, digest: AdapterDigest) -> bool:
        return digest in self._entries

    def __iter__(self) -> Iterator[CachedAdapter]:
        return iter(self._entries.values())

    def is_loaded(self, digest: AdapterDigest) -> bool:
        """True once its load has ended."""
        entry = self._entries.get(digest)
        return entry is not None and entry.is_loaded

    def is_evictable(self, digest: AdapterDigest) -> bool:
        """True if it is loaded and nobody uses it."""
        entry = self._entries.get(digest)
        return entry is not None and entry.is_evictable

    def blocks_of(self, digest: AdapterDigest) -> int:
        """Blocks that it holds."""
        return self._entries[digest].blocks

    @property
    def loading(self) -> int:
        """Loads under way."""
        return len(self._loading)

    def downloads(self, near: Container[AdapterDigest]) -> int:
        """Loads under way of adapters that are not near, in host memory."""
        return sum(digest not in near for digest in self._loading)

    @property
    def evictable_blocks(self) -> int:
        """Blocks that could be had by evicting every adapter that may be."""
        return sum(entry.blocks for entry in self if entry.is_evictable)

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

    def begin_load(self, adapter: Adapter, blocks: int, *, now: float) -> None:
        """A load starts; the adapter holds its blocks from now on."""
        assert adapter.digest not in self._entries
        entry = CachedAdapter(adapter, blocks, last_used_s=now)
        self._entries[adapter.digest] = self._loading[adapter.digest] = entry

    def end_load(self, digest: AdapterDigest) -> None:
        """The load succeeded."""
        self._loading.pop(digest).is_loaded = True

    def remove(self, digest: AdapterDigest) -> None:
        """It was evicted, or its load failed."""
        self._loading.pop(digest, None)
        entry = self._entries.pop(digest)
        assert entry.users == 0

    def use(self, digest: AdapterDigest, *, now: float) -> None:
        """An admitted request uses it: it stays until as many `unuse`."""
        entry = self._entries[digest]
        entry.users += 1
        entry.last_used_s = now
        self._count_use(entry, int(now // self._policy.window_s))

    def unuse(self, digest: AdapterDigest, *, now: float) -> None:
        """One user has left."""
        entry = self._entries[digest]
        assert entry.users > 0
        entry.users -= 1
        entry.last_used_s = now

    def victims(
        self, wanted: Mapping[AdapterDigest, Urgency], *, spare: Urgency, now: float
    ) -> list[AdapterDigest]:
        """Adapters that may go, first to go first; wanted ones only if less urgent than `spare`."""
        evictable = [entry for entry in self if entry.is_evictable]
        idle = [_usage(entry) for entry in evictable if entry.adapter.digest not in wanted]
        scores = self._policy.scores(idle, now=now)
        ranked = sorted(zip(scores, (usage.digest for usage in idle), strict=True))
        digests = (entry.adapter.digest for entry in evictable)
        late = [digest for digest in digests if wanted.get(digest, spare) > spare]
        late.sort(key=lambda digest: wanted[digest], reverse=True)
        return [digest for _, digest in ranked] + late

    def check_integrity(self) -> None:
        """Assert that counts are sound."""
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


def _usage(entry: CachedAdapter) -> Usage:
    return Usage(
        entry.adapter.digest,
        entry.blocks,
        entry.last_used_s,
        entry.window,
        entry.uses,
        entry.uses_before,
    )
