"""What a worker's memory is promised to: the arithmetic that both machines admit by.

A request is promised the KV blocks of its context and of the output still expected, and a batch
slot. Its adapter is charged to the first request that uses it and given back with the last, so
sharing is free (Chameleon does not say how a shared adapter is charged; S-LoRA counts the distinct
adapters of a batch). So it is with cached prefixes: a block that requests share is charged once, as
long as one of them uses it. What is in memory and nobody uses is not counted: it can be evicted.

The cluster machine keeps one ledger per worker and dispatches what fits; the replica machine admits
by a ledger of its own. Where the prediction held, what the first dispatches the second can start
at once. How much output is promised is the `Reserve` rule: the expected length, not the longest
one, because that is most of what the paper gains over S-LoRA, which reserves the maximum.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from services.core.types import Adapter, AdapterDigest, Attempt, Capacity, Request, Reserve


class Fit(StrEnum):
    """Whether a request can start, or what it lacks."""

    FITS = "fits"
    MEMORY = "memory"
    ADAPTER = "adapter"  # there is memory for its tokens, but not for its adapter
    BATCH_SLOTS = "batch_slots"
    PREFILL = "prefill"  # the worker has prompts enough to compute


class Need(NamedTuple):
    """What one request asks of a worker, in blocks."""

    kv_blocks: int
    adapter: AdapterDigest | None
    adapter_blocks: int


def need_of(request: Request, capacity: Capacity, reserve: Reserve) -> Need:
    """What the request is promised at a worker of this capacity."""
    tokens = request.context_tokens + request.reserved_output_tokens(reserve)
    return need_of_tokens(tokens, request.adapter, capacity)


def need_of_tokens(tokens: int, adapter: Adapter | None, capacity: Capacity) -> Need:
    """The need of a sequence that long, or as long as one can get, with that adapter."""
    tokens = min(tokens, capacity.max_context_tokens)
    if adapter is None:
        return Need(capacity.kv_blocks(tokens), None, 0)
    return Need(capacity.kv_blocks(tokens), adapter.digest, capacity.adapter_blocks(adapter))


def can_ever_fit(request: Request, capacity: Capacity) -> bool:
    """True if the request, alone and as long as it may become, fits the worker.

    The worst case, not the prediction: a request that is alone must be able to end. The engine ends
    a sequence at `max_context_tokens`.
    """
    if request.context_tokens > capacity.max_context_tokens:
        return False
    output_tokens = max(1, request.max_output_tokens - request.prior_output_tokens)
    need = need_of_tokens(request.context_tokens + output_tokens, request.adapter, capacity)
    return need.kv_blocks + need.adapter_blocks <= capacity.pool_blocks


def context_limit_tokens(adapter: Adapter | None, capacity: Capacity) -> int:
    """The longest context that fits the worker with that adapter; 0 if the adapter does not."""
    adapter_blocks = 0 if adapter is None else capacity.adapter_blocks(adapter)
    kv_tokens = max(0, capacity.pool_blocks - adapter_blocks) * capacity.block_tokens
    return min(capacity.max_context_tokens, kv_tokens)


@dataclass(slots=True)
class _Share:
    """An adapter in use."""

    blocks: int
    users: int


class Ledger:
    """Promises against one worker's capacity."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self._kv: dict[Attempt, tuple[int, AdapterDigest | None]] = {}
        self._shares: dict[AdapterDigest, _Share] = {}
        self._reserved_blocks = 0
        self._shared_blocks = 0

    def __len__(self) -> int:
        return len(self._kv)

    def __contains__(self, attempt: Attempt) -> bool:
        return attempt in self._kv

    @property
    def reserved_blocks(self) -> int:
        """Blocks promised. Above the pool's only through adopted or outgrown requests."""
        return self._reserved_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks not promised; negative when more was adopted than fits."""
        return self.capacity.pool_blocks - self._reserved_blocks

    @property
    def shared_blocks(self) -> int:
        """Blocks of KV cache that are charged once for all their users."""
        return self._shared_blocks

    def uses(self, digest: AdapterDigest) -> bool:
        """True while some request is charged for the adapter."""
        return digest in self._shares

    def fit(self, need: Need, *, unavailable_blocks: int = 0) -> Fit:
        """Whether the need can be promised now, with so many blocks out of reach."""
        if len(self._kv) >= self.capacity.max_requests:
            return Fit.BATCH_SLOTS
        spare_blocks = self.capacity.pool_blocks - self._reserved_blocks - unavailable_blocks
        spare_blocks -= need.kv_blocks
        if spare_blocks < 0:
            return Fit.MEMORY
        return Fit.FITS if self._uncharged_blocks(need) <= spare_blocks else Fit.ADAPTER

    def reserve(self, attempt: Attempt, need: Need) -> None:
        """Promise the need, whether or not it fits: the caller decides that."""
        assert attempt not in self._kv
        self._reserved_blocks += need.kv_blocks + self._uncharged_blocks(need)
        self._kv[attempt] = (need.kv_blocks, need.adapter)
        if need.adapter is None:
            return
        share = self._shares.setdefault(need.adapter, _Share(need.adapter_blocks, 0))
        share.blocks = max(share.blocks, need.adapter_blocks)
        share.users += 1

    def lower_by(self, attempt: Attempt, kv_blocks: int) -> None:
        """So many blocks of a request are shared now: they are charged once for all its users."""
        promised, adapter = self._kv[attempt]
        assert kv_blocks <= promised
        self._kv[attempt] = (promised - kv_blocks, adapter)
        self._reserved_blocks -= kv_blocks

    def charge_shared(self, blocks: int) -> None:
        """So many blocks of KV cache are in use by whom it may concern."""
        self._reserved_blocks += blocks - self._shared_blocks
        self._shared_blocks = blocks

    def raise_to(self, attempt: Attempt, kv_blocks: int) -> None:
        """Record that a request outgrew what it was promised."""
        promised, adapter = self._kv[attempt]
        if kv_blocks > promised:
            self._kv[attempt] = (kv_blocks, adapter)
            self._reserved_blocks += kv_blocks - promised

    def release(self, attempt: Attempt) -> None:
        """Take back a request's promise, and its adapter's with the last user."""
        kv_blocks, adapter = self._kv.pop(attempt)
        self._reserved_blocks -= kv_blocks
        if adapter is None:
            return
        share = self._shares[adapter]
        share.users -= 1
        if share.users == 0:
            del self._shares[adapter]
            self._reserved_blocks -= share.blocks

    def check_integrity(self) -> None:
        """Assert that the sums are those of the entries."""
        users: dict[AdapterDigest, int] = {}
        for _, adapter in self._kv.values():
            if adapter is not None:
                users[adapter] = users.get(adapter, 0) + 1
        assert users == {digest: share.users for digest, share in self._shares.items()}
        blocks = sum(kv for kv, _ in self._kv.values())
        blocks += sum(share.blocks for share in self._shares.values()) + self._shared_blocks
        assert blocks == self._reserved_blocks

    def _uncharged_blocks(self, need: Need) -> int:
        if need.adapter is None:
            return 0
        share = self._shares.get(need.adapter)
        return need.adapter_blocks if share is None else max(0, need.adapter_blocks - share.blocks)
