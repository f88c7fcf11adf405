"""Protobuf to the gateway's own values and back. Parsing of client requests is in `parse`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from google.protobuf import duration_pb2

from calumma.adapter_store.v1 import adapter_store_pb2
from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2
from calumma.scheduler.v1 import scheduler_pb2
from calumma.worker.v1 import worker_pb2
from services.common.errors import Reason, RpcError
from services.core.types import Attempt, RequestId
from services.gateway.requests import OwnedRequest, Placement
from services.gateway.types import (
    AdapterEntry,
    AdapterRef,
    Canary,
    Finish,
    Piece,
    PositionLogprobs,
    Sampling,
    Timings,
    TokenLogprob,
    TokenRun,
)

TokenText = Callable[[int], str]

_FINISH: Final = {
    common_pb2.FINISH_REASON_UNSPECIFIED: None,
    common_pb2.FINISH_REASON_STOP: Finish.STOP,
    common_pb2.FINISH_REASON_LENGTH: Finish.LENGTH,
    common_pb2.FINISH_REASON_CANCELLED: Finish.CANCELLED,
    common_pb2.FINISH_REASON_ERROR: Finish.ERROR,
}
_FINISH_REASON: Final = {finish: reason for reason, finish in _FINISH.items()}
_TIER_NAMES: Final = {
    common_pb2.ADAPTER_TIER_DEVICE: "device",
    common_pb2.ADAPTER_TIER_HOST: "host",
    common_pb2.ADAPTER_TIER_STORE: "store",
}

# --- adapters -----------------------------------------------------------------------------------


def read_adapter_ref(ref: common_pb2.AdapterRef) -> AdapterRef:
    return AdapterRef(ref.digest, ref.name, ref.version, ref.rank, ref.size_bytes)


def adapter_ref(ref: AdapterRef | None) -> common_pb2.AdapterRef | None:
    if ref is None:
        return None
    return common_pb2.AdapterRef(
        digest=ref.digest,
        name=ref.name,
        version=ref.version,
        rank=ref.rank,
        size_bytes=ref.size_bytes,
    )


def pack_adapter(adapter: adapter_store_pb2.Adapter) -> bytes:
    """What a gateway needs of an adapter, in a few hundred bytes that `unpack_adapter` reads."""
    lean = adapter_store_pb2.Adapter(
        versions=[
            adapter_store_pb2.AdapterVersion(ref=version.ref) for version in adapter.versions
        ],
        aliases=adapter.aliases,
        revision=adapter.revision,
        tenants=adapter.tenants,
    )
    for alias, canary in adapter.canaries.items():
        lean.canaries[alias].CopyFrom(canary)
    for version in lean.versions:
        version.ref.ClearField("name")
    return lean.SerializeToString()


def unpack_adapter(name: str, packed: bytes) -> AdapterEntry:
    """Read what `pack_adapter` made."""
    adapter = adapter_store_pb2.Adapter.FromString(packed)
    refs = [version.ref for version in adapter.versions]
    return AdapterEntry(
        name=name,
        revision=adapter.revision,
        versions={
            ref.version: AdapterRef(ref.digest, name, ref.version, ref.rank, ref.size_bytes)
            for ref in refs
        },
        aliases=dict(adapter.aliases),
        canaries={
            alias: Canary(canary.version, canary.percent)
            for alias, canary in adapter.canaries.items()
        },
        tenants=frozenset(adapter.tenants),
    )


# --- scheduler ----------------------------------------------------------------------------------


def read_attempt(attempt: scheduler_pb2.Attempt) -> Attempt:
    return Attempt(RequestId(attempt.request_id), attempt.attempt)


def attempt(value: Attempt) -> scheduler_pb2.Attempt:
    return scheduler_pb2.Attempt(request_id=value.request_id, attempt=value.number)


def read_placement(placed: scheduler_pb2.RequestPlaced) -> Placement:
    return Placement(placed.worker_id, placed.queue_s, placed.queue, placed.waited_for)


def hello(gateway_id: str, placed: Iterable[OwnedRequest]) -> scheduler_pb2.SubmitRequest:
    requests = [
        scheduler_pb2.PlacedRequest(
            attempt=attempt(request.attempt), worker_id=request.worker_id or ""
        )
        for request in placed
    ]
    return scheduler_pb2.SubmitRequest(
        hello=scheduler_pb2.GatewayHello(gateway_id=gateway_id, placed=requests)
    )


def cancel(value: Attempt, cause: str) -> scheduler_pb2.SubmitRequest:
    return scheduler_pb2.SubmitRequest(
        cancel=scheduler_pb2.CancelRequest(attempt=attempt(value), cause=cause)
    )


def submit(request: OwnedRequest, gateway_id: str, now_s: float) -> scheduler_pb2.SubmitRequest:
    """The request as it is now: prompt, tokens so far and the time that is left."""
    admitted = request.admitted
    spec = admitted.spec
    item = scheduler_pb2.WorkItem(
        request_id=admitted.wire_id,
        attempt=request.number,
        token_ids=(*admitted.prompt_token_ids, *request.output),
        prompt_tokens=len(admitted.prompt_token_ids),
        adapter=adapter_ref(admitted.adapter),
        sampling=_sampling(spec.sampling, admitted.seed),
        stopping=common_pb2.StopConditions(
            max_tokens=admitted.max_tokens,
            min_tokens=spec.stopping.min_tokens,
            stop_token_ids=spec.stopping.stop_token_ids,
            ignore_eos=spec.stopping.ignore_eos,
        ),
        logprobs=spec.logprobs,
        priority=spec.priority,
        tenant=admitted.tenant,
        predicted_output_tokens=admitted.prediction.tokens,
        output_tokens_q90=admitted.prediction.q90_tokens,
        waited_s=request.waited_s(now_s),
        time_left=_duration(admitted.deadline_s - now_s),
        gateway_id=gateway_id,
        traceparent=admitted.traceparent,
    )
    return scheduler_pb2.SubmitRequest(submit=item)


def _sampling(sampling: Sampling, seed: int) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=seed,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(max(0, int(seconds * 1e9)))
    return duration


# --- worker -------------------------------------------------------------------------------------


def stream_tokens(
    gateway_id: str, placed: Iterable[OwnedRequest]
) -> worker_pb2.StreamTokensRequest:
    resume = [
        worker_pb2.ResumePoint(
            request_id=request.admitted.wire_id,
            attempt=request.number,
            next_position=len(request.output),
        )
        for request in placed
    ]
    return worker_pb2.StreamTokensRequest(gateway_id=gateway_id, resume=resume)


def read_token_run(tokens: worker_pb2.RequestTokens) -> TokenRun:
    error = RpcError.from_proto(tokens.error) if tokens.HasField("error") else None
    if min(tokens.token_ids, default=0) < 0 or tokens.first_position < 0:
        error = RpcError(Reason.INTERNAL, "the worker sent tokens that can't be", stage="decode")
    return TokenRun(
        request_id=tokens.request_id,
        attempt=tokens.attempt,
        first_position=tokens.first_position,
        token_ids=tuple(tokens.token_ids),
        logprobs=tuple(_read_position(position) for position in tokens.logprobs),
        finish=_FINISH.get(tokens.finish_reason, Finish.ERROR),
        timings=_read_timings(tokens.timings),
        error=error,
    )


def _read_position(position: common_pb2.PositionLogprobs) -> PositionLogprobs:
    chosen, *top = (
        TokenLogprob(token.token_id, token.logprob) for token in (position.chosen, *position.top)
    )
    return PositionLogprobs(chosen, tuple(top))


def tier_name(tier: int) -> str:
    """Where a request found its adapter, for a label; "unknown" of one that did not get so far."""
    return _TIER_NAMES.get(common_pb2.AdapterTier.ValueType(tier), "unknown")


def _read_timings(timings: common_pb2.RequestTimings) -> Timings:
    return Timings(
        queue_s=timings.queue_s if timings.HasField("queue_s") else None,
        adapter_load_s=timings.adapter_load_s if timings.HasField("adapter_load_s") else None,
        prefill_s=timings.prefill_s if timings.HasField("prefill_s") else None,
        decode_s=timings.decode_s if timings.HasField("decode_s") else None,
        adapter_tier=timings.adapter_tier,
        cached_tokens=timings.cached_tokens if timings.HasField("cached_tokens") else None,
    )


# --- client -------------------------------------------------------------------------------------


def started(request: OwnedRequest) -> gateway_pb2.GenerateStreamResponse:
    return gateway_pb2.GenerateStreamResponse(
        started=gateway_pb2.GenerateStarted(
            request_id=request.admitted.client_id,
            adapter=adapter_ref(request.admitted.adapter),
            prompt_tokens=len(request.admitted.prompt_token_ids),
        )
    )


def chunk(piece: Piece, token_text: TokenText) -> gateway_pb2.GenerateStreamResponse:
    return gateway_pb2.GenerateStreamResponse(
        chunk=gateway_pb2.GenerateChunk(
            text=piece.text,
            token_ids=piece.token_ids,
            logprobs=_logprobs(piece.logprobs, token_text),
        )
    )


def finished(request: OwnedRequest) -> gateway_pb2.GenerateStreamResponse:
    return gateway_pb2.GenerateStreamResponse(finished=_completion(request))


def response(
    request: OwnedRequest, piece: Piece, token_text: TokenText
) -> gateway_pb2.GenerateResponse:
    return gateway_pb2.GenerateResponse(
        request_id=request.admitted.client_id,
        adapter=adapter_ref(request.admitted.adapter),
        text=piece.text,
        token_ids=piece.token_ids,
        logprobs=_logprobs(piece.logprobs, token_text),
        completion=_completion(request),
    )


def _completion(request: OwnedRequest) -> gateway_pb2.Completion:
    admitted = request.admitted
    stages = request.stages
    return gateway_pb2.Completion(
        finish_reason=_FINISH_REASON[request.finish],
        usage=gateway_pb2.Usage(
            prompt_tokens=len(admitted.prompt_token_ids),
            output_tokens=len(request.output),
            predicted_output_tokens=admitted.prediction.tokens,
            cached_prompt_tokens=min(stages.cached_tokens or 0, len(admitted.prompt_token_ids)),
        ),
        timings=common_pb2.RequestTimings(
            queue_s=stages.queue_s,
            adapter_load_s=stages.adapter_load_s,
            prefill_s=stages.prefill_s,
            decode_s=stages.decode_s,
            adapter_tier=common_pb2.AdapterTier.ValueType(stages.adapter_tier),
            cached_tokens=stages.cached_tokens,
        ),
        time_to_first_token_s=request.time_to_first_token_s,
        worker_id=request.worker_id or "",
        seed=admitted.seed,
        resubmissions=request.number - 1,
    )


def _logprobs(
    positions: Sequence[PositionLogprobs], token_text: TokenText
) -> list[common_pb2.PositionLogprobs]:
    def token(value: TokenLogprob) -> common_pb2.TokenLogprob:
        return common_pb2.TokenLogprob(
            token_id=value.token_id, logprob=value.logprob, text=token_text(value.token_id)
        )

    return [
        common_pb2.PositionLogprobs(
            chosen=token(position.chosen), top=[token(other) for other in position.top]
        )
        for position in positions
    ]
