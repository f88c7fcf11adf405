"""What the machines show of themselves: plain values for reports, never read back by a decision."""

from dataclasses import dataclass
from typing import Literal

from services.core.events import ResidentAdapter
from services.core.types import Capacity, RequestId, TenantId, WorkerId

# Why a request waits. "prefill": the workers have prompts enough to compute; "quota": its queue has
# its share of the memory out; "tenant": its tenant has; "order": somebody goes before it.
WaitCause = Literal[
    "nothing",
    "no_worker",
    "memory",
    "adapter",
    "batch_slots",
    "prefill",
    "quota",
    "tenant",
    "order",
]


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """One of the policy's queues."""

    name: str
    length: int
    oldest_s: float  # how long its oldest request has waited; 0 when empty
    quota_tokens: float | None = None  # KV tokens it may have out; None: it has no quota
    used_tokens: int = 0  # KV tokens it has out, borrowed ones included
    size_limit: float | None = None  # sizes below it are queued here; None: there is no limit


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """A worker as the cluster sees it."""

    worker_id: WorkerId
    capacity: Capacity
    dispatched: int  # requests there, aborted ones included until they are reported finished
    reserved_blocks: int
    attached: bool
    draining: bool
    resident: tuple[ResidentAdapter, ...]


@dataclass(frozen=True, slots=True)
class QueuedSnapshot:
    """A waiting request, and why it waits."""

    request_id: RequestId
    queue: str
    waited_s: float
    waits_for: WaitCause


@dataclass(frozen=True, slots=True)
class TenantSnapshot:
    """A tenant's requests and what it took."""

    tenant_id: TenantId
    held: int  # requests that its quotas keep out of the queues
    running: int  # passed and not left: in a queue or at a worker
    tokens_per_s: float  # of requests that left in the last minute
    available_tokens: float  # in its bucket, negative in debt; inf without a rate


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """The state of the scheduler."""

    policy: str
    queues: tuple[QueueSnapshot, ...]
    workers: tuple[WorkerSnapshot, ...]
    queued: tuple[QueuedSnapshot, ...]  # the oldest 100
    gateways: int  # attached ones
    tenants: tuple[TenantSnapshot, ...] = ()


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """What a worker's adapter cache came to since it started. The counts only grow."""

    hits: int = 0  # admitted requests whose adapter was in device memory
    misses: int = 0  # admitted requests whose adapter was not, or still loading
    evictions: int = 0
    prefetches: int = 0  # loads begun ahead of any request that is here
    prefetch_hits: int = 0  # of those, used by a request
    prefetch_wastes: int = 0  # of those, gone without a use


@dataclass(frozen=True, slots=True)
class PrefixCounts:
    """What a worker's prefix cache came to since it started. The counts only grow."""

    queried_tokens: int = 0  # of contexts that requests began with
    hit_tokens: int = 0  # of those, that were there and not computed again
    evicted_blocks: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """What a worker holds. kv, prefix, adapter and free blocks add up to the pool."""

    kv_blocks: int  # of admitted requests
    adapter_blocks: int  # loading ones included
    free_blocks: int
    evictable_blocks: int  # of adapters and prefixes, that could be had at once
    running: int  # requests with an open sequence
    loading: int  # requests that wait for their adapter or for memory
    resident: tuple[ResidentAdapter, ...]
    cache: CacheCounts = CacheCounts()
    prefix_blocks: int = 0  # of cached prefixes that no request here uses
    prefix: PrefixCounts = PrefixCounts()
