"""What surrounds every RPC of every server: errors, one canonical log line, a span, a duration.

The only place where exceptions become gRPC status. Three facts of grpcio shape it: an uncaught
exception would leak its repr to the client as UNKNOWN; a CancelledError that is not the RPC's own
would leave the client waiting for its deadline; a request that cannot be parsed would fail before
any handler, so parsing hands on a `Malformed` value instead of raising.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import structlog
from grpc_status import rpc_status
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from services.common import telemetry
from services.common.errors import Reason, RpcError

_PASS_THROUGH: Final = ("/grpc.health.", "/grpc.reflection.")
_log = structlog.get_logger("rpc")
_annotations: ContextVar[dict[str, Any] | None] = ContextVar("rpc_annotations", default=None)


def annotate(**fields: Any) -> None:
    """Add fields to the canonical log line and the span of the RPC that runs now."""
    annotations = _annotations.get()
    if annotations is not None:
        annotations.update(fields)


@dataclass(frozen=True, slots=True)
class Malformed:
    """A request that is not valid protobuf, for example text that is not UTF-8."""

    message: str


@dataclass(slots=True)
class _Call:
    method: str
    span: Span
    peer: str  # read at the start: asking for it once the server is gone crashes the process
    started_s: float = field(default_factory=time.monotonic)
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""


class ServerInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server except health and reflection.

    `long_lived` names the methods (without the service) whose streams last as long as the peer:
    they get a log line when they end, and no span.
    """

    def __init__(self, *, long_lived: frozenset[str] = frozenset()) -> None:
        self._long_lived = long_lived
        self._duration = telemetry.meter().create_histogram(
            telemetry.RPC_DURATION, unit="s", description="Duration of inbound calls"
        )

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Replace the handler by one whose errors, time and span are looked after."""
        handler: grpc.RpcMethodHandler[Any, Any] | None = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_PASS_THROUGH):  # None: unimplemented
            return handler
        make, behaviour = _parts(handler)
        surround = self._streaming if handler.response_streaming else self._unary
        return make(
            surround(behaviour, method),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _unary(self, behaviour: Any, method: str) -> Any:
        async def run(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with self._observed(method, context) as call:
                try:
                    return await behaviour(_well_formed(request), context)
                except BaseException as error:  # noqa: BLE001 - the boundary of the process
                    await _fail(call, context, error)

        return run

    def _streaming(self, behaviour: Any, method: str) -> Any:
        async def run(
            request: Any, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            with self._observed(method, context) as call:
                try:
                    responses = behaviour(_well_formed(request), context)
                    async with contextlib.aclosing(responses):
                        async for response in responses:
                            yield response
                except BaseException as error:  # noqa: BLE001 - the boundary of the process
                    await _fail(call, context, error)

        return run

    @contextlib.contextmanager
    def _observed(
        self, method: str, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Generator[_Call]:
        """Run one call. Its task and context are its own, so nothing is reset afterwards."""
        call = _Call(method, self._start_span(method, context), context.peer())
        annotations: dict[str, Any] = {}
        _annotations.set(annotations)
        otel_context.attach(trace.set_span_in_context(call.span))
        try:
            yield call
        finally:
            self._end(call, annotations)

    def _start_span(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> Span:
        if method.rsplit("/", 1)[-1] in self._long_lived:
            return trace.INVALID_SPAN
        metadata = {
            key: value
            for key, value in context.invocation_metadata() or ()
            if isinstance(value, str)
        }
        return telemetry.tracer().start_span(
            method.lstrip("/"),
            context=telemetry.context_from(metadata.get("traceparent", "")),
            kind=SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": method.lstrip("/")},
        )

    def _end(self, call: _Call, annotations: dict[str, Any]) -> None:
        duration_s = time.monotonic() - call.started_s
        labels = {"rpc.method": call.method.lstrip("/"), "rpc.response.status_code": call.code.name}
        self._duration.record(duration_s, labels)
        call.span.set_attribute("rpc.response.status_code", call.code.name)
        if call.code is not grpc.StatusCode.OK:
            call.span.set_status(Status(StatusCode.ERROR, call.reason))
        call.span.end()
        if call.span.get_span_context().is_valid:
            annotations.setdefault("trace_id", f"{call.span.get_span_context().trace_id:032x}")
        _log.info(
            "rpc",
            method=call.method.lstrip("/"),
            code=call.code.name,
            duration_s=round(duration_s, 6),
            peer=call.peer,
            **({"reason": call.reason} if call.reason else {}),
            **annotations,
        )


def _parts(handler: "grpc.RpcMethodHandler[Any, Any]") -> tuple[Callable[..., Any], Any]:
    """The factory for this handler's kind, and its behaviour."""
    match handler.request_streaming, handler.response_streaming:
        case False, False:
            return grpc.unary_unary_rpc_method_handler, handler.unary_unary
        case False, True:
            return grpc.unary_stream_rpc_method_handler, handler.unary_stream
        case True, False:
            return grpc.stream_unary_rpc_method_handler, handler.stream_unary
        case _:
            return grpc.stream_stream_rpc_method_handler, handler.stream_stream


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception as error:  # noqa: BLE001 - whatever protobuf raises, the bytes are bad
            return Malformed(str(error))

    return parse


def _well_formed(request: Any) -> Any:
    """The request, or for a request stream an iterator that checks each message."""
    if hasattr(request, "__aiter__"):
        return _well_formed_stream(request)
    if isinstance(request, Malformed):
        raise RpcError(
            Reason.INVALID_FIELD,
            f"the request is not valid protobuf: {request.message}",
            field="(message)",
        )
    return request


async def _well_formed_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _well_formed(request)


async def _fail(
    call: _Call, context: grpc.aio.ServicerContext[Any, Any], error: BaseException
) -> None:
    """End the RPC with the status of `error`. Raises always."""
    match error:
        case RpcError():
            failure = error
        case GeneratorExit():
            call.code, call.reason = grpc.StatusCode.CANCELLED, Reason.CANCELLED
            raise error
        case asyncio.CancelledError() if _is_own_cancellation():
            call.code, call.reason = grpc.StatusCode.CANCELLED, Reason.CANCELLED
            raise error
        case grpc.aio.AbortError():
            call.code = context.code()
            raise error
        case KeyboardInterrupt() | SystemExit():
            raise error
        case _:
            _log.error("unhandled", method=call.method, exc_info=error)
            failure = RpcError(Reason.INTERNAL, "internal error; the server's log has the details")
    call.code, call.reason = failure.code, failure.reason
    await context.abort_with_status(rpc_status.to_status(failure.to_status()))


def _is_own_cancellation() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
