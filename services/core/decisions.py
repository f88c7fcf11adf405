"""What to do: the outputs of the two machines. Imperatives, frozen, performed in order."""

from dataclasses import dataclass
from enum import StrEnum

from services.core.events import LoadFailure
from services.core.snapshots import WaitCause
from services.core.types import Adapter, AdapterDigest, Attempt, GatewayId, RequestId, WorkerId

# --- ClusterScheduler -------------------------------------------------------------------------


class RejectReason(StrEnum):
    """Why a request will not run. Each has one gRPC code, see `services.common.errors`."""

    QUEUE_FULL = "QUEUE_FULL"
    TOO_LARGE = "REQUEST_TOO_LARGE"
    DEADLINE = "DEADLINE_EXCEEDED"
    DEADLINE_UNREACHABLE = "DEADLINE_UNREACHABLE"  # it cannot end in time: said before it is late
    TENANT_QUOTA = "TENANT_QUOTA_EXCEEDED"
    NO_WORKER = "NO_WORKER"


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Hand the request to the worker, which can start it at once."""

    worker_id: WorkerId
    attempt: Attempt
    queue_s: float
    queue: str  # the policy's name of the queue it waited in
    waited_for: WaitCause  # what it waited for last


@dataclass(frozen=True, slots=True)
class Reject:
    """Tell the gateway that the request will not run."""

    gateway_id: GatewayId
    attempt: Attempt
    reason: RejectReason
    retry_after_s: float | None
    limit_tokens: int | None = None  # of prompt and output with its adapter, if it is too large


@dataclass(frozen=True, slots=True)
class Return:
    """Tell the gateway that the request's worker is gone, so that it submits it again."""

    gateway_id: GatewayId
    attempt: Attempt
    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop a request at its worker."""

    worker_id: WorkerId
    attempt: Attempt
    cause: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop what the shell keeps of a request that left the queue without a dispatch."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Hint a worker at the adapters that queued requests will need, most urgent first."""

    worker_id: WorkerId
    adapters: tuple[Adapter, ...]


ClusterDecision = Dispatch | Reject | Return | Abort | Forget | Prefetch

# --- ReplicaScheduler -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Bring the adapter into device memory. Answered by AdapterLoaded or AdapterLoadFailed.

    `blocks` of the pool are its own until it is evicted or its load has failed.
    """

    adapter: Adapter
    blocks: tuple[int, ...] = ()


class EvictionReason(StrEnum):
    """What an adapter went for."""

    KV = "kv"  # an admitted request's next tokens
    ADAPTER = "adapter"  # the adapter of a request that starts
    PREFETCH = "prefetch"  # an adapter that is loaded ahead of its requests
    DROPPED = "dropped"  # it was to go, see `AdapterDropped`
    ABANDONED = "abandoned"  # its last user left, and idle adapters are not kept


@dataclass(frozen=True, slots=True)
class EvictAdapter:
    """Free the adapter's device memory. Done at once."""

    digest: AdapterDigest
    reason: EvictionReason = EvictionReason.ADAPTER


@dataclass(frozen=True, slots=True)
class StartRequest:
    """Open the request's sequence in the engine. Precedes the first step that names it.

    `blocks` hold the keys and values of its first `computed_tokens` already: a cached prefix.
    """

    attempt: Attempt
    blocks: tuple[int, ...] = ()
    computed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PreemptRequest:
    """Close its sequence and give its KV cache back; it starts again from its known tokens."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class EndRequest:
    """Close its sequence if one is open. The request has left this machine."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class FailRequest:
    """The request cannot run here: its adapter did not come. It has left this machine."""

    attempt: Attempt
    failure: LoadFailure
    message: str


@dataclass(frozen=True, slots=True)
class ExpireRequest:
    """As EndRequest, because its deadline passed: tell its gateway so."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class StepWork:
    """Compute the next `tokens` known tokens of a request; the last one samples if `samples`.

    With `until_layer` only so many layers of them are computed, because the rows of its adapter
    for the others have not come. The same tokens come again, from that layer on, until one such
    work has no `until_layer`; only then do they count as computed.
    """

    request_id: RequestId
    tokens: int
    samples: bool
    until_layer: int | None = None


@dataclass(frozen=True, slots=True)
class RunStep:
    """Run one step. Answered by StepFinished; no other RunStep is decided before that.

    `new_blocks` of requests in it come behind the blocks that their sequences have.
    """

    work: tuple[StepWork, ...]
    new_blocks: tuple[tuple[RequestId, tuple[int, ...]], ...] = ()


ReplicaDecision = (
    LoadAdapter
    | EvictAdapter
    | StartRequest
    | PreemptRequest
    | EndRequest
    | FailRequest
    | ExpireRequest
    | RunStep
)
