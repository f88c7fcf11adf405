"""What happened: the inputs of the two machines. Past participles, frozen."""

from dataclasses import dataclass
from enum import StrEnum

from services.core.costs import StepCosts
from services.core.types import (
    Adapter,
    AdapterDigest,
    Attempt,
    Capacity,
    GatewayId,
    Pin,
    Request,
    RequestId,
    WorkerId,
)

# --- ClusterScheduler -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestSubmitted:
    """A gateway wants this request run."""

    request: Request


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """Its client has gone, its deadline passed, or its gateway has all it wants."""

    attempt: Attempt
    cause: str


@dataclass(frozen=True, slots=True)
class GatewayAttached:
    """A gateway opened its stream. `placed` is what it believes to be at workers."""

    gateway_id: GatewayId
    placed: tuple[tuple[Attempt, WorkerId], ...]


@dataclass(frozen=True, slots=True)
class GatewayDetached:
    """Its stream ended. It may come back within the grace period."""

    gateway_id: GatewayId


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """A request that a worker announces when it attaches."""

    attempt: Attempt
    gateway_id: GatewayId
    adapter_digest: AdapterDigest | None
    context_tokens: int
    remaining_output_tokens: int


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """An adapter in a worker's device memory."""

    digest: AdapterDigest
    blocks: int
    users: int
    size_bytes: int = 0  # 0: whoever reports it does not say
    pin_reason: str = ""  # of a pin that is honoured; empty: it is not pinned


@dataclass(frozen=True, slots=True)
class WorkerAttached:
    """A worker opened its stream, for the first time or again."""

    worker_id: WorkerId
    capacity: Capacity
    running: tuple[RunningRequest, ...]
    resident: tuple[ResidentAdapter, ...]
    draining: bool


@dataclass(frozen=True, slots=True)
class WorkerReported:
    """What a worker holds now, and what its steps cost if it has measured some."""

    worker_id: WorkerId
    resident: tuple[ResidentAdapter, ...]
    draining: bool
    costs: StepCosts | None = None


@dataclass(frozen=True, slots=True)
class WorkerDetached:
    """Its stream ended. It may come back within the grace period."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class RequestStarted:
    """A worker ran the first step of a request."""

    worker_id: WorkerId
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class RequestPrefilled:
    """A worker has computed a request's prompt: its first token is there."""

    worker_id: WorkerId
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """A worker is done with a request, however it ended."""

    worker_id: WorkerId
    attempt: Attempt
    output_tokens: int


PeerEvent = GatewayAttached | GatewayDetached | WorkerAttached | WorkerDetached
ClusterEvent = (
    PeerEvent
    | RequestSubmitted
    | RequestCancelled
    | WorkerReported
    | RequestStarted
    | RequestPrefilled
    | RequestFinished
)

# --- ReplicaScheduler -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestDispatched:
    """The cluster placed this request here. A known attempt again is ignored."""

    request: Request


@dataclass(frozen=True, slots=True)
class RequestAborted:
    """Stop it, wherever it is. Unknown attempts are ignored."""

    attempt: Attempt


class LoadFailure(StrEnum):
    """Why an adapter is not here."""

    NOT_FOUND = "not_found"
    UNAVAILABLE = "unavailable"
    CORRUPT = "corrupt"
    INCOMPATIBLE = "incompatible"
    TOO_LARGE = "too_large"  # with the request that wants it, more than all of the worker's memory


@dataclass(frozen=True, slots=True)
class AdapterProgressed:
    """Of an adapter that is being loaded the rows of the first `layers` layers can be used."""

    digest: AdapterDigest
    layers: int


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    """The adapter is in device memory."""

    digest: AdapterDigest


@dataclass(frozen=True, slots=True)
class AdapterLoadFailed:
    """The load ended without the adapter."""

    digest: AdapterDigest
    failure: LoadFailure
    message: str


@dataclass(frozen=True, slots=True)
class AdaptersWanted:
    """Queued requests will need these, most urgent first."""

    adapters: tuple[Adapter, ...]


@dataclass(frozen=True, slots=True)
class PinsChanged:
    """All that is pinned from now on, the most important first."""

    pins: tuple[Pin, ...]


@dataclass(frozen=True, slots=True)
class AdapterDropped:
    """It is to leave device memory once no request here needs it; hints and pins of it are void."""

    digest: AdapterDigest


@dataclass(frozen=True, slots=True)
class HostCacheChanged:
    """What the worker has in host memory now: loading these needs no download."""

    digests: frozenset[AdapterDigest]


@dataclass(frozen=True, slots=True)
class StepFinished:
    """The step that RunStep asked for has ended.

    `sampled` are the requests that got one more token each; `ended` those among them (or failed
    ones) that are complete and leave. `more_keys` of those that ended well are of the full blocks
    behind those that `Request.prefix_keys` names, of context and output.
    """

    sampled: tuple[RequestId, ...]
    ended: tuple[RequestId, ...]
    more_keys: tuple[tuple[RequestId, tuple[bytes, ...]], ...] = ()


ReplicaEvent = (
    RequestDispatched
    | RequestAborted
    | AdapterProgressed
    | AdapterLoaded
    | AdapterLoadFailed
    | AdaptersWanted
    | PinsChanged
    | AdapterDropped
    | HostCacheChanged
    | StepFinished
)
