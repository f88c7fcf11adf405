"""What the machines show of themselves: plain values for reports, never read back by a decision."""

from dataclasses import dataclass
from typing import Literal

from services.core.events import ResidentAdapter, RunningRequest
from services.core.types import Capacity, RequestId, WorkerId

WaitsFor = Literal["no_worker", "memory", "batch_slots", "order"]


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """One of the policy's queues."""

    name: str
    length: int
    oldest_s: float  # how long its oldest request has waited; 0 when empty


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
    waits_for: WaitsFor


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """The state of the scheduler."""

    policy: str
    queues: tuple[QueueSnapshot, ...]
    workers: tuple[WorkerSnapshot, ...]
    queued: tuple[QueuedSnapshot, ...]  # the oldest 100
    gateways: int  # attached ones


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """What a worker holds. kv, adapter and free blocks add up to the pool."""

    kv_blocks: int
    adapter_blocks: int  # loading ones included
    free_blocks: int
    evictable_blocks: int  # those of adapter_blocks that could be had at once
    running: int  # requests with an open sequence
    loading: int  # requests that wait for their adapter or for memory
    resident: tuple[ResidentAdapter, ...]
    requests: tuple[RunningRequest, ...]  # all that are here, as WorkerAttached announces them
