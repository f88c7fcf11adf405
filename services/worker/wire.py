"""The only place where proto becomes a value of this service, and back.

A work item was checked by the gateway and by the scheduler; it is checked again here, because one
bad number in a step would be everybody's problem.
"""

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Final, assert_never

from calumma.common.v1 import common_pb2
from calumma.scheduler.v1 import scheduler_pb2
from calumma.worker.v1 import worker_pb2
from services.common.errors import Reason, RpcError
from services.core.costs import StepCosts
from services.core.events import ResidentAdapter
from services.core.prefix_keys import block_keys, root_key
from services.core.snapshots import CacheCounts, PrefixCounts, ReplicaSnapshot
from services.core.types import (
    Adapter,
    AdapterDigest,
    Attempt,
    Capacity,
    GatewayId,
    Request,
    RequestId,
    TenantId,
)
from services.worker.engine import EngineInfo, Sampling
from services.worker.measures import Measures
from services.worker.outputs import Ending, Finish, Slice, Tier, Timings, TokenLogprobs
from services.worker.reports import Finished, Prefilled, Report, Started
from services.worker.requests import LiveRequest, Prefix, Work
from services.worker.residency import HeldAdapter
from services.worker.streams import Frame

ID_CHARACTERS_MAX: Final = 256
STOP_IDS_MAX: Final = 64
LOGPROBS_MAX: Final = 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

_FINISH: Final = {
    Finish.STOP: common_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    Finish.CANCELLED: common_pb2.FINISH_REASON_CANCELLED,
    Finish.ERROR: common_pb2.FINISH_REASON_ERROR,
}
_TIER: Final = {
    Tier.NONE: common_pb2.ADAPTER_TIER_NONE,
    Tier.DEVICE: common_pb2.ADAPTER_TIER_DEVICE,
    Tier.HOST: common_pb2.ADAPTER_TIER_HOST,
    Tier.STORE: common_pb2.ADAPTER_TIER_STORE,
}

# --- in ---------------------------------------------------------------------------------------


def attempt_from(message: scheduler_pb2.Attempt) -> Attempt:
    return Attempt(RequestId(message.request_id), message.attempt)


def item_attempt(item: scheduler_pb2.WorkItem) -> Attempt | None:
    """Who a work item is; None when nobody could be told of it."""
    named = 0 < len(item.request_id) <= ID_CHARACTERS_MAX
    owned = 0 < len(item.gateway_id) <= ID_CHARACTERS_MAX
    if not named or not owned or item.attempt < 1:
        return None
    return Attempt(RequestId(item.request_id), item.attempt)


def work_from(
    item: scheduler_pb2.WorkItem, info: EngineInfo, *, caches_prefixes: bool, now: float
) -> Work:
    """Check a work item. Raises RpcError with the field at fault."""
    tokens = len(item.token_ids)
    _check_tokens(item, info)
    stopping = item.stopping
    _require(stopping.max_tokens >= 1, "stopping.max_tokens", "must be at least 1")
    _require(stopping.min_tokens >= 0, "stopping.min_tokens", "must not be negative")
    _require(len(stopping.stop_token_ids) <= STOP_IDS_MAX, "stopping.stop_token_ids", "too many")
    stop_ids = frozenset(stopping.stop_token_ids)
    if not stopping.ignore_eos:
        stop_ids |= frozenset(info.eos_token_ids)
    time_left_s = item.time_left.ToNanoseconds() / 1e9 if item.HasField("time_left") else None
    adapter = adapter_from(item.adapter) if item.HasField("adapter") else None
    prefix = _prefix_of(adapter, item.tenant, info) if caches_prefixes else None
    request = Request(
        attempt=Attempt(RequestId(item.request_id), item.attempt),
        gateway_id=GatewayId(item.gateway_id),
        tenant_id=TenantId(item.tenant),
        adapter=adapter,
        context_tokens=tokens,
        prior_output_tokens=tokens - item.prompt_tokens,
        max_output_tokens=min(stopping.max_tokens, info.max_context_tokens - item.prompt_tokens),
        predicted_output_tokens=max(1, item.predicted_output_tokens),
        output_tokens_q90=max(1, item.output_tokens_q90 or item.predicted_output_tokens),
        priority=item.priority,
        arrived_s=now,
        deadline_s=None if time_left_s is None else now + time_left_s,
        prefix_keys=_prefix_keys(prefix, item.token_ids),
    )
    return Work(
        request=request,
        token_ids=tuple(item.token_ids),
        prompt_tokens=item.prompt_tokens,
        sampling=_sampling(item, stop_ids, info),
        stop_ids=stop_ids,
        min_tokens=stopping.min_tokens,
        traceparent=item.traceparent,
        queue_s=item.queue_s if math.isfinite(item.queue_s) else 0.0,
        prefix=prefix,
    )


