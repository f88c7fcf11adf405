"""The shapes that `--json` prints: the fields of these classes, by name.

Fields are only ever added. Sizes are bytes, times are seconds, `null` means absent, dates are
RFC 3339 in UTC. Enum values are the proto's names in lower case without their prefix.
"""

from dataclasses import dataclass

from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2
from calumma.scheduler.v1 import scheduler_pb2
from calumma.worker.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class TimingsShape:
    """Where the time of a request went."""

    time_to_first_token_s: float | None
    queue_s: float | None
    adapter_load_s: float | None
    prefill_s: float | None
    decode_s: float | None
    adapter_tier: str


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What `generate` prints. `adapter_*` are null for the base model."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    adapter_name: str | None
    adapter_version: int | None
    adapter_digest: str | None
    prompt_tokens: int
    output_tokens: int
    predicted_output_tokens: int
    cached_prompt_tokens: int
    timings: TimingsShape
    worker_id: str
    seed: int
    resubmissions: int

    @classmethod
    def of(
        cls,
        started: gateway_pb2.GenerateStarted,
        completion: gateway_pb2.Completion,
        *,
        text: str,
        token_ids: tuple[int, ...],
    ) -> "AnswerShape":
        adapter = started.adapter if started.HasField("adapter") else None
        return cls(
            request_id=started.request_id,
            text=text,
            token_ids=token_ids,
            finish_reason=_enum(common_pb2.FinishReason.Name(completion.finish_reason)),
            adapter_name=adapter.name if adapter else None,
            adapter_version=adapter.version if adapter else None,
            adapter_digest=adapter.digest if adapter else None,
            prompt_tokens=completion.usage.prompt_tokens,
            output_tokens=completion.usage.output_tokens,
            predicted_output_tokens=completion.usage.predicted_output_tokens,
            cached_prompt_tokens=completion.usage.cached_prompt_tokens,
            timings=_timings(completion),
            worker_id=completion.worker_id,
            seed=completion.seed,
            resubmissions=completion.resubmissions,
        )


@dataclass(frozen=True, slots=True)
class HealthShape:
    """One service: "serving", "not_serving" or "unreachable"."""

    service: str
    address: str
    state: str


@dataclass(frozen=True, slots=True)
class QueueShape:
    """One queue of the scheduler."""

    name: str
    length: int
    oldest_s: float
    quota_tokens: float | None
    used_tokens: int
    size_limit: float | None

    @classmethod
    def of(cls, queue: scheduler_pb2.QueueState) -> "QueueShape":
        return cls(
            name=queue.name,
            length=queue.length,
            oldest_s=queue.oldest_s,
            quota_tokens=queue.quota_tokens if queue.HasField("quota_tokens") else None,
            used_tokens=queue.used_tokens,
            size_limit=queue.size_limit if queue.HasField("size_limit") else None,
        )


@dataclass(frozen=True, slots=True)
class TenantShape:
    """A tenant of the scheduler. `held` requests are kept out of the queues by its quotas."""

    tenant: str
    held: int
    running: int
    tokens_per_s: float
    available_tokens: float | None

    @classmethod
    def of(cls, tenant: scheduler_pb2.TenantState) -> "TenantShape":
        return cls(
            tenant=tenant.tenant,
            held=tenant.held,
            running=tenant.running,
            tokens_per_s=tenant.tokens_per_s,
            available_tokens=tenant.available_tokens
            if tenant.HasField("available_tokens")
            else None,
        )


@dataclass(frozen=True, slots=True)
class WaitShape:
    """A queued request and what it waits for. The oldest 100 are listed."""

    request_id: str
    queue: str
    waited_s: float
    waits_for: str


@dataclass(frozen=True, slots=True)
class ResidentShape:
    """An adapter that a worker holds. `name` is null when the store does not know the digest."""

    digest: str
    name: str | None
    tier: str  # the nearest that has all of it
    rank: int
    size_bytes: int
    users: int
    in_host: bool  # a copy is in host memory, too
    pin_reason: str | None  # null: it is not pinned
    ready_layers: int | None  # of a load under way, of `num_layers`; null: there is none
    num_layers: int | None


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a worker's adapter cache came to since it started."""

    hits: int
    misses: int
    hit_rate: float | None  # null: no request had an adapter
    evictions: int
    loaded_bytes: int  # from host to device memory
    downloaded_bytes: int  # from the store to host memory
    prefetches: int
    prefetch_hits: int
    prefetch_wastes: int

    @classmethod
    def of(cls, counts: worker_pb2.AdapterCacheCounts) -> "CacheShape":
        requests = counts.hits + counts.misses
        return cls(
            hits=counts.hits,
            misses=counts.misses,
            hit_rate=counts.hits / requests if requests else None,
            evictions=counts.evictions,
            loaded_bytes=counts.loaded_bytes,
            downloaded_bytes=counts.downloaded_bytes,
            prefetches=counts.prefetches,
            prefetch_hits=counts.prefetch_hits,
            prefetch_wastes=counts.prefetch_wastes,
        )


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """One model replica. Blocks are those of the memory pool."""

    worker_id: str
    address: str
    state: str  # "serving", "draining", "detached" or "unreachable"
    engine: str
    base_model: str
    running_requests: int
    loading_requests: int
    max_requests: int
    pool_blocks: int
    kv_blocks: int
    adapter_blocks: int
    block_bytes: int
    step_s: float
    output_tokens: int
    cache: CacheShape
    adapters: tuple[ResidentShape, ...]


@dataclass(frozen=True, slots=True)
class StatusShape:
    """What `status` prints; with `--watch` once per refresh."""

    healthy: bool
    services: tuple[HealthShape, ...]
    system: str
    policy: str
    gateways: int
    queues: tuple[QueueShape, ...]
    tenants: tuple[TenantShape, ...]
    queued: tuple[WaitShape, ...]
    workers: tuple[WorkerShape, ...]


def tier_name(tier: common_pb2.AdapterTier.ValueType) -> str:
    return _enum(common_pb2.AdapterTier.Name(tier))


def _timings(completion: gateway_pb2.Completion) -> TimingsShape:
    timings = completion.timings

    def stage(name: str) -> float | None:
        return getattr(timings, name) if timings.HasField(name) else None  # type: ignore[arg-type]

    has_first = completion.HasField("time_to_first_token_s")
    return TimingsShape(
        time_to_first_token_s=completion.time_to_first_token_s if has_first else None,
        queue_s=stage("queue_s"),
        adapter_load_s=stage("adapter_load_s"),
        prefill_s=stage("prefill_s"),
        decode_s=stage("decode_s"),
        adapter_tier=tier_name(timings.adapter_tier),
    )


def _enum(name: str) -> str:
    """`FINISH_REASON_STOP` → `stop`."""
    return name.removeprefix("FINISH_REASON_").removeprefix("ADAPTER_TIER_").lower()
