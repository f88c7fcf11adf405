"""A worker's device memory: who holds blocks, who was promised some, who must give way.

Joins the pool (held now), the ledger (promised), the cache of adapters and that of prefixes. What
is evicted is decided here; preempting requests is the replica machine's decision.

Idle adapters and idle prefixes are in memory that nobody needs, and compete when it is short. Each
cache names what it would lose first: an adapter by the eviction policy, a leaf of the prefixes.
Then goes what saves less time per block,

    adapter: chance · (time of a miss + time to load it) / blocks
    leaf: chance · time to compute the tokens of a block

each chance being that of the next request to use it: what serves many stays, whichever it is, and
neither can push out all of the other unless it is worth more. Under `lru` the one goes that was not
used for longest. Adapters that somebody wants go after all prefixes. A load that no request waits
for, of what is only forecast, takes no prefix.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from collections.abc import Sequence as Ordered
from itertools import chain
from typing import Final

from services.core.cache import AdapterCache, CachedAdapter, Urgency, Wanted
from services.core.costs import StepCosts
from services.core.decisions import EvictAdapter, EvictionReason, LoadAdapter
from services.core.eviction import EvictionPolicy
from services.core.ledger import Ledger, Need
from services.core.pool import BlockPool
from services.core.prefix import CachedBlock, PrefixCache
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
        self.prefixes = PrefixCache(remembered_max=capacity.pool_blocks)
        self.prefill_token_s = StepCosts().prefill_token_s  # of a step, per token
        self._by_age = policy.rules.exchange == "age"
        self.near: frozenset[AdapterDigest] = frozenset()  # in host memory
        self.cool_down = CoolDown()  # of adapters whose memory the KV cache took
        self._cool_down_s = cool_down_s
        self._wanted = wanted

    def set_near(self, digests: frozenset[AdapterDigest]) -> None:
        """These are in host memory."""
        self.near = digests
        self.cache.set_near(digests)

    def promise(self, sequence: Sequence, reserve: Reserve, *, now: float) -> None:
        """Charge the sequence, and count it as a user of its adapter, which is here or loading.

        What is cached of its first tokens it has from now on.
        """
        need = sequence.need(self.capacity, reserve)
        sequence.promised_blocks = need.kv_blocks
        self.ledger.reserve(sequence.attempt, need)
        self.prefixes.note_request()
        if sequence.keys:
            self.use_prefix(sequence, least_tokens=1, now=now)
        if sequence.digest is not None:
            self.cache.use(sequence.digest, now=now)

    def need(self, sequence: Sequence, reserve: Reserve) -> Need:
        """What the sequence would be charged besides what others are charged for already."""
        need = sequence.need(self.capacity, reserve)
        if not sequence.keys:
            return need
        hits = self._hits(sequence, least_tokens=1)
        shared_blocks = sum(block.users > 0 for block in hits)
        return need._replace(kv_blocks=need.kv_blocks - shared_blocks) if shared_blocks else need

    def use_prefix(self, sequence: Sequence, *, least_tokens: int, now: float) -> None:
        """Let a sequence that has not begun have what is cached of its first tokens by now.

        At least so many tokens are left to compute.
        """
        hits = self._hits(sequence, least_tokens=least_tokens)
        if not hits:
            return
        self.prefixes.use(hits, now=now)
        sequence.cached += hits
        sequence.blocks += [hit.block for hit in hits]
        sequence.told_blocks = len(sequence.blocks)
        sequence.held_tokens = sequence.computed_tokens = (
            len(sequence.blocks) * self.capacity.block_tokens
        )
        self._share(sequence, len(hits))

    def list_prefix(self, sequence: Sequence, *, now: float) -> None:
        """List the sequence's blocks that are full, computed and have a key by now."""
        first = len(sequence.cached)
        if keys := self._keys_behind(sequence, first):
            self.prefixes.list_used(
                sequence.cached,
                sequence.blocks[first:],
                digest=sequence.digest,
                keys=keys,
                now=now,
            )
            self._share(sequence, len(sequence.cached) - first)

    def drop_prefixes(self, digest: AdapterDigest | None) -> None:
        """Nothing that was computed with this adapter is found again."""
        self.pool.return_kv(self.prefixes.drop(digest))

    def release(self, sequence: Sequence, *, now: float) -> None:
        """Take back all that an admitted sequence holds and was promised.

        What it has computed stays as long as there is room, as far as keys are known.
        """
        first = len(sequence.cached)
        free = self.prefixes.leave(
            sequence.cached,
            sequence.blocks[first:],
            digest=sequence.digest,
            keys=self._keys_behind(sequence, first),
            now=now,
        )
        self.pool.return_kv(free)
        self.ledger.release(sequence.attempt)
        self.ledger.charge_shared(self.prefixes.used_blocks)
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
        block_ids = self.pool.hold_adapter(adapter.digest, blocks)
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
        return [*evictions, LoadAdapter(adapter, block_ids)]

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

    @property
    def evictable_blocks(self) -> int:
        """Blocks that could be had at once from what nobody uses."""
        return self.cache.evictable_blocks + self.prefixes.idle_blocks

    def missing_blocks(self, sequence: Sequence, tokens: int) -> int:
        """Blocks that the sequence lacks to compute so many more tokens."""
        short_tokens = sequence.computed_tokens + tokens - sequence.held_tokens
        return max(0, self.capacity.kv_blocks(short_tokens))

    def obtainable_tokens(self, sequence: Sequence) -> int:
        """Tokens that the sequence could compute if all that is evictable went."""
        blocks = self.pool.free_blocks + self.evictable_blocks
        held_tokens = sequence.held_tokens - sequence.computed_tokens
        return held_tokens + blocks * self.capacity.block_tokens

    def add_blocks(self, sequence: Sequence, blocks: int) -> None:
        """Give the sequence so many free blocks."""
        sequence.blocks += self.pool.take_kv(blocks)
        sequence.held_tokens += blocks * self.capacity.block_tokens
        own_blocks = sequence.own_blocks
        if own_blocks > sequence.promised_blocks:
            sequence.promised_blocks = own_blocks
            self.ledger.raise_to(sequence.attempt, own_blocks)

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
        if short_blocks > self.evictable_blocks:
            return None
        victims = self.cache.victims(self._wanted, spare=spare, now=now)
        leaf_blocks = self.prefixes.idle_blocks
        if may_evict is not None:
            victims, leaf_blocks = filter(may_evict, victims), 0
        sure = self._enough(victims, short_blocks - leaf_blocks)
        if sure is None:
            return None
        adapters = chain(sure, victims)
        chosen = self._evict_least(adapters, short_blocks, has_leaves=leaf_blocks > 0, now=now)
        if reason is EvictionReason.KV:
            for victim in chosen:
                self.cool_down.begin(victim, until_s=now + self._cool_down_s, now=now)
        return [EvictAdapter(victim, reason) for victim in chosen]

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

    def leaked_blocks(self, admitted: Iterable[Sequence]) -> int:
        """Blocks of the pool that are neither free nor accounted for."""
        used = sum(sequence.own_blocks for sequence in admitted)
        used += self.prefixes.used_blocks + self.prefixes.idle_blocks
        used += sum(entry.blocks for entry in self.cache)
        return self.pool.blocks - self.pool.free_blocks - used

    def check_integrity(self, admitted: Ordered[Sequence]) -> None:
        """Assert that all books agree, and that every block has one place."""
        own = [block for one in admitted for block in one.blocks[len(one.cached) :]]
        self.pool.check_integrity([*own, *self.prefixes.held_blocks()])
        users = Counter(cached.block for one in admitted for cached in one.cached)
        self.prefixes.check_integrity(users)
        assert self.ledger.shared_blocks == self.prefixes.used_blocks
        assert self.leaked_blocks(admitted) == 0
        for one in admitted:
            assert one.own_blocks <= one.promised_blocks
            assert [cached.block for cached in one.cached] == one.blocks[: len(one.cached)]
        self.ledger.check_integrity()
        self.cache.check_integrity()
        assert sum(entry.blocks for entry in self.cache) == self.pool.adapter_blocks
        for entry in self.cache:
            assert (entry.users > 0) == self.ledger.uses(entry.adapter.digest)

    def _hits(self, sequence: Sequence, *, least_tokens: int) -> list[CachedBlock]:
        """What is cached of its first tokens, beyond what it has."""
        keys, cached = sequence.keys, sequence.cached
        if cached and not cached[-1].is_listed:
            return []
        end = (sequence.known_tokens - least_tokens) // self.capacity.block_tokens
        return self.prefixes.find(sequence.digest, keys, begin=len(cached), end=end)

    def _keys_behind(self, sequence: Sequence, blocks: int) -> tuple[bytes, ...]:
        """Of its computed blocks behind the first so many, full ones."""
        return sequence.keys[blocks : sequence.computed_tokens // self.capacity.block_tokens]

    def _share(self, sequence: Sequence, blocks: int) -> None:
        """So many more of the sequence's blocks are listed: their users are charged together."""
        sequence.promised_blocks -= blocks
        self.ledger.lower_by(sequence.attempt, blocks)
        self.ledger.charge_shared(self.prefixes.used_blocks)

    def _enough(self, victims: Iterator[AdapterDigest], blocks: int) -> list[AdapterDigest] | None:
        """The first of the victims that have so many blocks together; None if all have less."""
        enough: list[AdapterDigest] = []
        while blocks > 0:
            digest = next(victims, None)
            if digest is None:
                return None
            enough.append(digest)
            blocks -= self.cache.blocks_of(digest)
        return enough

    def _evict_least(
        self, adapters: Iterator[AdapterDigest], blocks: int, *, has_leaves: bool, now: float
    ) -> list[AdapterDigest]:
        """Evict adapters, in order, and leaves until so many blocks are free. Which adapters?"""
        chosen: list[AdapterDigest] = []
        digest = next(adapters, None)
        while blocks > 0:
            leaf = self.prefixes.next_leaf(by_age=self._by_age) if has_leaves else None
            if leaf is not None and (digest is None or self._goes_first(leaf, digest, now)):
                self.pool.return_kv([self.prefixes.evict(leaf)])
                blocks -= 1
                continue
            assert digest is not None
            chosen.append(digest)
            blocks -= self.cache.blocks_of(digest)
            digest = next(adapters, None) if blocks > 0 else None
        for victim in chosen:
            self.drop(victim)
        return chosen

    def _goes_first(self, leaf: CachedBlock, digest: AdapterDigest, now: float) -> bool:
        """Whether the leaf goes before the adapter, see the top of this module."""
        if self._wanted(digest) is not None:
            return True
        if self._by_age:
            return leaf.last_used_s <= self.cache.last_used_s(digest)
        leaf_s = self.prefixes.chance(leaf) * self.capacity.block_tokens * self.prefill_token_s
        return leaf_s <= self.cache.saved_s(digest, now=now)
