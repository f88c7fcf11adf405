"""Carries out what the core decides: messages to gateways and workers, spans and metrics.

Keeps the WorkItem of every queued request, and lets go of it with the decision that takes the
request out of the queue: once dispatched, the request is its gateway's to submit again. Dispatches
to one worker are gathered into one message until `flush`, or until an abort must not overtake them.
"""

from dataclasses import dataclass
from typing import Final, assert_never

from calumma.scheduler.v1 import scheduler_pb2
from services.common import telemetry
from services.core.decisions import (
    Abort,
    ClusterDecision,
    Dispatch,
    Forget,
    Prefetch,
    Reject,
    Return,
)
from services.core.types import Attempt, Request, WorkerId
from services.scheduler import wire
from services.scheduler.links import Links
from services.scheduler.metrics import SchedulerMetrics

SubmitResponse = scheduler_pb2.SubmitResponse
AttachResponse = scheduler_pb2.AttachResponse

BATCH_TOKENS_MAX: Final = 200_000  # at most 5 bytes each: within the smallest message limit


@dataclass(frozen=True, slots=True)
class _Payload:
    request: Request
    item: scheduler_pb2.WorkItem
    received_s: float


@dataclass(slots=True)
class _Batch:
    message: scheduler_pb2.DispatchBatch
    tokens: int = 0


class Performer:
    """Performs decisions in order. Never waits."""

    def __init__(
        self,
        gateways: Links[SubmitResponse],
        workers: Links[AttachResponse],
        *,
        policy: str,
        metrics: SchedulerMetrics,
    ) -> None:
        self._gateways = gateways
        self._workers = workers
        self._policy = policy
        self._metrics = metrics
        self._payloads: dict[Attempt, _Payload] = {}
        self._batches: dict[WorkerId, _Batch] = {}

    def __len__(self) -> int:
        return len(self._payloads)

    def keep(self, request: Request, item: scheduler_pb2.WorkItem, *, now: float) -> None:
        """Hold the payload of a request that the core is about to queue or reject."""
        self._payloads[request.attempt] = _Payload(request, item, now)

    def clear(self) -> None:
        """Forget every request."""
        self._payloads.clear()
        self._batches.clear()

    def perform(self, decision: ClusterDecision, *, now: float) -> None:
        """Do it, or drop it when its peer is gone: the core will hear of that."""
        match decision:
            case Dispatch():
                self._dispatch(decision, now=now)
            case Reject():
                self._reject(decision, now=now)
            case Return():
                self._return(decision)
            case Abort():
                self._abort(decision)
            case Forget():
                self._payloads.pop(decision.attempt, None)
            case Prefetch():
                adapters = [wire.from_adapter(adapter) for adapter in decision.adapters]
                hint = scheduler_pb2.PrefetchAdapters(adapters=adapters)
                self._workers.send(decision.worker_id, AttachResponse(prefetch=hint))
            case _:
                assert_never(decision)

    def flush(self) -> None:
        """Send the dispatches that were gathered."""
        for worker_id in tuple(self._batches):
            self._send_batch(worker_id)

    def _dispatch(self, decision: Dispatch, *, now: float) -> None:
        payload = self._payloads.pop(decision.attempt)
        request, item = payload.request, payload.item
        left_s = None if request.deadline_s is None else request.deadline_s - now
        wire.stamp_dispatch(item, queue_s=decision.queue_s, left_s=left_s)
        batch = self._batches.get(decision.worker_id)
        if batch is None:
            batch = self._batches[decision.worker_id] = _Batch(scheduler_pb2.DispatchBatch())
        batch.message.items.append(item)
        batch.tokens += len(item.token_ids)
        if batch.tokens >= BATCH_TOKENS_MAX:
            self._send_batch(decision.worker_id)
        placed = wire.from_dispatch(decision)
        self._gateways.send(request.gateway_id, SubmitResponse(placed=placed))
        self._metrics.record_dispatch(decision)
        self._trace(payload, now=now, dispatch=decision)

    def _reject(self, decision: Reject, *, now: float) -> None:
        payload = self._payloads.pop(decision.attempt, None)
        rejected = wire.from_rejection(decision)
        self._gateways.send(decision.gateway_id, SubmitResponse(rejected=rejected))
        self._metrics.rejections.add(1, {"calumma.reason": decision.reason})
        if payload is not None:
            self._trace(payload, now=now, error=decision.reason)

    def _return(self, decision: Return) -> None:
        returned = scheduler_pb2.RequestReturned(
            attempt=wire.from_attempt(decision.attempt), worker_id=decision.worker_id
        )
        self._gateways.send(decision.gateway_id, SubmitResponse(returned=returned))
        self._metrics.returns.add(1)

    def _abort(self, decision: Abort) -> None:
        self._send_batch(decision.worker_id)
        abort = scheduler_pb2.AbortRequest(
            attempt=wire.from_attempt(decision.attempt), cause=decision.cause
        )
        self._workers.send(decision.worker_id, AttachResponse(abort=abort))

    def _send_batch(self, worker_id: WorkerId) -> None:
        batch = self._batches.pop(worker_id, None)
        if batch is not None:
            self._workers.send(worker_id, AttachResponse(dispatch=batch.message))

    def _trace(
        self,
        payload: _Payload,
        *,
        now: float,
        dispatch: Dispatch | None = None,
        error: str | None = None,
    ) -> None:
        item = payload.item
        if not item.traceparent:
            return
        attributes: dict[str, str | int] = {
            "calumma.policy": self._policy,
            "calumma.request_id": item.request_id,
            "calumma.attempt": item.attempt,
            "sched.predicted_output_tokens": item.predicted_output_tokens,
            "sched.output_tokens_q90": payload.request.output_tokens_q90,
        }
        if dispatch is not None:
            attributes["calumma.worker_id"] = dispatch.worker_id
            attributes["calumma.queue"] = dispatch.queue
            attributes["calumma.waited_for"] = dispatch.waited_for
        telemetry.record_span(
            "queue",
            parent=telemetry.context_from(item.traceparent),
            start_s=payload.received_s,
            end_s=now,
            attributes=attributes,
            error=error,
        )
