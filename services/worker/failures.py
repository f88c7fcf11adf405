"""How failures of adapter loads map to what the core knows and to what the client is told."""

from typing import Final

from services.common.errors import Reason, RpcError
from services.core.events import LoadFailure

_FAILURES: Final = {
    Reason.ADAPTER_NOT_FOUND: LoadFailure.NOT_FOUND,
    Reason.ADAPTER_VERSION_NOT_FOUND: LoadFailure.NOT_FOUND,
    Reason.ADAPTER_CORRUPT: LoadFailure.CORRUPT,
    Reason.ADAPTER_INVALID: LoadFailure.INCOMPATIBLE,
    Reason.ADAPTER_UNSUPPORTED: LoadFailure.INCOMPATIBLE,
    Reason.ADAPTER_BASE_MISMATCH: LoadFailure.INCOMPATIBLE,
}
_REASONS: Final = {
    LoadFailure.NOT_FOUND: Reason.ADAPTER_NOT_FOUND,
    LoadFailure.UNAVAILABLE: Reason.STORE_UNAVAILABLE,
    LoadFailure.CORRUPT: Reason.ADAPTER_CORRUPT,
    LoadFailure.INCOMPATIBLE: Reason.ADAPTER_BASE_MISMATCH,
    LoadFailure.TOO_LARGE: Reason.REQUEST_TOO_LARGE,
}


def load_failure(reason: Reason) -> LoadFailure:
    """What the core is told of a load that ended with this reason."""
    return _FAILURES.get(reason, LoadFailure.UNAVAILABLE)


def failure_error(failure: LoadFailure, message: str) -> RpcError:
    """What the client is told when the core refuses a request and nobody gave a better reason."""
    stage = "admission" if failure is LoadFailure.TOO_LARGE else "adapter_load"
    return RpcError(_REASONS[failure], message, stage=stage)


def worker_lost(message: str) -> RpcError:
    """The gateway submits the request again, elsewhere; its client notices nothing."""
    return RpcError(Reason.WORKER_LOST, message)
