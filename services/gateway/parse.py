"""Turns a client's request into a GenerateSpec, or refuses it: every limit of the API is here.

Each refusal is INVALID_ARGUMENT with the path of the field at fault. Nothing here costs more than
the size of the message; what needs the prompt's tokens is checked by `output_limit`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, assert_never

from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2
from services.common.errors import Reason, RpcError
from services.gateway.types import (
    AdapterName,
    ChatPrompt,
    GenerateSpec,
    Message,
    Prompt,
    Sampling,
    Stopping,
    TextPrompt,
    TokenPrompt,
)

GenerateMessage = gateway_pb2.GenerateRequest | gateway_pb2.GenerateStreamRequest

MESSAGES_MAX: Final = 1024
STOP_STRINGS_MAX: Final = 16
STOP_BYTES_MAX: Final = 256
STOP_TOKEN_IDS_MAX: Final = 64
LOGPROBS_MAX: Final = 20
PRIORITY_MAX: Final = 100
ROLES: Final = ("system", "user", "assistant")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ALIAS = re.compile(r"[a-z0-9._-]{1,64}")
_DIGITS = re.compile(r"[0-9]+")
_VERSION = re.compile(r"[1-9][0-9]{0,14}")  # exact in a double, as JSON readers use


@dataclass(frozen=True, slots=True)
class Limits:
    """What the base model and the settings allow."""

    context_tokens: int  # prompt plus output
    vocab_size: int
    prompt_bytes: int
    default_max_tokens: int


def parse(message: GenerateMessage, limits: Limits) -> GenerateSpec:
    """Read a request. Raises RpcError."""
    return GenerateSpec(
        request_id=_request_id(message.request_id),
        prompt=_prompt(message, limits),
        adapter=adapter_name(message.adapter) if message.adapter else None,
        sampling=_sampling(message.sampling),
        stopping=_stopping(message.stopping, limits),
        logprobs=(
            _whole(message, "logprobs", 0, (0, LOGPROBS_MAX))
            if message.HasField("logprobs")
            else None
        ),
        priority=_within("priority", message.priority, (-PRIORITY_MAX, PRIORITY_MAX)),
    )


def output_limit(stopping: Stopping, prompt_tokens: int, limits: Limits, *, field: str) -> Stopping:
    """Fill in `max_tokens` now that the length of the prompt, given in `field`, is known.

    Raises RpcError.
    """
    left = limits.context_tokens - prompt_tokens
    if left < 1:
        raise RpcError(
            Reason.PROMPT_TOO_LONG,
            f"the prompt has {prompt_tokens} tokens; the context of {limits.context_tokens} "
            f"leaves room for {limits.context_tokens - 1} and one token of output",
            field=field,
        )
    if stopping.max_tokens is not None and stopping.max_tokens > left:
        raise _over(
            "stopping.max_tokens",
            f"{stopping.max_tokens} tokens after a prompt of {prompt_tokens} are more than "
            f"the context of {limits.context_tokens}",
        )
    max_tokens = stopping.max_tokens or min(left, limits.default_max_tokens)
    if stopping.min_tokens > max_tokens:
        raise _over(
            "stopping.min_tokens",
            f"{stopping.min_tokens} is more than the {max_tokens} tokens that may be generated",
        )
    return replace(stopping, max_tokens=max_tokens)


def adapter_name(text: str) -> AdapterName:
    """Read "name", "name@version" or "name@alias". Raises RpcError."""
    name, at, selector = text.partition("@")
    if _NAME.fullmatch(name):
        if not at:
            return AdapterName(name)
        if _VERSION.fullmatch(selector):
            return AdapterName(name, version=int(selector))
        if _ALIAS.fullmatch(selector) and not _DIGITS.fullmatch(selector):
            return AdapterName(name, alias=selector)
    raise _invalid("adapter", "not of the form name, name@version or name@alias")


def _request_id(text: str) -> str | None:
    if not text:
        return None
    if not _REQUEST_ID.fullmatch(text):
        raise _invalid("request_id", "more than 128 characters, or others than [A-Za-z0-9._:-]")
    return text


def _prompt(message: GenerateMessage, limits: Limits) -> Prompt:
    # `input` is a proto3 oneof: a client can set at most one.
    kind = message.WhichOneof("input")
    match kind:
        case None:
            raise _invalid("input", "one of prompt, token_ids and chat is required")
        case "prompt":
            return _text_prompt(message.prompt, limits)
        case "token_ids":
            return _token_prompt(message.token_ids.ids, limits)
        case "chat":
            return _chat_prompt(message.chat.messages, limits)
        case _:
            assert_never(kind)


def _text_prompt(text: str, limits: Limits) -> TextPrompt:
    if not text:
        raise RpcError(Reason.PROMPT_EMPTY, "the prompt is empty", field="prompt")
    _check_bytes("prompt", len(text.encode()), limits)
    return TextPrompt(text)


def _token_prompt(ids: Sequence[int], limits: Limits) -> TokenPrompt:
    if not ids:
        raise RpcError(Reason.PROMPT_EMPTY, "there are no tokens", field="token_ids.ids")
    if len(ids) >= limits.context_tokens:
        output_limit(Stopping(), len(ids), limits, field="token_ids.ids")
    _check_tokens("token_ids.ids", ids, limits)
    return TokenPrompt(tuple(ids))


def _chat_prompt(messages: Sequence[gateway_pb2.ChatMessage], limits: Limits) -> ChatPrompt:
    if not messages:
        raise RpcError(Reason.PROMPT_EMPTY, "there are no messages", field="chat.messages")
    if len(messages) > MESSAGES_MAX:
        raise _over("chat.messages", f"{len(messages)} are more than {MESSAGES_MAX}")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise _invalid(f"chat.messages[{index}].role", f"not one of {', '.join(ROLES)}")
    _check_bytes("chat", sum(len(message.content.encode()) for message in messages), limits)
    return ChatPrompt(tuple(Message(message.role, message.content) for message in messages))


def _sampling(params: common_pb2.SamplingParams) -> Sampling:
    return Sampling(
        temperature=_real(params, "temperature", 0.0, (0.0, 2.0)),
        top_p=_positive(params, "top_p", 1.0, 1.0),
        top_k=_whole(params, "top_k", 0, (0, 1000), path="sampling."),
        min_p=_real(params, "min_p", 0.0, (0.0, 1.0)),
        presence_penalty=_real(params, "presence_penalty", 0.0, (-2.0, 2.0)),
        frequency_penalty=_real(params, "frequency_penalty", 0.0, (-2.0, 2.0)),
        repetition_penalty=_positive(params, "repetition_penalty", 1.0, 2.0),
        seed=params.seed if params.HasField("seed") else None,
    )


def _stopping(conditions: common_pb2.StopConditions, limits: Limits) -> Stopping:
    most = (1, limits.context_tokens - 1)
    max_tokens = (
        _whole(conditions, "max_tokens", 1, most, path="stopping.")
        if conditions.HasField("max_tokens")
        else None
    )
    min_tokens = _whole(conditions, "min_tokens", 0, (0, most[1]), path="stopping.")
    if max_tokens is not None and min_tokens > max_tokens:
        raise _invalid("stopping.min_tokens", f"{min_tokens} is more than max_tokens {max_tokens}")
    if len(conditions.stop_token_ids) > STOP_TOKEN_IDS_MAX:
        raise _over(
            "stopping.stop_token_ids",
            f"{len(conditions.stop_token_ids)} are more than {STOP_TOKEN_IDS_MAX}",
        )
    _check_tokens("stopping.stop_token_ids", conditions.stop_token_ids, limits)
    return Stopping(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=_stop_strings(conditions.stop),
        stop_token_ids=tuple(conditions.stop_token_ids),
        ignore_eos=conditions.ignore_eos,
    )


def _stop_strings(texts: Sequence[str]) -> tuple[str, ...]:
    if len(texts) > STOP_STRINGS_MAX:
        raise _over("stopping.stop", f"{len(texts)} are more than {STOP_STRINGS_MAX}")
    for index, text in enumerate(texts):
        if not text:
            raise _invalid(f"stopping.stop[{index}]", "empty")
        if (size := len(text.encode())) > STOP_BYTES_MAX:
            raise _over(f"stopping.stop[{index}]", f"{size} bytes are more than {STOP_BYTES_MAX}")
    return tuple(texts)


def _real(
    params: common_pb2.SamplingParams, name: Any, default: float, bounds: tuple[float, float]
) -> float:
    if not params.HasField(name):
        return default
    value: float = getattr(params, name)
    if not math.isfinite(value):
        raise _invalid(f"sampling.{name}", f"{value} is not a finite number")
    if not bounds[0] <= value <= bounds[1]:
        raise _invalid(f"sampling.{name}", f"not within {bounds[0]:g} to {bounds[1]:g}")
    return value


def _positive(params: common_pb2.SamplingParams, name: str, default: float, most: float) -> float:
    value = _real(params, name, default, (0.0, most))
    if value == 0:
        raise _invalid(f"sampling.{name}", f"not more than 0 and up to {most:g}")
    return value


def _whole(
    message: Any, name: str, default: int, bounds: tuple[int, int], *, path: str = ""
) -> int:
    value: int = getattr(message, name) if message.HasField(name) else default
    return _within(f"{path}{name}", value, bounds)


def _within(field: str, value: int, bounds: tuple[int, int]) -> int:
    if value < bounds[0]:
        raise _invalid(field, f"{value} is less than {bounds[0]}")
    if value > bounds[1]:
        raise _over(field, f"{value} is more than {bounds[1]}")
    return value


def _check_bytes(field: str, size_bytes: int, limits: Limits) -> None:
    if size_bytes > limits.prompt_bytes:
        raise RpcError(
            Reason.PROMPT_TOO_LONG,
            f"the prompt has {size_bytes} bytes, the limit is {limits.prompt_bytes}",
            field=field,
        )


def _check_tokens(field: str, ids: Sequence[int], limits: Limits) -> None:
    for index, token_id in enumerate(ids):
        if not 0 <= token_id < limits.vocab_size:
            raise _invalid(
                f"{field}[{index}]",
                f"{token_id} is not a token of the vocabulary of {limits.vocab_size}",
            )


def _invalid(field: str, message: str) -> RpcError:
    return RpcError(Reason.INVALID_FIELD, f"{field}: {message}", field=field)


def _over(field: str, message: str) -> RpcError:
    return RpcError(Reason.FIELD_LIMIT_EXCEEDED, f"{field}: {message}", field=field)
