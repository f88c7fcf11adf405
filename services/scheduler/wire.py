"""Between the messages of `calumma.scheduler.v1` and the core's types. Nothing else converts.

A deadline crosses the wire as time left, because clocks differ between machines: it becomes an
instant of this process's monotonic clock on receipt, and time left again on dispatch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from calumma.common.v1 import common_pb2
from calumma.scheduler.v1 import scheduler_pb2
from services.common.errors import Reason, RpcError
from services.core import events
from services.core.costs import StepCosts
from services.core.decisions import Dispatch, Reject, RejectReason
from services.core.snapshots import (
    ClusterSnapshot,
    QueueSnapshot,
    TenantSnapshot,
    WorkerSnapshot,
)
from services.core.types import (
    Adapter,
    AdapterDigest,
    Attempt,
    Capacity,
    GatewayId,
    Request,
    RequestId,
    TenantId,
    WorkerId,
)

_REJECTIONS: Final[dict[RejectReason, str]] = {
    RejectReason.DEADLINE: "the deadline passed while the request was queued",
    RejectReason.DEADLINE_UNREACHABLE: "the request is not expected to end before its deadline",
    RejectReason.TENANT_QUOTA: "the tenant has as many requests or tokens as its quota allows",
    RejectReason.QUEUE_FULL: "the queue is full",
    RejectReason.NO_WORKER: "no worker is available",
    RejectReason.TOO_LARGE: "prompt, output and adapter need more memory than any worker has",
}


@dataclass(frozen=True, slots=True)
class WorkerReports:
    """What the core need not know of a worker: where it is, and its last reports as they came."""

    address: str
    status: scheduler_pb2.WorkerStatus
    host_cache: scheduler_pb2.HostCache


def to_attempt(attempt: scheduler_pb2.Attempt) -> Attempt:
    """The core's name of one run of a request."""
    return Attempt(RequestId(attempt.request_id), attempt.attempt)


def from_attempt(attempt: Attempt) -> scheduler_pb2.Attempt:
    """The wire's name of one run of a request."""
    return scheduler_pb2.Attempt(request_id=attempt.request_id, attempt=attempt.number)


def to_request(item: scheduler_pb2.WorkItem, *, now: float) -> Request:
    """What the core knows of a valid WorkItem that arrived at `now`."""
    return Request(
        attempt=Attempt(RequestId(item.request_id), item.attempt),
        gateway_id=GatewayId(item.gateway_id),
        tenant_id=TenantId(item.tenant),
        adapter=_to_adapter(item.adapter) if item.HasField("adapter") else None,
        context_tokens=len(item.token_ids),
        prior_output_tokens=len(item.token_ids) - item.prompt_tokens,
        max_output_tokens=item.stopping.max_tokens,
        predicted_output_tokens=item.predicted_output_tokens,
        output_tokens_q90=item.output_tokens_q90 or item.predicted_output_tokens,
        priority=item.priority,
        arrived_s=now - item.waited_s,
        deadline_s=now + item.time_left.ToNanoseconds() / 1e9
        if item.HasField("time_left")
        else None,
    )


def stamp_dispatch(item: scheduler_pb2.WorkItem, *, queue_s: float, left_s: float | None) -> None:
    """Write into a WorkItem what its worker must know of the time that passed here."""
    item.queue_s = queue_s
    if left_s is not None:
        item.time_left.FromNanoseconds(max(0, int(left_s * 1e9)))


def from_adapter(adapter: Adapter) -> common_pb2.AdapterRef:
    """An adapter as a worker fetches it: by digest."""
    return common_pb2.AdapterRef(
        digest=adapter.digest, rank=adapter.rank, size_bytes=adapter.size_bytes
    )


def to_gateway_attached(hello: scheduler_pb2.GatewayHello) -> events.GatewayAttached:
    """A gateway's hello."""
    placed = tuple(
        (to_attempt(placed.attempt), WorkerId(placed.worker_id)) for placed in hello.placed
    )
    return events.GatewayAttached(GatewayId(hello.gateway_id), placed)


def to_worker_attached(hello: scheduler_pb2.WorkerHello) -> events.WorkerAttached:
    """A worker's hello."""
    return events.WorkerAttached(
        worker_id=WorkerId(hello.worker_id),
        capacity=_to_capacity(hello.capacity),
        running=tuple(_to_running(running) for running in hello.running),
        resident=_to_resident(hello.status),
        draining=hello.status.draining,
    )


def to_worker_reported(
    worker_id: WorkerId, status: scheduler_pb2.WorkerStatus
) -> events.WorkerReported:
    """A worker's status."""
    costs = _to_costs(status.costs) if status.HasField("costs") else None
    return events.WorkerReported(worker_id, _to_resident(status), status.draining, costs)


def from_dispatch(dispatch: Dispatch) -> scheduler_pb2.RequestPlaced:
    """What the gateway is told of it."""
    return scheduler_pb2.RequestPlaced(
        attempt=from_attempt(dispatch.attempt),
        worker_id=dispatch.worker_id,
        queue_s=dispatch.queue_s,
        queue=dispatch.queue,
        waited_for=dispatch.waited_for,
    )


