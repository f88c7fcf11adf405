"""Every limit of the API: one table of what is refused, with its reason and field."""

from collections.abc import Callable

import pytest

from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2
from services.common.errors import Reason, RpcError
from services.gateway.parse import Limits, output_limit, parse
from services.gateway.types import (
    AdapterName,
    ChatPrompt,
    GenerateSpec,
    Message,
    Sampling,
    Stopping,
    TextPrompt,
    TokenPrompt,
)

LIMITS = Limits(context_tokens=512, vocab_size=100, prompt_bytes=1000, default_max_tokens=64)
NAN, INFINITY = float("nan"), float("inf")


def request(
    prompt: str = "x",
    *,
    sampling: dict[str, float] | None = None,
    stopping: common_pb2.StopConditions | None = None,
    **fields: object,
) -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(
        prompt=prompt,
        sampling=common_pb2.SamplingParams(**(sampling or {})),  # type: ignore[arg-type]
        stopping=stopping,
        **fields,  # type: ignore[arg-type]
    )


def tokens(*ids: int) -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(token_ids=gateway_pb2.TokenIds(ids=ids))


def chat(*turns: tuple[str, str]) -> gateway_pb2.GenerateRequest:
    messages = [gateway_pb2.ChatMessage(role=role, content=content) for role, content in turns]
    return gateway_pb2.GenerateRequest(chat=gateway_pb2.ChatMessages(messages=messages))


def stops(**fields: object) -> gateway_pb2.GenerateRequest:
    return request(stopping=common_pb2.StopConditions(**fields))  # type: ignore[arg-type]


INVALID, LIMIT = Reason.INVALID_FIELD, Reason.FIELD_LIMIT_EXCEEDED
BAD: list[tuple[gateway_pb2.GenerateRequest, Reason, str]] = [
    (gateway_pb2.GenerateRequest(), INVALID, "input"),
    (request(""), Reason.PROMPT_EMPTY, "prompt"),
    (request("é" * 501), Reason.PROMPT_TOO_LONG, "prompt"),
    (tokens(), Reason.PROMPT_EMPTY, "token_ids.ids"),
    (tokens(*[1] * 512), Reason.PROMPT_TOO_LONG, "token_ids.ids"),
    (tokens(1, 100), INVALID, "token_ids.ids[1]"),
    (tokens(-1), INVALID, "token_ids.ids[0]"),
    (chat(), Reason.PROMPT_EMPTY, "chat.messages"),
    (chat(*[("user", "")] * 1025), LIMIT, "chat.messages"),
    (chat(("user", "a"), ("tool", "b")), INVALID, "chat.messages[1].role"),
    (chat(("", "a")), INVALID, "chat.messages[0].role"),
    (chat(("user", "a" * 600), ("user", "b" * 600)), Reason.PROMPT_TOO_LONG, "chat"),
    (request(request_id="a b"), INVALID, "request_id"),
    (request(request_id="é"), INVALID, "request_id"),
    (request(request_id="a" * 129), INVALID, "request_id"),
    (request(request_id="a\n"), INVALID, "request_id"),
    *[
        (request(adapter=name), INVALID, "adapter")
        for name in (
            "A", "a/b", "../a", "-a", "a" * 65, "a@", "@1", "a@0", "a@01", "a@1@2", "a@B", "a b",
            "a@" + "9" * 16, "a\0", "\u0430", "a,b", "a:b", "a\n", "a@b\n",
        )
    ],
    *[
        (request(sampling={name: value}), INVALID, f"sampling.{name}")
        for name, low, high in (
            ("temperature", -0.01, 2.01),
            ("top_p", 0.0, 1.01),
            ("min_p", -0.01, 1.01),
            ("presence_penalty", -2.01, 2.01),
            ("frequency_penalty", -2.01, 2.01),
            ("repetition_penalty", 0.0, 2.01),
        )
        for value in (low, high, NAN, INFINITY, -INFINITY)
    ],
    (request(sampling={"top_k": -1}), INVALID, "sampling.top_k"),
    (request(sampling={"top_k": 1001}), LIMIT, "sampling.top_k"),
    (stops(max_tokens=0), INVALID, "stopping.max_tokens"),
    (stops(max_tokens=-5), INVALID, "stopping.max_tokens"),
    (stops(max_tokens=512), LIMIT, "stopping.max_tokens"),
    (stops(max_tokens=2**31 - 1), LIMIT, "stopping.max_tokens"),
    (stops(min_tokens=-1), INVALID, "stopping.min_tokens"),
    (stops(min_tokens=512), LIMIT, "stopping.min_tokens"),
    (stops(min_tokens=5, max_tokens=4), INVALID, "stopping.min_tokens"),
    (stops(stop=["a"] * 17), LIMIT, "stopping.stop"),
    (stops(stop=["a"] * 10_000), LIMIT, "stopping.stop"),
    (stops(stop=["a", ""]), INVALID, "stopping.stop[1]"),
    (stops(stop=["é" * 129]), LIMIT, "stopping.stop[0]"),
    (stops(stop_token_ids=[1] * 65), LIMIT, "stopping.stop_token_ids"),
    (stops(stop_token_ids=[5, 100]), INVALID, "stopping.stop_token_ids[1]"),
    (request(logprobs=-1), INVALID, "logprobs"),
    (request(logprobs=21), LIMIT, "logprobs"),
    (request(priority=-101), INVALID, "priority"),
    (request(priority=101), LIMIT, "priority"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "reason", "field"),
    BAD,
    ids=[f"{index}-{field}-{reason}" for index, (_, reason, field) in enumerate(BAD)],
)
@pytest.mark.parametrize("kind", [gateway_pb2.GenerateRequest, gateway_pb2.GenerateStreamRequest])
def test_bad_input_is_refused_with_its_field(
    bad: gateway_pb2.GenerateRequest,
    reason: Reason,
    field: str,
    kind: Callable[[], gateway_pb2.GenerateRequest | gateway_pb2.GenerateStreamRequest],
) -> None:
    message = kind()
    message.ParseFromString(bad.SerializeToString())  # the same fields with the same numbers
    with pytest.raises(RpcError) as caught:
        parse(message, LIMITS)
    assert (caught.value.reason, caught.value.context.field) == (reason, field)
    assert caught.value.code.name == "INVALID_ARGUMENT"
    assert len(caught.value.message) < 300


