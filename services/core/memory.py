"""A worker's device memory: who holds blocks, who was promised some, who must give way.

Joins the pool (held now), the ledger (promised) and the adapter cache. Evicting adapters is decided
here; preempting requests is the replica machine's decision.
"""

from collections.abc import Callable, Container, Iterable
from collections.abc import Sequence as Ordered
from typing import Final

from services.core.cache import AdapterCache, CachedAdapter, Urgency, Wanted
from services.core.decisions import EvictAdapter, EvictionReason, LoadAdapter
from services.core.eviction import EvictionPolicy
from services.core.ledger import Ledger
from services.core.pool import BlockPool
from services.core.sequence import Sequence
from services.core.types import Adapter, AdapterDigest, Capacity, Reserve

MemoryDecision = EvictAdapter | LoadAdapter

SPARE_NONE: Final[Urgency] = (-2, 0)  # even a pinned adapter may go
SPARE_WAITING: Final[Urgency] = (1, -1)  # hinted ones may go, not those that waiting requests want
SPARE_ALL: Final[Urgency] = (2, 0)  # no wanted adapter may go

_COOLING_MAX: Final = 1024


def pin_urgency(index: int) -> Urgency:
    """Of a pinned adapter."""
    return (-1, index)


def waiting_urgency(order: int) -> Urgency:
    """Of the adapter of a waiting request."""
    return (0, order)


def hint_urgency(index: int) -> Urgency:
    """Of an adapter that only requests elsewhere in the cluster's queue want."""
    return (1, index)


class CoolDown:
    """Adapters that are not to be loaded ahead for a while. Bounded: the oldest go first."""

    def __init__(self) -> None:
        self._until_s: dict[AdapterDigest, float] = {}

    def begin(self, digest: AdapterDigest, *, until_s: float, now: float) -> None:
        """Not before then."""
        self._until_s.pop(digest, None)
        self._until_s[digest] = until_s
        if len(self._until_s) > _COOLING_MAX:
            self._until_s = {one: at_s for one, at_s in self._until_s.items() if at_s > now}
        if len(self._until_s) > _COOLING_MAX:
            del self._until_s[next(iter(self._until_s))]

    def until_s(self, digest: AdapterDigest, *, now: float) -> float | None:
        """When it is over; None if it is."""
        at_s = self._until_s.get(digest)
        if at_s is not None and at_s <= now:
            del self._until_s[digest]
            return None
        return at_s


