"""What a WorkItem and a WorkerHello must be before the core may see them.

A gateway resolves and limits everything before it submits, so whatever is refused here is a bug of
a peer. It costs that peer one request, never its stream.
"""

import math
import re
from typing import Final

from calumma.common.v1 import common_pb2
from calumma.scheduler.v1 import scheduler_pb2
from services.common.errors import Reason, RpcError

ID_CHARACTERS_MAX: Final = 200  # a client's id is 128 at most, a gateway adds its suffix
STOP_TOKEN_IDS_MAX: Final = 64
LOGPROBS_MAX: Final = 20
PRIORITY_MAX: Final = 100
WAITED_S_MAX: Final = 1e6

_ID = re.compile(rf"[!-~]{{1,{ID_CHARACTERS_MAX}}}")  # visible ASCII
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ADDRESS = re.compile(r"\S{1,253}:\d{1,5}")
# Bounds of each sampling field, inclusive; the proto's comments say the same.
_SAMPLING: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0.0, 2.0),
    "top_p": (math.ulp(0.0), 1.0),
    "top_k": (0, 1000),
    "min_p": (0.0, 1.0),
    "seed": (0, 2**64 - 1),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (math.ulp(0.0), 2.0),
}


def check_id(value: str, field: str) -> None:
    """Refuse an id that is empty, too long, or not fit for logs and labels."""
    _require(_ID.fullmatch(value) is not None, field, f"must match {_ID.pattern}")


def check_work_item(item: scheduler_pb2.WorkItem, *, gateway_id: str) -> None:
    """Raise INVALID_FIELD with the first field of the item that breaks the contract."""
    check_id(item.request_id, "request_id")
    _require(item.attempt >= 1, "attempt", "counts from 1")
    _require(item.gateway_id == gateway_id, "gateway_id", "is not the one of the stream's hello")
    check_id(item.tenant, "tenant")
    _check_tokens(item)
    if item.HasField("adapter"):
        _check_adapter(item.adapter)
    _check_sampling(item.sampling)
    _check_stopping(item)
    _require(0 <= item.logprobs <= LOGPROBS_MAX, "logprobs", f"must be 0 to {LOGPROBS_MAX}")
    _require(abs(item.priority) <= PRIORITY_MAX, "priority", f"must be within {PRIORITY_MAX} of 0")
    _require(item.predicted_output_tokens >= 1, "predicted_output_tokens", "must be 1 or more")
    _require(item.output_tokens_q90 >= 0, "output_tokens_q90", "must not be negative")
    in_range = 0 <= item.waited_s <= WAITED_S_MAX
    _require(in_range, "waited_s", f"must be 0 to {WAITED_S_MAX:g}")
    _require(len(item.traceparent) <= ID_CHARACTERS_MAX, "traceparent", "is too long")


def check_worker_hello(hello: scheduler_pb2.WorkerHello) -> None:
    """Raise INVALID_FIELD with the first field of the hello that breaks the contract."""
    check_id(hello.worker_id, "hello.worker_id")
    _require(_ADDRESS.fullmatch(hello.address) is not None, "hello.address", "must be host:port")
    check_id(hello.base_model_digest, "hello.base_model_digest")
    capacity = hello.capacity
    for descriptor in capacity.DESCRIPTOR.fields:
        value = getattr(capacity, descriptor.name)
        _require(value >= 1, f"hello.capacity.{descriptor.name}", "must be 1 or more")


def _check_tokens(item: scheduler_pb2.WorkItem) -> None:
    _require(len(item.token_ids) > 0, "token_ids", "must not be empty")
    _require(min(item.token_ids) >= 0, "token_ids", "must not be negative")
    in_range = 1 <= item.prompt_tokens <= len(item.token_ids)
    _require(in_range, "prompt_tokens", "must be 1 to the number of token_ids")


def _check_adapter(adapter: common_pb2.AdapterRef) -> None:
    is_digest = _DIGEST.fullmatch(adapter.digest) is not None
    _require(is_digest, "adapter.digest", f"must match {_DIGEST.pattern}")
    _require(adapter.rank >= 1, "adapter.rank", "must be 1 or more")
    _require(adapter.size_bytes >= 1, "adapter.size_bytes", "must be 1 or more")


def _check_sampling(sampling: common_pb2.SamplingParams) -> None:
    for name, (least, most) in _SAMPLING.items():
        field = f"sampling.{name}"
        _require(sampling.HasField(name), field, "must be set")  # type: ignore[arg-type]
        # NaN compares false with everything, so it is refused here too.
        _require(least <= getattr(sampling, name) <= most, field, f"must be {least} to {most}")


def _check_stopping(item: scheduler_pb2.WorkItem) -> None:
    stopping = item.stopping
    prior_tokens = len(item.token_ids) - item.prompt_tokens
    more = stopping.max_tokens > prior_tokens
    _require(more, "stopping.max_tokens", "must leave at least one token to generate")
    in_range = 0 <= stopping.min_tokens <= stopping.max_tokens
    _require(in_range, "stopping.min_tokens", "must be 0 to max_tokens")
    _require(not stopping.stop, "stopping.stop", "stop strings stay at the gateway")
    few = len(stopping.stop_token_ids) <= STOP_TOKEN_IDS_MAX
    _require(few, "stopping.stop_token_ids", f"at most {STOP_TOKEN_IDS_MAX}")


def _require(condition: bool, field: str, message: str) -> None:  # noqa: FBT001 - reads as assert
    if not condition:
        raise RpcError(Reason.INVALID_FIELD, f"{field}: {message}", field=field)
