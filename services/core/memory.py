"""A worker's device memory: who holds blocks, who was promised some, who must give way.

Joins the pool (held now), the ledger (promised) and the adapter cache. Evicting adapters is decided
here; preempting requests is the replica machine's decision.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from services.core.cache import AdapterCache, Urgency
from services.core.decisions import EvictAdapter, LoadAdapter
from services.core.eviction import EvictionPolicy
from services.core.ledger import Fit, Ledger
from services.core.pool import BlockPool
from services.core.sequence import Sequence
from services.core.types import Adapter, AdapterDigest, Capacity

MemoryDecision = EvictAdapter | LoadAdapter
Wanted = Callable[[], Mapping[AdapterDigest, Urgency]]

SPARE_NONE: Final[Urgency] = (-1, 0)  # even the most urgent wanted adapter may go
SPARE_ALL: Final[Urgency] = (2, 0)  # no wanted adapter may go


def waiting_urgency(order: int) -> Urgency:
    """Of the adapter of a waiting request."""
    return (0, order)


def hint_urgency(index: int) -> Urgency:
    """Of an adapter that only requests elsewhere in the cluster's queue want."""
    return (1, index)


class DeviceMemory:
    """KV cache and adapters in one pool. `wanted` is asked only when memory is short."""

    def __init__(self, capacity: Capacity, policy: EvictionPolicy, *, wanted: Wanted) -> None:
        self.capacity = capacity
        self.pool = BlockPool(capacity.pool_blocks)
        self.ledger = Ledger(capacity)
        self.cache = AdapterCache(policy)
        self._wanted = wanted

    def can_promise(self, sequence: Sequence) -> bool:
        """True if the ledger has room and a slot for the sequence.

        Loads that nobody uses yet hold blocks that cannot be had before they end.
        """
        out_of_reach = self.cache.unclaimed_loading_blocks(besides=sequence.digest)
        need = sequence.need(self.capacity)
        return self.ledger.fit(need, unavailable_blocks=out_of_reach) is Fit.FITS

    def promise(self, sequence: Sequence, *, now: float) -> None:
        """Charge the sequence, and count it as a user of its adapter, which is here or loading."""
        self.ledger.reserve(sequence.attempt, sequence.need(self.capacity))
        if sequence.digest is not None:
            self.cache.use(sequence.digest, now=now)

    def release(self, sequence: Sequence, *, now: float) -> None:
        """Take back all that an admitted sequence holds and was promised."""
        self.pool.release_kv(sequence.attempt)
        self.ledger.release(sequence.attempt)
        if sequence.digest is not None:
            self.cache.unuse(sequence.digest, now=now)

    def load(self, adapter: Adapter, *, spare: Urgency, now: float) -> list[MemoryDecision] | None:
        """Begin to load an absent adapter; None when its blocks cannot be had."""
        blocks = self.capacity.adapter_blocks(adapter)
        evictions = self.make_room(blocks, spare=spare, now=now)
        if evictions is None:
            return None
        self.pool.hold_adapter(adapter.digest, blocks)
        self.cache.begin_load(adapter, blocks, now=now)
        return [*evictions, LoadAdapter(adapter)]

    def drop(self, digest: AdapterDigest) -> None:
        """The adapter's blocks are free again."""
        self.cache.remove(digest)
        self.pool.release_adapter(digest)

    def missing_blocks(self, sequence: Sequence, tokens: int) -> int:
        """Blocks that the sequence lacks to compute so many more tokens."""
        blocks = self.capacity.kv_blocks(sequence.computed_tokens + tokens)
        return max(0, blocks - self.pool.kv_of(sequence.attempt))

    def obtainable_tokens(self, sequence: Sequence) -> int:
        """Tokens that the sequence could compute if every evictable adapter went."""
        blocks = self.pool.kv_of(sequence.attempt) + self.pool.free_blocks
        blocks += self.cache.evictable_blocks
        return blocks * self.capacity.block_tokens - sequence.computed_tokens

    def grow(self, sequence: Sequence, tokens: int) -> None:
        """Give the sequence the blocks of its next tokens; there must be room."""
        blocks = self.pool.kv_of(sequence.attempt) + self.missing_blocks(sequence, tokens)
        self.pool.grow_kv(sequence.attempt, to_blocks=blocks)
        self.ledger.raise_to(sequence.attempt, blocks)

    def unpromised_blocks(self, hints: Iterable[Adapter]) -> int:
        """Blocks neither promised to a request nor taken by a load or an idle hinted adapter."""
        hinted_blocks = sum(
            self.cache.blocks_of(hint.digest)
            for hint in hints
            if self.cache.is_evictable(hint.digest)
        )
        return self.ledger.free_blocks - self.cache.unclaimed_loading_blocks() - hinted_blocks

    def make_room(self, blocks: int, *, spare: Urgency, now: float) -> list[EvictAdapter] | None:
        """Evict until so many blocks are free; None, with nothing evicted, when impossible."""
        short_blocks = blocks - self.pool.free_blocks
        if short_blocks <= 0:
            return []
        chosen: list[AdapterDigest] = []
        for digest in self.cache.victims(self._wanted(), spare=spare, now=now):
            chosen.append(digest)
            short_blocks -= self.cache.blocks_of(digest)
            if short_blocks <= 0:
                for victim in chosen:
                    self.drop(victim)
                return [EvictAdapter(victim) for victim in chosen]
        return None

    def check_integrity(self) -> None:
        """Assert that pool, ledger and cache agree."""
        self.pool.check_integrity()
        self.ledger.check_integrity()
        self.cache.check_integrity()
        assert sum(entry.blocks for entry in self.cache) == self.pool.adapter_blocks
        for entry in self.cache:
            assert (entry.users > 0) == self.ledger.uses(entry.adapter.digest)