class DeviceMemory:
    """KV cache and adapters in one pool. `wanted` is asked only when memory is short."""

    def __init__(
        self,
        capacity: Capacity,
        policy: EvictionPolicy,
        *,
        wanted: Wanted,
        cool_down_s: float = 0.0,
    ) -> None:
        self.capacity = capacity
        self.pool = BlockPool(capacity.pool_blocks)
        self.ledger = Ledger(capacity)
        self.cache = AdapterCache(policy)
        self.near: frozenset[AdapterDigest] = frozenset()  # in host memory
        self.cool_down = CoolDown()  # of adapters whose memory the KV cache took
        self._cool_down_s = cool_down_s
        self._wanted = wanted

    def set_near(self, digests: frozenset[AdapterDigest]) -> None:
        """These are in host memory."""
        self.near = digests
        self.cache.set_near(digests)

    def promise(self, sequence: Sequence, reserve: Reserve, *, now: float) -> None:
        """Charge the sequence, and count it as a user of its adapter, which is here or loading."""
        need = sequence.need(self.capacity, reserve)
        sequence.promised_blocks = need.kv_blocks
        self.ledger.reserve(sequence.attempt, need)
        if sequence.digest is not None:
            self.cache.use(sequence.digest, now=now)

    def release(self, sequence: Sequence, *, now: float) -> None:
        """Take back all that an admitted sequence holds and was promised."""
        self.pool.return_kv(sequence.held_blocks)
        self.ledger.release(sequence.attempt)
        if sequence.digest is not None:
            self.cache.unuse(sequence.digest, now=now)

    def load(
        self,
        adapter: Adapter,
        *,
        spare: Urgency,
        now: float,
        is_ahead: bool = False,
        is_prefetch: bool = False,
        may_evict: Callable[[AdapterDigest], bool] | None = None,
    ) -> list[MemoryDecision] | None:
        """Begin to load an absent adapter; None when its blocks cannot be had.

        `is_ahead`: for a request that waits here; `is_prefetch`: for none that is here.
        `may_evict`: only such adapters go for it.
        """
        blocks = self.capacity.adapter_blocks(adapter)
        reason = EvictionReason.PREFETCH if is_prefetch else EvictionReason.ADAPTER
        evictions = self.make_room(blocks, spare=spare, reason=reason, may_evict=may_evict, now=now)
        if evictions is None:
            return None
        self.pool.hold_adapter(adapter.digest, blocks)
        near_load_s = now if adapter.digest in self.near else None
        self.cache.begin_load(
            CachedAdapter(
                adapter,
                blocks,
                last_used_s=now,
                is_ahead=is_ahead,
                near_load_s=near_load_s,
                began_s=now,
                is_prefetched=is_prefetch,
            )
        )
        return [*evictions, LoadAdapter(adapter)]

    def drop(self, digest: AdapterDigest) -> None:
        """The adapter's blocks are free again."""
        self.cache.remove(digest)
        self.pool.release_adapter(digest)

    def drop_abandoned(self, pinned: Container[AdapterDigest]) -> list[EvictAdapter]:
        """Evict every idle adapter that is neither pinned nor kept for a request to come."""
        abandoned = [digest for digest in self.cache.abandoned() if digest not in pinned]
        for digest in abandoned:
            self.drop(digest)
        return [EvictAdapter(digest, EvictionReason.ABANDONED) for digest in abandoned]

    def missing_blocks(self, sequence: Sequence, tokens: int) -> int:
        """Blocks that the sequence lacks to compute so many more tokens."""
        short_tokens = sequence.computed_tokens + tokens - sequence.held_tokens
        return max(0, self.capacity.kv_blocks(short_tokens))

    def obtainable_tokens(self, sequence: Sequence) -> int:
        """Tokens that the sequence could compute if every evictable adapter went."""
        blocks = self.pool.free_blocks + self.cache.evictable_blocks
        held_tokens = sequence.held_tokens - sequence.computed_tokens
        return held_tokens + blocks * self.capacity.block_tokens

    def grow(self, sequence: Sequence, tokens: int) -> None:
        """Give the sequence the blocks of its next tokens; there must be room."""
        more_blocks = self.missing_blocks(sequence, tokens)
        if more_blocks:
            self.add_blocks(sequence, more_blocks)

    def add_blocks(self, sequence: Sequence, blocks: int) -> None:
        """Give the sequence so many free blocks."""
        self.pool.take_kv(blocks)
        sequence.held_blocks += blocks
        sequence.held_tokens += blocks * self.capacity.block_tokens
        if sequence.held_blocks > sequence.promised_blocks:
            sequence.promised_blocks = sequence.held_blocks
            self.ledger.raise_to(sequence.attempt, sequence.held_blocks)

    def unpromised_blocks(self, kept: Iterable[AdapterDigest]) -> int:
        """Blocks neither promised to a request nor taken by a load or an idle adapter to keep."""
        kept_blocks = sum(
            self.cache.blocks_of(digest) for digest in kept if self.cache.is_evictable(digest)
        )
        return self.ledger.free_blocks - self.cache.unclaimed_loading_blocks() - kept_blocks

    def make_room(
        self,
        blocks: int,
        *,
        spare: Urgency,
        now: float,
        reason: EvictionReason = EvictionReason.KV,
        may_evict: Callable[[AdapterDigest], bool] | None = None,
    ) -> list[EvictAdapter] | None:
        """Evict until so many blocks are free; None, with nothing evicted, when impossible."""
        short_blocks = blocks - self.pool.free_blocks
        if short_blocks <= 0:
            return []
        if short_blocks > self.cache.evictable_blocks:
            return None
        chosen: list[AdapterDigest] = []
        for digest in self.cache.victims(self._wanted, spare=spare, now=now):
            if may_evict is not None and not may_evict(digest):
                continue
            chosen.append(digest)
            short_blocks -= self.cache.blocks_of(digest)
            if short_blocks <= 0:
                for victim in chosen:
                    self.drop(victim)
                    if reason is EvictionReason.KV:
                        until_s = now + self._cool_down_s
                        self.cool_down.begin(victim, until_s=until_s, now=now)
                return [EvictAdapter(victim, reason) for victim in chosen]
        return None

    def load_ahead(self, adapters: Ordered[Adapter], *, now: float) -> list[MemoryDecision]:
        """Keep these adapters, and load the absent ones that are near into free blocks.

        Nothing goes for them, and one block per admitted request stays free for its next tokens.
        """
        decisions: list[MemoryDecision] = []
        self.cache.keep_only({adapter.digest for adapter in adapters})
        for adapter in adapters:
            if adapter.digest in self.cache or adapter.digest not in self.near:
                continue
            blocks = self.capacity.adapter_blocks(adapter) + len(self.ledger)
            if blocks > self.pool.free_blocks:
                break
            loads = self.load(adapter, spare=SPARE_ALL, is_ahead=True, now=now)
            assert loads is not None
            decisions.extend(loads)
        return decisions

    def check_integrity(self) -> None:
        """Assert that pool, ledger and cache agree."""
        self.pool.check_integrity()
        self.ledger.check_integrity()
        self.cache.check_integrity()
        assert sum(entry.blocks for entry in self.cache) == self.pool.adapter_blocks
        for entry in self.cache:
            assert (entry.users > 0) == self.ledger.uses(entry.adapter.digest)
