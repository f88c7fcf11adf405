"""Every error that a client can see, in one table, and its two forms on the wire.

Owns the stable reasons (`google.rpc.ErrorInfo.reason`, domain "calumma") and their gRPC codes. An
error leaves a server as `google.rpc.Status` details of the RPC that failed, or as a
`calumma.common.v1.RequestError` inside a frame or stream that outlives the request.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from calumma.common.v1 import common_pb2

DOMAIN: Final = "calumma"
MESSAGE_CHARACTERS_MAX: Final = 1000  # keeps an error within HTTP/2 header limits


class Reason(StrEnum):
    """Why a call failed. Clients may rely on these; they are never renamed."""

    INVALID_FIELD = "INVALID_FIELD"
    FIELD_LIMIT_EXCEEDED = "FIELD_LIMIT_EXCEEDED"
    PROMPT_EMPTY = "PROMPT_EMPTY"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    ADAPTER_NOT_FOUND = "ADAPTER_NOT_FOUND"
    ADAPTER_VERSION_NOT_FOUND = "ADAPTER_VERSION_NOT_FOUND"
    ADAPTER_INVALID = "ADAPTER_INVALID"
    ADAPTER_UNSUPPORTED = "ADAPTER_UNSUPPORTED"
    ADAPTER_BASE_MISMATCH = "ADAPTER_BASE_MISMATCH"
    ADAPTER_CORRUPT = "ADAPTER_CORRUPT"
    ADAPTER_IN_USE = "ADAPTER_IN_USE"
    ADAPTER_VERSION_EXISTS = "ADAPTER_VERSION_EXISTS"
    ALIAS_NOT_FOUND = "ALIAS_NOT_FOUND"
    ALIAS_HAS_NO_PREVIOUS = "ALIAS_HAS_NO_PREVIOUS"
    PIN_NOT_FOUND = "PIN_NOT_FOUND"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    CONFLICT = "CONFLICT"
    QUEUE_FULL = "QUEUE_FULL"
    REQUEST_ID_IN_USE = "REQUEST_ID_IN_USE"
    TOO_MANY_REQUESTS = "TOO_MANY_REQUESTS"
    TENANT_QUOTA_EXCEEDED = "TENANT_QUOTA_EXCEEDED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    DEADLINE_UNREACHABLE = "DEADLINE_UNREACHABLE"
    CANCELLED = "CANCELLED"
    NO_WORKER = "NO_WORKER"
    WORKER_LOST = "WORKER_LOST"
    SCHEDULER_UNAVAILABLE = "SCHEDULER_UNAVAILABLE"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    OBJECT_STORAGE_UNAVAILABLE = "OBJECT_STORAGE_UNAVAILABLE"
    DRAINING = "DRAINING"
    PROTOCOL_VIOLATION = "PROTOCOL_VIOLATION"
    NUMERICAL_FAILURE = "NUMERICAL_FAILURE"
    INTERNAL = "INTERNAL"


_C = grpc.StatusCode
CODES: Final[dict[Reason, grpc.StatusCode]] = {
    Reason.INVALID_FIELD: _C.INVALID_ARGUMENT,
    Reason.FIELD_LIMIT_EXCEEDED: _C.INVALID_ARGUMENT,
    Reason.PROMPT_EMPTY: _C.INVALID_ARGUMENT,
    Reason.PROMPT_TOO_LONG: _C.INVALID_ARGUMENT,
    Reason.REQUEST_TOO_LARGE: _C.INVALID_ARGUMENT,
    Reason.ADAPTER_NOT_FOUND: _C.NOT_FOUND,
    Reason.ADAPTER_VERSION_NOT_FOUND: _C.NOT_FOUND,
    Reason.ADAPTER_INVALID: _C.INVALID_ARGUMENT,
    Reason.ADAPTER_UNSUPPORTED: _C.FAILED_PRECONDITION,
    Reason.ADAPTER_BASE_MISMATCH: _C.FAILED_PRECONDITION,
    Reason.ADAPTER_CORRUPT: _C.DATA_LOSS,
    Reason.ADAPTER_IN_USE: _C.FAILED_PRECONDITION,
    Reason.ADAPTER_VERSION_EXISTS: _C.ALREADY_EXISTS,
    Reason.ALIAS_NOT_FOUND: _C.NOT_FOUND,
    Reason.ALIAS_HAS_NO_PREVIOUS: _C.FAILED_PRECONDITION,
    Reason.PIN_NOT_FOUND: _C.NOT_FOUND,
    Reason.PERMISSION_DENIED: _C.PERMISSION_DENIED,
    Reason.CONFLICT: _C.ABORTED,
    Reason.QUEUE_FULL: _C.RESOURCE_EXHAUSTED,
    Reason.REQUEST_ID_IN_USE: _C.ALREADY_EXISTS,
    Reason.TOO_MANY_REQUESTS: _C.RESOURCE_EXHAUSTED,
    Reason.TENANT_QUOTA_EXCEEDED: _C.RESOURCE_EXHAUSTED,
    Reason.DEADLINE_EXCEEDED: _C.DEADLINE_EXCEEDED,
    Reason.DEADLINE_UNREACHABLE: _C.RESOURCE_EXHAUSTED,
    Reason.CANCELLED: _C.CANCELLED,
    Reason.NO_WORKER: _C.UNAVAILABLE,
    Reason.WORKER_LOST: _C.UNAVAILABLE,
    Reason.SCHEDULER_UNAVAILABLE: _C.UNAVAILABLE,
    Reason.STORE_UNAVAILABLE: _C.UNAVAILABLE,
    Reason.OBJECT_STORAGE_UNAVAILABLE: _C.UNAVAILABLE,
    Reason.DRAINING: _C.UNAVAILABLE,
    Reason.PROTOCOL_VIOLATION: _C.FAILED_PRECONDITION,
    Reason.NUMERICAL_FAILURE: _C.INTERNAL,
    Reason.INTERNAL: _C.INTERNAL,
}


@dataclass(frozen=True, slots=True)
class ErrorContext:
    """Where an error belongs: the request field, the stage, the resource, and when to retry."""

    field: str = ""  # path in the request message, for example "sampling.temperature"
    stage: str = ""  # "admission", "queue", "adapter_load", "prefill", "decode"
    resource_type: str = ""  # for example "adapter"
    resource_name: str = ""
    retry_after_s: float | None = None


class RpcError(Exception):
    """An error with a place in the table. Raise it anywhere below a servicer."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str = "",
        stage: str = "",
        resource: tuple[str, str] = ("", ""),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message[:MESSAGE_CHARACTERS_MAX]
        self.context = ErrorContext(field, stage, resource[0], resource[1], retry_after_s)

    @property
    def code(self) -> grpc.StatusCode:
        """Canonical gRPC code of the reason."""
        return CODES[self.reason]

    def to_status(self) -> status_pb2.Status:
        """`google.rpc.Status` with ErrorInfo and the details that apply."""
        context = self.context
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN)
        for key in ("field", "stage"):
            if value := getattr(context, key):
                info.metadata[key] = value
        details = [_packed(info)]
        if context.field and self.code is _C.INVALID_ARGUMENT:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=context.field, description=self.message, reason=self.reason
            )
            details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
        if context.resource_type:
            details.append(
                _packed(
                    error_details_pb2.ResourceInfo(
                        resource_type=context.resource_type, resource_name=context.resource_name
                    )
                )
            )
        if self.reason is Reason.TENANT_QUOTA_EXCEEDED:
            quota = error_details_pb2.QuotaFailure.Violation(
                subject="tenant", description=self.message
            )
            details.append(_packed(error_details_pb2.QuotaFailure(violations=[quota])))
        if context.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(context.retry_after_s * 1e9))
            details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
        return status_pb2.Status(code=_number(self.code), message=self.message, details=details)

    def to_proto(self) -> common_pb2.RequestError:
        """The form inside frames."""
        context = self.context
        error = common_pb2.RequestError(
            code=_number(self.code),
            reason=self.reason,
            message=self.message,
            field=context.field,
            stage=context.stage,
        )
        if context.retry_after_s is not None:
            error.retry_after_s = context.retry_after_s
        return error

    @classmethod
    def from_proto(cls, error: common_pb2.RequestError) -> "RpcError":
        """Read the form inside frames. An unknown reason becomes INTERNAL."""
        return cls(
            _reason(error.reason),
            error.message,
            field=error.field,
            stage=error.stage,
            retry_after_s=error.retry_after_s if error.HasField("retry_after_s") else None,
        )

    @classmethod
    def from_rpc(cls, error: grpc.aio.AioRpcError) -> "RpcError | None":
        """Read the details of a failed call. None when the peer was not Calumma."""
        try:
            status = rpc_status.from_call(cast("grpc.Call", error))
        except ValueError:
            return None
        return cls.from_status(status) if status is not None else None

    @classmethod
    def from_status(cls, status: status_pb2.Status) -> "RpcError | None":
        """Read `google.rpc.Status`. None without an ErrorInfo of this domain."""
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        resource = error_details_pb2.ResourceInfo()
        retry_after_s: float | None = None
        for detail in status.details:
            detail.Unpack(info)
            detail.Unpack(resource)
            if detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        if info.domain != DOMAIN:
            return None
        return cls(
            _reason(info.reason),
            status.message,
            field=info.metadata.get("field", ""),
            stage=info.metadata.get("stage", ""),
            resource=(resource.resource_type, resource.resource_name),
            retry_after_s=retry_after_s,
        )


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _number(code: grpc.StatusCode) -> int:
    number: int = code.value[0]
    return number


def _reason(text: str) -> Reason:
    return Reason(text) if text in Reason.__members__ else Reason.INTERNAL