def test_the_smallest_request_takes_all_defaults() -> None:
    assert parse(request("hi"), LIMITS) == GenerateSpec(
        request_id=None,
        prompt=TextPrompt("hi"),
        adapter=None,
        sampling=Sampling(),
        stopping=Stopping(),
        logprobs=None,
        priority=0,
    )


def test_the_largest_values_are_allowed() -> None:
    spec = parse(
        gateway_pb2.GenerateRequest(
            request_id="A" * 128,
            token_ids=gateway_pb2.TokenIds(ids=[0, 99]),
            adapter="a" * 64 + "@" + "9" * 15,
            sampling=common_pb2.SamplingParams(
                temperature=2,
                top_p=1,
                top_k=1000,
                min_p=1,
                seed=2**64 - 1,
                presence_penalty=-2,
                frequency_penalty=2,
                repetition_penalty=2,
            ),
            stopping=common_pb2.StopConditions(
                max_tokens=511,
                min_tokens=511,
                stop=["é" * 128] * 16,
                stop_token_ids=[99] * 64,
                ignore_eos=True,
            ),
            logprobs=0,
            priority=-100,
        ),
        LIMITS,
    )
    assert spec.prompt == TokenPrompt((0, 99))
    assert spec.adapter == AdapterName("a" * 64, version=int("9" * 15))
    assert spec.sampling.seed == 2**64 - 1
    assert spec.logprobs == 0
    assert spec.stopping.stop == ("é" * 128,) * 16


def test_a_conversation_keeps_its_order() -> None:
    spec = parse(chat(("system", ""), ("user", "é")), LIMITS)
    assert spec.prompt == ChatPrompt((Message("system", ""), Message("user", "é")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("billing-json", AdapterName("billing-json")),
        ("a@3", AdapterName("a", version=3)),
        ("0.a_b@prod-1", AdapterName("0.a_b", alias="prod-1")),
    ],
)
def test_adapters_are_named_in_three_forms(text: str, expected: AdapterName) -> None:
    assert parse(request(adapter=text), LIMITS).adapter == expected
    assert str(expected) == text


def test_the_output_gets_what_the_context_leaves() -> None:
    assert output_limit(Stopping(), 500, LIMITS, field="prompt").max_tokens == 12
    assert output_limit(Stopping(), 10, LIMITS, field="prompt").max_tokens == 64
    assert output_limit(Stopping(max_tokens=502), 10, LIMITS, field="prompt").max_tokens == 502


@pytest.mark.parametrize(
    ("stopping", "prompt_tokens", "reason", "field"),
    [
        (Stopping(), 512, Reason.PROMPT_TOO_LONG, "prompt"),
        (Stopping(max_tokens=503), 10, LIMIT, "stopping.max_tokens"),
        (Stopping(min_tokens=65), 10, LIMIT, "stopping.min_tokens"),
    ],
)
def test_prompt_and_output_must_fit_the_context(
    stopping: Stopping, prompt_tokens: int, reason: Reason, field: str
) -> None:
    with pytest.raises(RpcError) as caught:
        output_limit(stopping, prompt_tokens, LIMITS, field="prompt")
    assert (caught.value.reason, caught.value.context.field) == (reason, field)
    assert "512" in caught.value.message or "64" in caught.value.message