def from_rejection(reject: Reject) -> scheduler_pb2.RequestRejected:
    """Why a request will not run, as its client will read it."""
    text = _REJECTIONS[reject.reason]
    if reject.limit_tokens is not None:
        text += f": {reject.limit_tokens} tokens of prompt and output, with this adapter, at most"
    reason = Reason(reject.reason)
    error = RpcError(reason, text, stage="queue", retry_after_s=reject.retry_after_s)
    return scheduler_pb2.RequestRejected(
        attempt=from_attempt(reject.attempt), error=error.to_proto()
    )


def from_snapshot(
    snapshot: ClusterSnapshot,
    *,
    scheduler_id: str,
    system: str,
    find_worker: Callable[[WorkerId], WorkerReports | None],
) -> scheduler_pb2.GetStateResponse:
    """The core's state. `find_worker` gives what is known of a worker beside it."""
    return scheduler_pb2.GetStateResponse(
        scheduler_id=scheduler_id,
        system=system,
        policy=snapshot.policy,
        queues=[_from_queue(queue) for queue in snapshot.queues],
        workers=[
            _from_worker(worker, find_worker(worker.worker_id)) for worker in snapshot.workers
        ],
        queued=[
            scheduler_pb2.QueuedRequest(
                request_id=queued.request_id,
                queue=queued.queue,
                waited_s=queued.waited_s,
                waits_for=queued.waits_for,
            )
            for queued in snapshot.queued
        ],
        gateways=snapshot.gateways,
        tenants=[_from_tenant(tenant) for tenant in snapshot.tenants],
    )


def _from_queue(queue: QueueSnapshot) -> scheduler_pb2.QueueState:
    return scheduler_pb2.QueueState(
        name=queue.name,
        length=queue.length,
        oldest_s=queue.oldest_s,
        quota_tokens=queue.quota_tokens,
        used_tokens=queue.used_tokens,
        size_limit=queue.size_limit,
    )


def _from_tenant(tenant: TenantSnapshot) -> scheduler_pb2.TenantState:
    return scheduler_pb2.TenantState(
        tenant=tenant.tenant_id,
        held=tenant.held,
        running=tenant.running,
        tokens_per_s=tenant.tokens_per_s,
        available_tokens=tenant.available_tokens
        if math.isfinite(tenant.available_tokens)
        else None,
    )


def _from_worker(worker: WorkerSnapshot, known: WorkerReports | None) -> scheduler_pb2.WorkerState:
    capacity = scheduler_pb2.WorkerCapacity(
        pool_blocks=worker.capacity.pool_blocks,
        block_bytes=worker.capacity.block_bytes,
        block_tokens=worker.capacity.block_tokens,
        max_requests=worker.capacity.max_requests,
        max_context_tokens=worker.capacity.max_context_tokens,
    )
    return scheduler_pb2.WorkerState(
        worker_id=worker.worker_id,
        address=known.address if known is not None else "",
        capacity=capacity,
        status=known.status if known is not None else None,
        dispatched_requests=worker.dispatched,
        attached=worker.attached,
        host_cache=known.host_cache if known is not None else None,
    )


def _to_adapter(adapter: common_pb2.AdapterRef) -> Adapter:
    return Adapter(AdapterDigest(adapter.digest), adapter.rank, adapter.size_bytes)


def _to_capacity(capacity: scheduler_pb2.WorkerCapacity) -> Capacity:
    return Capacity(
        pool_blocks=capacity.pool_blocks,
        block_bytes=capacity.block_bytes,
        block_tokens=capacity.block_tokens,
        max_requests=capacity.max_requests,
        max_context_tokens=capacity.max_context_tokens,
    )


def _to_costs(costs: scheduler_pb2.StepCosts) -> StepCosts | None:
    """What a worker has measured; None if a number of it can't be."""
    values = {field.name: getattr(costs, field.name) for field in costs.DESCRIPTOR.fields}
    if not all(map(math.isfinite, values.values())):
        return None
    may_be_negative = {"prefill_s"}
    if any(value < 0 for name, value in values.items() if name not in may_be_negative):
        return None
    return StepCosts(**values)


def _to_running(running: scheduler_pb2.RunningRequest) -> events.RunningRequest:
    left_tokens = max(1, running.predicted_output_tokens - running.generated_tokens)
    return events.RunningRequest(
        attempt=to_attempt(running.attempt),
        gateway_id=GatewayId(running.gateway_id),
        adapter_digest=AdapterDigest(running.adapter_digest) if running.adapter_digest else None,
        context_tokens=max(0, running.context_tokens),
        remaining_output_tokens=left_tokens,
    )


def _to_resident(status: scheduler_pb2.WorkerStatus) -> tuple[events.ResidentAdapter, ...]:
    return tuple(
        events.ResidentAdapter(AdapterDigest(adapter.digest), max(0, adapter.blocks), adapter.users)
        for adapter in status.resident
    )
