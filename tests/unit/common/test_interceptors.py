"""The interceptor over real servers and clients: errors, cancellation, log lines, spans."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from structlog.testing import capture_logs

from services.common import telemetry
from services.common.errors import Reason, RpcError
from services.common.interceptors import ServerInterceptor, annotate

SECRET = "the-repr-of-an-exception"
NOT_UTF8 = b"\x0a\x02\xff\xfe"  # field 1, two bytes that are not text


@dataclass
class Behaviour:
    """A service whose request text names what it does."""

    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    received: list[str] = field(default_factory=list)
    inner_trace_id: int = 0

    async def unary(self, request: StringValue, context: Any) -> StringValue:
        self.inner_trace_id = trace.get_current_span().get_span_context().trace_id
        await self._act(request.value, context)
        return StringValue(value="done")

    async def stream(self, request: StringValue, context: Any) -> AsyncIterator[StringValue]:
        yield StringValue(value="first")
        await self._act(request.value, context)
        yield StringValue(value="last")

    async def both(
        self, requests: AsyncIterator[StringValue], context: Any
    ) -> AsyncIterator[StringValue]:
        async for request in requests:
            self.received.append(request.value)
            await self._act(request.value, context)
            yield StringValue(value="done")

    async def collect(self, requests: AsyncIterator[StringValue], _: Any) -> StringValue:
        return StringValue(value=",".join([request.value async for request in requests]))

    async def _act(self, what: str, context: Any) -> None:
        match what:
            case "annotate":
                annotate(adapter="billing", tokens=3)
            case "refuse":
                raise RpcError(Reason.PROMPT_EMPTY, "the prompt is empty", field="prompt")
            case "crash":
                raise ValueError(SECRET)
            case "cancel-inside":
                raise asyncio.CancelledError
            case "abort":
                await context.abort(grpc.StatusCode.ALREADY_EXISTS, "twice")
            case "wait":
                await self._wait()
            case _:
                pass

    async def _wait(self) -> None:
        self.entered.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@dataclass(frozen=True)
class Peer:
    """Both ends of a connection to the service."""

    behaviour: Behaviour
    channel: grpc.aio.Channel

    def method(self, name: str, *, raw: bool = False) -> Any:
        kind: Any = {
            "Unary": self.channel.unary_unary,
            "Stream": self.channel.unary_stream,
            "Both": self.channel.stream_stream,
            "Collect": self.channel.stream_unary,
            "Attach": self.channel.stream_stream,
        }[name]
        return kind(
            f"/test.Interceptors/{name}",
            request_serializer=bytes if raw else StringValue.SerializeToString,
            response_deserializer=StringValue.FromString,
        )


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    behaviour = Behaviour()
    coding: dict[str, Any] = {
        "request_deserializer": StringValue.FromString,
        "response_serializer": StringValue.SerializeToString,
    }
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(behaviour.unary, **coding),
        "Stream": grpc.unary_stream_rpc_method_handler(behaviour.stream, **coding),
        "Both": grpc.stream_stream_rpc_method_handler(behaviour.both, **coding),
        "Attach": grpc.stream_stream_rpc_method_handler(behaviour.both, **coding),
        "Collect": grpc.stream_unary_rpc_method_handler(behaviour.collect, **coding),
    }
    server = grpc.aio.server(interceptors=[ServerInterceptor(long_lived=frozenset({"Attach"}))])
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Interceptors", handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Peer(behaviour, channel)
    await server.stop(None)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    return exporter


async def unary_failure(peer: Peer, what: str, **options: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await peer.method("Unary")(StringValue(value=what), **{"timeout": 5, **options})
    return caught.value


async def stream_failure(peer: Peer, what: str) -> tuple[list[str], grpc.aio.AioRpcError]:
    seen: list[str] = []

    async def read_all() -> None:
        async for response in peer.method("Stream")(StringValue(value=what), timeout=5):
            seen.append(response.value)  # noqa: PERF401 - what came before the failure counts

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all()
    return seen, caught.value


def reason_of(failure: grpc.aio.AioRpcError) -> Reason:
    error = RpcError.from_rpc(failure)
    assert error is not None
    return error.reason


async def until_logged(logs: list[Any], count: int = 1) -> list[Any]:
    """The canonical lines. A line is written after the client has its status."""
    async with asyncio.timeout(5):
        while [line["event"] for line in logs].count("rpc") < count:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.02)
    return [line for line in logs if line["event"] == "rpc"]


async def test_an_rpc_error_reaches_the_client_with_code_and_field(peer: Peer) -> None:
    failure = await unary_failure(peer, "refuse")
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = RpcError.from_rpc(failure)
    assert error is not None
    assert (error.reason, error.context.field) == (Reason.PROMPT_EMPTY, "prompt")


async def test_an_rpc_error_inside_a_stream_follows_what_was_sent(peer: Peer) -> None:
    seen, failure = await stream_failure(peer, "refuse")
    assert seen == ["first"]
    assert reason_of(failure) is Reason.PROMPT_EMPTY


async def test_an_uncaught_exception_never_leaks_its_text(peer: Peer) -> None:
    with capture_logs() as logs:
        _, in_stream = await stream_failure(peer, "crash")
        for failure in (await unary_failure(peer, "crash"), in_stream):
            assert failure.code() is grpc.StatusCode.INTERNAL
            assert reason_of(failure) is Reason.INTERNAL
            assert SECRET not in f"{failure.details()}{failure.trailing_metadata()}"
        await until_logged(logs, 2)
    unhandled = [line for line in logs if line["event"] == "unhandled"]
    assert [str(line["exc_info"]) for line in unhandled] == [SECRET, SECRET]


async def test_a_cancelled_error_of_a_handler_does_not_leave_the_client_hanging(
    peer: Peer,
) -> None:
    async with asyncio.timeout(2):  # far below the call's deadline
        failure = await unary_failure(peer, "cancel-inside")
        _, in_stream = await stream_failure(peer, "cancel-inside")
    assert failure.code() is grpc.StatusCode.INTERNAL
    assert in_stream.code() is grpc.StatusCode.INTERNAL


async def test_an_abort_of_the_handler_keeps_its_code(peer: Peer) -> None:
    with capture_logs() as logs:
        failure = await unary_failure(peer, "abort")
        lines = await until_logged(logs)
    assert failure.code() is grpc.StatusCode.ALREADY_EXISTS
    assert [line["code"] for line in lines] == ["ALREADY_EXISTS"]


@pytest.mark.parametrize("method", ["Unary", "Stream"])
async def test_bytes_that_are_not_protobuf_are_an_invalid_argument(peer: Peer, method: str) -> None:
    call = peer.method(method, raw=True)(NOT_UTF8, timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if method == "Unary" else anext(aiter(call)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = RpcError.from_rpc(caught.value)
    assert error is not None
    assert (error.reason, error.context.field) == (Reason.INVALID_FIELD, "(message)")


@pytest.mark.parametrize("method", ["Both", "Collect"])
async def test_a_malformed_message_in_a_request_stream_ends_it_after_the_good_ones(
    peer: Peer, method: str
) -> None:
    good = StringValue(value="good").SerializeToString()
    call = peer.method(method, raw=True)(timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:  # noqa: PT012 - either line may see it
        await call.write(good)
        if method == "Both":
            assert (await call.read()).value == "done"
        await call.write(NOT_UTF8)
        await (call.read() if method == "Both" else call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(caught.value) is Reason.INVALID_FIELD
    if method == "Both":
        assert peer.behaviour.received == ["good"]


async def test_one_canonical_line_per_rpc_with_its_annotations(peer: Peer) -> None:
    with capture_logs() as logs:
        await peer.method("Unary")(StringValue(value="annotate"), timeout=5)
        await unary_failure(peer, "refuse")
        first, second = await until_logged(logs, 2)
    assert first["method"] == "test.Interceptors/Unary"
    assert (first["code"], first["adapter"], first["tokens"]) == ("OK", "billing", 3)
    assert first["duration_s"] >= 0
    assert "127.0.0.1" in first["peer"]
    assert "reason" not in first
    assert (second["code"], second["reason"]) == ("INVALID_ARGUMENT", "PROMPT_EMPTY")
    assert "adapter" not in second  # annotations belong to one call


async def test_a_stream_has_one_canonical_line_too(peer: Peer) -> None:
    with capture_logs() as logs:
        call = peer.method("Stream")(StringValue(value="annotate"), timeout=5)
        assert [response.value async for response in call] == ["first", "last"]
        (line,) = await until_logged(logs)
    assert (line["code"], line["adapter"]) == ("OK", "billing")


@pytest.mark.parametrize("method", ["Unary", "Stream"])
async def test_a_client_that_cancels_is_noticed_by_the_handler(peer: Peer, method: str) -> None:
    with capture_logs() as logs:
        call = peer.method(method)(StringValue(value="wait"), timeout=30)
        if method == "Stream":
            assert (await call.read()).value == "first"
        await asyncio.wait_for(peer.behaviour.entered.wait(), 5)
        call.cancel()
        await asyncio.wait_for(peer.behaviour.cancelled.wait(), 5)
        (line,) = await until_logged(logs)
    assert (line["code"], line["reason"]) == ("CANCELLED", "CANCELLED")


async def test_a_deadline_of_the_client_ends_the_handler(peer: Peer) -> None:
    failure = await unary_failure(peer, "wait", timeout=0.2)
    assert failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(peer.behaviour.cancelled.wait(), 5)


async def test_a_client_that_leaves_a_request_stream_ends_the_handler(peer: Peer) -> None:
    call = peer.method("Both")(timeout=30)
    await call.write(StringValue(value="wait"))
    await asyncio.wait_for(peer.behaviour.entered.wait(), 5)
    call.cancel()
    await asyncio.wait_for(peer.behaviour.cancelled.wait(), 5)


async def test_the_span_of_a_call_joins_the_callers_trace(
    peer: Peer, spans: InMemorySpanExporter
) -> None:
    header = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with capture_logs() as logs:
        metadata = (("traceparent", header),)
        await peer.method("Unary")(StringValue(value="x"), timeout=5, metadata=metadata)
        (line,) = await until_logged(logs)
    (span,) = spans.get_finished_spans()
    assert span.context is not None
    assert span.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert span.parent is not None
    assert span.parent.span_id == 0xB7AD6B7169203331
    assert (span.name, span.kind) == ("test.Interceptors/Unary", SpanKind.SERVER)
    assert peer.behaviour.inner_trace_id == span.context.trace_id
    assert line["trace_id"] == "0af7651916cd43dd8448eb211c80319c"


async def test_a_failed_call_has_a_failed_span(peer: Peer, spans: InMemorySpanExporter) -> None:
    with capture_logs() as logs:
        await unary_failure(peer, "refuse")
        await until_logged(logs)
    (span,) = spans.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert span.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"


async def test_a_malformed_traceparent_begins_a_new_trace(
    peer: Peer, spans: InMemorySpanExporter
) -> None:
    with capture_logs() as logs:
        metadata = (("traceparent", "nonsense"),)
        await peer.method("Unary")(StringValue(value="x"), timeout=5, metadata=metadata)
        await until_logged(logs)
    (span,) = spans.get_finished_spans()
    assert span.parent is None


async def test_a_long_lived_stream_has_a_line_and_no_span(
    peer: Peer, spans: InMemorySpanExporter
) -> None:
    with capture_logs() as logs:
        call = peer.method("Attach")(timeout=5)
        await call.write(StringValue(value="annotate"))
        assert (await call.read()).value == "done"
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        (line,) = await until_logged(logs)
    assert (line["method"], line["adapter"]) == ("test.Interceptors/Attach", "billing")
    assert spans.get_finished_spans() == ()