def _prefix_of(adapter: Adapter | None, salt: str, info: EngineInfo) -> Prefix:
    """What was computed is shared within a tenant, by requests with the same adapter."""
    root = root_key(adapter.digest if adapter is not None else None, salt)
    return Prefix(root, info.block_tokens)


def _prefix_keys(prefix: Prefix | None, token_ids: Sequence[int]) -> tuple[bytes, ...]:
    if prefix is None:
        return ()
    return block_keys(prefix.root, token_ids, block_tokens=prefix.block_tokens)


def adapter_from(ref: common_pb2.AdapterRef) -> Adapter:
    """Raises RpcError."""
    _require(is_digest(ref.digest), "adapter.digest", 'must be "sha256:" and 64 hex digits')
    _require(ref.rank >= 1, "adapter.rank", "must be at least 1")
    _require(ref.size_bytes >= 1, "adapter.size_bytes", "must be at least 1")
    return Adapter(AdapterDigest(ref.digest), ref.rank, ref.size_bytes)


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def resume_from(request: worker_pb2.StreamTokensRequest) -> tuple[GatewayId, dict[Attempt, int]]:
    """Raises RpcError."""
    named = 0 < len(request.gateway_id) <= ID_CHARACTERS_MAX
    _require(named, "gateway_id", f"must have 1 to {ID_CHARACTERS_MAX} characters")
    points = {
        Attempt(RequestId(point.request_id), point.attempt): point.next_position
        for point in request.resume
    }
    return GatewayId(request.gateway_id), points


def _check_tokens(item: scheduler_pb2.WorkItem, info: EngineInfo) -> None:
    tokens = len(item.token_ids)
    if tokens == 0:
        raise RpcError(Reason.PROMPT_EMPTY, "there are no tokens", field="token_ids")
    _require(1 <= item.prompt_tokens <= tokens, "prompt_tokens", f"must be 1 to {tokens}")
    if item.prompt_tokens >= info.max_context_tokens or tokens > info.max_context_tokens:
        raise RpcError(
            Reason.PROMPT_TOO_LONG,
            f"{tokens} tokens leave no room in a context of {info.max_context_tokens}",
            field="token_ids",
        )
    in_range = min(item.token_ids) >= 0 and max(item.token_ids) < info.vocab_size
    _require(in_range, "token_ids", f"must be in 0 to {info.vocab_size - 1}")


