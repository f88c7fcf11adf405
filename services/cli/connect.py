"""Dialling a service and explaining what went wrong with a call."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final, cast

import grpc

from services.cli.output import CommandError
from services.common.errors import Reason, RpcError

CALL_TIMEOUT_S: Final = 10.0
# Full proto names, as grpc.health.v1 knows them.
HEALTH_NAMES: Final = {
    "gateway": "calumma.gateway.v1.InferenceService",
    "scheduler": "calumma.scheduler.v1.SchedulerService",
    "worker": "calumma.worker.v1.WorkerService",
    "adapter_store": "calumma.adapter_store.v1.AdapterStoreService",
}
_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", 64 * 2**20),
)
_HINTS: Final = {
    Reason.ADAPTER_NOT_FOUND: "`calumma adapters list` shows what is published",
    Reason.ADAPTER_VERSION_NOT_FOUND: "`calumma adapters show NAME` lists versions and aliases",
    Reason.ALIAS_NOT_FOUND: "`calumma adapters show NAME` lists versions and aliases",
    Reason.ADAPTER_VERSION_EXISTS: "`calumma adapters show NAME` lists versions and aliases",
    Reason.ADAPTER_IN_USE: "`calumma adapters show NAME` lists aliases, canaries and pins",
    Reason.ALIAS_HAS_NO_PREVIOUS: "`calumma adapters alias NAME ALIAS VERSION` points it anywhere",
    Reason.PIN_NOT_FOUND: "`calumma adapters show NAME` lists pins",
    Reason.PROMPT_TOO_LONG: "shorten the prompt; in a chat, /reset begins anew",
    Reason.ADAPTER_BASE_MISMATCH: "publish an adapter that was trained on the model being served",
    Reason.NO_WORKER: "`calumma status` shows the workers",
}


@contextmanager
def dialled(service: str, address: str) -> Generator[grpc.Channel]:
    """A channel for the calls of one command. A failed call becomes a CommandError."""
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            raise explain(error, service, address) from error


def explain(error: grpc.RpcError, service: str, address: str) -> CommandError:
    """Everything the status and its details say, with what to try next."""
    call = cast("Any", error)  # every RpcError that a call raises is also a grpc.Call
    code: grpc.StatusCode = call.code()
    domain_error = RpcError.from_rpc(call)
    if domain_error is None:
        return _explain_foreign(code, call.details() or "", service, address)
    hint = _HINTS.get(domain_error.reason, "")
    if domain_error.context.retry_after_s is not None:
        hint = f"try again in {domain_error.context.retry_after_s:.3g} s"
    return CommandError(
        domain_error.message,
        code=code.name,
        reason=domain_error.reason,
        field=domain_error.context.field,
        hint=hint,
    )


def _explain_foreign(
    code: grpc.StatusCode, details: str, service: str, address: str
) -> CommandError:
    """An error that gRPC made, not Calumma."""
    name = service.replace("_", " ")
    option = service.replace("_", "-")
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            message = f"the {name} at {address} does not answer"
            hint = f"`calumma up` starts a suite; --{option} gives another address"
        case grpc.StatusCode.UNIMPLEMENTED:
            message = f"what listens at {address} is not the {name}"
            hint = f"--{option} gives another address"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            message, hint = f"the {name} at {address} took too long", ""
        case _:
            message, hint = details or code.name, ""
    return CommandError(message, code=code.name, hint=hint)
