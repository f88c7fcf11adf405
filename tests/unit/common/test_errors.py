"""Every reason crosses a real gRPC call and comes back as it left."""

from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from calumma.common.v1 import common_pb2
from services.common.errors import CODES, DOMAIN, MESSAGE_CHARACTERS_MAX, Reason, RpcError
from services.common.interceptors import ServerInterceptor

METHOD = "/test.Errors/Fail"


def error_of(reason: Reason) -> RpcError:
    """An error with every piece of context, made from its reason alone."""
    return RpcError(
        reason,
        f"what happened: {reason} ü",
        field="sampling.temperature",
        stage="queue",
        resource=("adapter", "billing-json"),
        retry_after_s=1.25,
    )


async def fail(request: StringValue, _: object) -> StringValue:
    raise error_of(Reason(request.value))


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[ServerInterceptor()])
    handler = grpc.unary_unary_rpc_method_handler(
        fail,
        request_deserializer=StringValue.FromString,
        response_serializer=StringValue.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Errors", {"Fail": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


async def call(channel: grpc.aio.Channel, reason: Reason) -> grpc.aio.AioRpcError:
    method = channel.unary_unary(
        METHOD,
        request_serializer=StringValue.SerializeToString,
        response_deserializer=StringValue.FromString,
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await method(StringValue(value=reason), timeout=5)
    return caught.value


async def test_every_reason_has_its_code_and_its_details_on_the_wire(
    channel: grpc.aio.Channel,
) -> None:
    for reason in Reason:
        failure = await call(channel, reason)
        assert failure.code() is CODES[reason]
        assert failure.details() == f"what happened: {reason} ü"
        status = rpc_status.from_call(failure)  # type: ignore[arg-type]
        assert status is not None
        details = {detail.TypeName(): detail for detail in status.details}

        info = error_details_pb2.ErrorInfo()
        assert details["google.rpc.ErrorInfo"].Unpack(info)
        assert (info.reason, info.domain) == (reason, DOMAIN)
        assert dict(info.metadata) == {"field": "sampling.temperature", "stage": "queue"}
        retry = error_details_pb2.RetryInfo()
        assert details["google.rpc.RetryInfo"].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() == 1250
        resource = error_details_pb2.ResourceInfo()
        assert details["google.rpc.ResourceInfo"].Unpack(resource)
        assert (resource.resource_type, resource.resource_name) == ("adapter", "billing-json")
        is_client_fault = CODES[reason] is grpc.StatusCode.INVALID_ARGUMENT
        assert ("google.rpc.BadRequest" in details) == is_client_fault
        if is_client_fault:
            request = error_details_pb2.BadRequest()
            details["google.rpc.BadRequest"].Unpack(request)
            assert request.field_violations[0].field == "sampling.temperature"


async def test_every_reason_is_read_back_from_a_failed_call(channel: grpc.aio.Channel) -> None:
    for reason in Reason:
        read = RpcError.from_rpc(await call(channel, reason))
        assert read is not None
        sent = error_of(reason)
        assert (read.reason, read.message, read.context) == (reason, sent.message, sent.context)


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_survives_a_frame(reason: Reason) -> None:
    sent = error_of(reason)
    wire = common_pb2.RequestError.FromString(sent.to_proto().SerializeToString())
    read = RpcError.from_proto(wire)
    assert (read.reason, read.code, read.message) == (reason, sent.code, sent.message)
    assert read.context.field == "sampling.temperature"
    assert read.context.stage == "queue"
    assert read.context.retry_after_s == 1.25


def test_a_bare_error_carries_only_its_reason() -> None:
    error = RpcError(Reason.INTERNAL, "broken")
    assert [detail.TypeName() for detail in error.to_status().details] == ["google.rpc.ErrorInfo"]
    assert not error.to_proto().HasField("retry_after_s")
    assert RpcError.from_proto(error.to_proto()).context.retry_after_s is None


def test_an_unknown_reason_of_a_newer_peer_reads_as_internal() -> None:
    error = common_pb2.RequestError(code=8, reason="FROM_THE_FUTURE", message="?")
    assert RpcError.from_proto(error).reason is Reason.INTERNAL


def test_a_long_message_is_cut_to_what_headers_hold() -> None:
    error = RpcError(Reason.INTERNAL, "x" * 100_000)
    assert len(error.message) == MESSAGE_CHARACTERS_MAX


async def test_a_failure_that_is_not_ours_reads_as_none() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        failure = await call(channel, Reason.INTERNAL)
    assert failure.code() is grpc.StatusCode.UNAVAILABLE
    assert RpcError.from_rpc(failure) is None


async def test_a_tenant_over_its_quota_is_told_so_as_a_quota_failure(
    channel: grpc.aio.Channel,
) -> None:
    for reason, expected in ((Reason.TENANT_QUOTA_EXCEEDED, True), (Reason.QUEUE_FULL, False)):
        status = rpc_status.from_call(await call(channel, reason))  # type: ignore[arg-type]
        assert status is not None
        failure = error_details_pb2.QuotaFailure()
        assert any(detail.Unpack(failure) for detail in status.details) is expected
        assert [violation.subject for violation in failure.violations] == ["tenant"] * expected