def _sampling(item: scheduler_pb2.WorkItem, stop_ids: frozenset[int], info: EngineInfo) -> Sampling:
    params = item.sampling
    top_p = params.top_p if params.HasField("top_p") else 1.0
    has_repetition = params.HasField("repetition_penalty")
    repetition_penalty = params.repetition_penalty if has_repetition else 1.0
    for field, value, low, high in (
        ("temperature", params.temperature, 0.0, 2.0),
        ("top_p", top_p, sys.float_info.min, 1.0),
        ("top_k", params.top_k, 0, 1000),
        ("min_p", params.min_p, 0.0, 1.0),
        ("presence_penalty", params.presence_penalty, -2.0, 2.0),
        ("frequency_penalty", params.frequency_penalty, -2.0, 2.0),
        ("repetition_penalty", repetition_penalty, sys.float_info.min, 2.0),
    ):
        # NaN is in no range.
        _require(low <= value <= high, f"sampling.{field}", f"must be {low:g} to {high:g}")
    wants_logprobs = item.HasField("logprobs")
    logprobs_ok = not wants_logprobs or 0 <= item.logprobs <= LOGPROBS_MAX
    _require(logprobs_ok, "logprobs", f"must be 0 to {LOGPROBS_MAX}")
    in_vocabulary = (token_id for token_id in stop_ids if 0 <= token_id < info.vocab_size)
    return Sampling(
        temperature=params.temperature,
        top_p=top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=repetition_penalty,
        logprobs=item.logprobs if wants_logprobs else None,
        min_tokens=item.stopping.min_tokens,
        suppressed_ids=tuple(sorted(in_vocabulary)) if item.stopping.min_tokens else (),
    )


def _require(holds: bool, field: str, rule: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not holds:
        raise RpcError(Reason.INVALID_FIELD, f"{field} {rule}", field=field)


# --- out: tokens ------------------------------------------------------------------------------


def frame_to(frame: Frame) -> worker_pb2.StreamTokensResponse:
    requests = [_request_tokens(part) for part in frame.slices]
    requests += [_lost(attempt) for attempt in frame.lost]
    return worker_pb2.StreamTokensResponse(sequence=frame.sequence, requests=requests)


def _request_tokens(part: Slice) -> worker_pb2.RequestTokens:
    message = worker_pb2.RequestTokens(
        request_id=part.attempt.request_id,
        attempt=part.attempt.number,
        first_position=part.first_position,
        token_ids=part.token_ids,
        logprobs=[_position_logprobs(entry) for entry in part.logprobs],
    )
    if part.ending is not None:
        _set_ending(message, part.ending)
    return message


def _set_ending(message: worker_pb2.RequestTokens, ending: Ending) -> None:
    message.timings.CopyFrom(_timings(ending.timings))
    if ending.error is None:
        message.finish_reason = _FINISH[ending.finish]
    else:
        message.error.CopyFrom(ending.error.to_proto())


def _timings(timings: Timings) -> common_pb2.RequestTimings:
    return common_pb2.RequestTimings(
        queue_s=timings.queue_s,
        adapter_load_s=timings.adapter_load_s,
        prefill_s=timings.prefill_s,
        decode_s=timings.decode_s,
        adapter_tier=_TIER[timings.tier],
        cached_tokens=timings.cached_tokens,
    )


def _position_logprobs(entry: TokenLogprobs) -> common_pb2.PositionLogprobs:
    return common_pb2.PositionLogprobs(
        chosen=common_pb2.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob),
        top=[
            common_pb2.TokenLogprob(token_id=token_id, logprob=logprob)
            for token_id, logprob in entry.top
        ],
    )


def _lost(attempt: Attempt) -> worker_pb2.RequestTokens:
    error = RpcError(Reason.WORKER_LOST, "this worker does not know the request")
    return worker_pb2.RequestTokens(
        request_id=attempt.request_id, attempt=attempt.number, error=error.to_proto()
    )


# --- out: reports to the scheduler ------------------------------------------------------------


def attempt_to(attempt: Attempt) -> scheduler_pb2.Attempt:
    return scheduler_pb2.Attempt(request_id=attempt.request_id, attempt=attempt.number)


def report_to(report: Report) -> scheduler_pb2.AttachRequest:
    attempt = attempt_to(report.attempt)
    match report:
        case Started():
            return scheduler_pb2.AttachRequest(
                started=scheduler_pb2.RequestStarted(attempt=attempt)
            )
        case Prefilled():
            return scheduler_pb2.AttachRequest(
                prefilled=scheduler_pb2.RequestPrefilled(attempt=attempt)
            )
        case Finished(finish=finish, output_tokens=output_tokens):
            finished = scheduler_pb2.RequestFinished(
                attempt=attempt, finish_reason=_FINISH[finish], output_tokens=output_tokens
            )
            return scheduler_pb2.AttachRequest(finished=finished)
        case _:
            assert_never(report)


