"""Everything a client can get wrong: code, reason and field, through the whole suite.

Good requests run all the while and must not notice.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from bench.suite import Suite
from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.common.errors import RpcError

pytestmark = pytest.mark.model

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
HUGE = 2**31 - 1


def _request(**fields: Any) -> gateway_pb2.GenerateRequest:
    fields.setdefault("prompt", "Hello")
    return gateway_pb2.GenerateRequest(**fields)


def _sampling(**fields: Any) -> gateway_pb2.GenerateRequest:
    return _request(sampling=common_pb2.SamplingParams(**fields))


def _stopping(**fields: Any) -> gateway_pb2.GenerateRequest:
    return _request(stopping=common_pb2.StopConditions(**fields))


def _chat(*messages: tuple[str, str]) -> gateway_pb2.GenerateRequest:
    turns = [gateway_pb2.ChatMessage(role=role, content=text) for role, text in messages]
    return gateway_pb2.GenerateRequest(chat=gateway_pb2.ChatMessages(messages=turns))


@dataclass(frozen=True)
class _Bad:
    what: str
    request: gateway_pb2.GenerateRequest
    reason: str
    field: str

    @property
    def code(self) -> grpc.StatusCode:
        return NOT_FOUND if self.reason.endswith("NOT_FOUND") else INVALID


TABLE = [
    _Bad("no input", gateway_pb2.GenerateRequest(), "INVALID_FIELD", "input"),
    _Bad("empty prompt", _request(prompt=""), "PROMPT_EMPTY", "prompt"),
    _Bad(
        "no token ids",
        gateway_pb2.GenerateRequest(token_ids=gateway_pb2.TokenIds()),
        "PROMPT_EMPTY",
        "token_ids.ids",
    ),
    _Bad("no messages", _chat(), "PROMPT_EMPTY", "chat.messages"),
    _Bad("unknown role", _chat(("robot", "hi")), "INVALID_FIELD", "chat.messages[0].role"),
    _Bad(
        "token id outside the vocabulary",
        gateway_pb2.GenerateRequest(token_ids=gateway_pb2.TokenIds(ids=[1, 10**6])),
        "INVALID_FIELD",
        "token_ids.ids[1]",
    ),
    _Bad("prompt over the context", _request(prompt="word " * 9000), "PROMPT_TOO_LONG", "prompt"),
    _Bad(
        "prompt over what the workers take",
        _request(prompt="word " * 3000),
        "PROMPT_TOO_LONG",
        "prompt",
    ),
    _Bad("unknown adapter", _request(adapter="nobody"), "ADAPTER_NOT_FOUND", "adapter"),
    _Bad(
        "unknown version", _request(adapter="sentiment@99"), "ADAPTER_VERSION_NOT_FOUND", "adapter"
    ),
    _Bad("unknown alias", _request(adapter="sentiment@blue"), "ALIAS_NOT_FOUND", "adapter"),
    _Bad("adapter as a path", _request(adapter="../../etc"), "INVALID_FIELD", "adapter"),
    _Bad("max_tokens 0", _stopping(max_tokens=0), "INVALID_FIELD", "stopping.max_tokens"),
    _Bad("max_tokens negative", _stopping(max_tokens=-1), "INVALID_FIELD", "stopping.max_tokens"),
    _Bad(
        "max_tokens huge", _stopping(max_tokens=HUGE), "FIELD_LIMIT_EXCEEDED", "stopping.max_tokens"
    ),
    _Bad(
        "min over max",
        _stopping(min_tokens=9, max_tokens=3),
        "INVALID_FIELD",
        "stopping.min_tokens",
    ),
    _Bad(
        "10,000 stop strings",
        _stopping(stop=["x"] * 10_000),
        "FIELD_LIMIT_EXCEEDED",
        "stopping.stop",
    ),
    _Bad("empty stop string", _stopping(stop=[""]), "INVALID_FIELD", "stopping.stop[0]"),
    _Bad(
        "NaN temperature",
        _sampling(temperature=float("nan")),
        "INVALID_FIELD",
        "sampling.temperature",
    ),
    _Bad("infinite top_p", _sampling(top_p=float("inf")), "INVALID_FIELD", "sampling.top_p"),
    _Bad("negative top_k", _sampling(top_k=-1), "INVALID_FIELD", "sampling.top_k"),
    _Bad(
        "penalty out of range",
        _sampling(presence_penalty=9),
        "INVALID_FIELD",
        "sampling.presence_penalty",
    ),
    _Bad("too many logprobs", _request(logprobs=10_000), "FIELD_LIMIT_EXCEEDED", "logprobs"),
    _Bad("priority out of range", _request(priority=10**6), "FIELD_LIMIT_EXCEEDED", "priority"),
    _Bad("request id with a slash", _request(request_id="a/b"), "INVALID_FIELD", "request_id"),
]


@pytest.fixture(scope="module")
def good_traffic(suite: Suite) -> Iterator[list[str]]:
    """Runs good requests until the module ends; collects what went wrong with any of them."""
    stop, faults = threading.Event(), list[str]()

    def run() -> None:
        with grpc.insecure_channel(suite.gateway) as channel:
            stub = gateway_pb2_grpc.InferenceServiceStub(channel)
            request = _stopping(max_tokens=4)
            expected = stub.Generate(request, timeout=60).text
            while not stop.is_set():
                try:
                    text = stub.Generate(request, timeout=60).text
                except grpc.RpcError as error:
                    faults.append(repr(error))
                else:
                    if text != expected:
                        faults.append(f"{text!r} instead of {expected!r}")

    thread = threading.Thread(target=run)
    thread.start()
    yield faults
    stop.set()
    thread.join()
    assert not faults


@pytest.mark.parametrize("bad", TABLE, ids=[bad.what.replace(" ", "_") for bad in TABLE])
def test_a_bad_request_is_refused_with_code_reason_and_field(
    channel: grpc.Channel, good_traffic: list[str], bad: _Bad
) -> None:
    stub = gateway_pb2_grpc.InferenceServiceStub(channel)

    with pytest.raises(grpc.RpcError) as unary:
        stub.Generate(bad.request, timeout=30)
    stream_request = gateway_pb2.GenerateStreamRequest.FromString(bad.request.SerializeToString())
    with pytest.raises(grpc.RpcError) as stream:
        list(stub.GenerateStream(stream_request, timeout=30))

    for raised in (unary, stream):
        call: Any = raised.value
        error = RpcError.from_rpc(call)
        assert error is not None, call
        assert (call.code(), error.reason, error.context.field) == (bad.code, bad.reason, bad.field)
    assert good_traffic == []


def test_bytes_that_are_not_a_message_are_refused(channel: grpc.Channel) -> None:
    method = "/calumma.gateway.v1.InferenceService/Generate"
    send = channel.unary_unary(
        method,
        request_serializer=bytes,
        response_deserializer=gateway_pb2.GenerateResponse.FromString,
    )

    with pytest.raises(grpc.RpcError) as raised:
        send(b"\x12\x02\xff\xfe", timeout=10)  # field 2 is a string: these are not UTF-8

    error = RpcError.from_rpc(raised.value)  # type: ignore[arg-type]
    assert raised.value.code() == INVALID
    assert error is not None
    assert error.reason == "INVALID_FIELD"


def test_a_message_of_64_mib_is_refused_before_it_is_read(suite: Suite) -> None:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(suite.gateway, options=options) as channel:
        stub = gateway_pb2_grpc.InferenceServiceStub(channel)

        with pytest.raises(grpc.RpcError) as raised:
            stub.Generate(_request(prompt="x" * 2**26), timeout=30)

    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_expired_deadline_says_so(channel: grpc.Channel) -> None:
    stub = gateway_pb2_grpc.InferenceServiceStub(channel)

    with pytest.raises(grpc.RpcError) as raised:
        stub.Generate(_stopping(max_tokens=512, ignore_eos=True), timeout=0.001)

    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_deadline_that_cannot_be_met_is_refused_before_it_has_passed(
    channel: grpc.Channel,
) -> None:
    stub = gateway_pb2_grpc.InferenceServiceStub(channel)

    with pytest.raises(grpc.RpcError) as raised:
        stub.Generate(_stopping(max_tokens=512, ignore_eos=True), timeout=0.05)

    error = RpcError.from_rpc(raised.value)  # type: ignore[arg-type]
    assert error is not None
    assert (error.code, error.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "DEADLINE_UNREACHABLE",
    )


def test_an_unknown_field_is_ignored(channel: grpc.Channel) -> None:
    stub = gateway_pb2_grpc.InferenceServiceStub(channel)
    known = _stopping(max_tokens=2).SerializeToString()
    newer = gateway_pb2.GenerateRequest.FromString(known + b"\xfa\x3f\x03abc")  # field 1023

    assert stub.Generate(newer, timeout=60).completion.usage.output_tokens == 2