def capacity_to(capacity: Capacity) -> scheduler_pb2.WorkerCapacity:
    return scheduler_pb2.WorkerCapacity(
        pool_blocks=capacity.pool_blocks,
        block_bytes=capacity.block_bytes,
        block_tokens=capacity.block_tokens,
        max_requests=capacity.max_requests,
        max_context_tokens=capacity.max_context_tokens,
    )


def running_to(live: LiveRequest) -> scheduler_pb2.RunningRequest:
    request, output = live.work.request, live.output
    return scheduler_pb2.RunningRequest(
        attempt=attempt_to(request.attempt),
        gateway_id=request.gateway_id,
        adapter_digest=live.work.digest or "",
        context_tokens=request.context_tokens + len(output.token_ids),
        predicted_output_tokens=request.predicted_output_tokens,
        generated_tokens=output.end_position,
    )


def status_to(
    snapshot: ReplicaSnapshot, *, draining: bool, step_s: float, costs: StepCosts | None
) -> scheduler_pb2.WorkerStatus:
    return scheduler_pb2.WorkerStatus(
        free_blocks=snapshot.free_blocks + snapshot.evictable_blocks,
        running_requests=snapshot.running,
        loading_requests=snapshot.loading,
        resident=[
            scheduler_pb2.ResidentAdapter(
                digest=it.digest,
                blocks=it.blocks,
                users=it.users,
                size_bytes=it.size_bytes,
                pin_reason=it.pin_reason,
            )
            for it in snapshot.resident
        ],
        draining=draining,
        step_s=step_s,
        costs=None if costs is None else scheduler_pb2.StepCosts(**asdict(costs)),
    )


def host_cache_to(adapters: Iterable[Adapter]) -> scheduler_pb2.HostCache:
    return scheduler_pb2.HostCache(
        adapters=[
            scheduler_pb2.HostAdapter(digest=it.digest, size_bytes=it.size_bytes) for it in adapters
        ]
    )


# --- out: this worker's state -----------------------------------------------------------------


def adapter_states_to(
    held: Mapping[AdapterDigest, HeldAdapter],
    resident: Sequence[ResidentAdapter],
    *,
    num_layers: int,
) -> list[worker_pb2.AdapterState]:
    on_device = {it.digest: it for it in resident}
    states: list[worker_pb2.AdapterState] = []
    for digest, it in held.items():
        state = worker_pb2.AdapterState(
            digest=digest,
            tier=_TIER[it.tier],
            rank=it.adapter.rank,
            size_bytes=it.adapter.size_bytes,
            in_host=it.in_host,
        )
        if (known := on_device.get(digest)) is not None:
            state.users = known.users
            state.pin_reason = known.pin_reason
        if it.ready_layers is not None:
            state.ready_layers = it.ready_layers
            state.num_layers = num_layers
        states.append(state)
    return states


def prefix_counts_to(counts: PrefixCounts) -> worker_pb2.PrefixCacheCounts:
    return worker_pb2.PrefixCacheCounts(
        queried_tokens=counts.queried_tokens,
        hit_tokens=counts.hit_tokens,
        evicted_blocks=counts.evicted_blocks,
    )


def cache_counts_to(measures: Measures, counts: CacheCounts) -> worker_pb2.AdapterCacheCounts:
    return worker_pb2.AdapterCacheCounts(
        hits=measures.hits,
        misses=measures.misses,
        evictions=measures.evictions,
        loaded_bytes=measures.loaded_bytes,
        downloaded_bytes=measures.downloaded_bytes,
        prefetches=counts.prefetches,
        prefetch_hits=counts.prefetch_hits,
        prefetch_wastes=counts.prefetch_wastes,
    )
