"""The values that events and decisions carry: requests, adapters and what a worker can hold."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, NewType

RequestId = NewType("RequestId", str)
GatewayId = NewType("GatewayId", str)
WorkerId = NewType("WorkerId", str)
TenantId = NewType("TenantId", str)
AdapterDigest = NewType("AdapterDigest", str)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a policy may know of an adapter. `size_bytes` is what a worker's memory is charged."""

    digest: AdapterDigest
    rank: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Pin:
    """An adapter that should stay in device memory, and why: as whoever pinned it says."""

    adapter: Adapter
    reason: str


class Attempt(NamedTuple):
    """One submission of a request. A later attempt supersedes an earlier one.

    A tuple, because it is the key of most that is looked up: its hash costs a tenth of a
    dataclass's.
    """

    request_id: RequestId
    number: int = 1


class Reserve(StrEnum):
    """How much output a request is promised memory for when it is admitted."""

    MAX = "max"  # all that it may generate: S-LoRA's code
    PREDICTED = "predicted"  # what is expected: Chameleon
    QUANTILE = "quantile"  # what nine of ten such requests stay within


@dataclass(frozen=True, slots=True)
class Request:
    """A request as both machines see it: sizes, owner and urgency, but not its tokens.

    `context_tokens` counts the tokens known at submission: the prompt and, on a later attempt,
    the output that the client has already. `prior_output_tokens` is that output. `prefix_keys` are
    those of the context's full blocks (`services.core.prefix_keys`); none: it shares nothing.
    """

    attempt: Attempt
    gateway_id: GatewayId
    tenant_id: TenantId
    adapter: Adapter | None
    context_tokens: int
    prior_output_tokens: int
    max_output_tokens: int  # in total, all attempts counted
    predicted_output_tokens: int  # in total, all attempts counted
    output_tokens_q90: int  # likewise; nine of ten such requests end within it
    priority: int
    arrived_s: float
    deadline_s: float | None
    prefix_keys: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def remaining_output_tokens(self) -> int:
        """Tokens this attempt is expected to generate; at least one, at most what it may."""
        return self._left(self.predicted_output_tokens)

    @property
    def sure_output_tokens(self) -> int:
        """Tokens that nine of ten such attempts generate at least; one where little is known.

        As far below the expected number as the 90th percentile is above it.
        """
        return self._left(2 * self.predicted_output_tokens - self.output_tokens_q90)

    def reserved_output_tokens(self, reserve: Reserve) -> int:
        """Tokens this attempt is promised memory for; at least one, at most what it may."""
        if reserve is Reserve.PREDICTED:
            return self._left(self.predicted_output_tokens)
        if reserve is Reserve.QUANTILE:
            return self._left(max(self.predicted_output_tokens, self.output_tokens_q90))
        return self._left(self.max_output_tokens)

    def _left(self, total_tokens: int) -> int:
        return max(1, min(total_tokens, self.max_output_tokens) - self.prior_output_tokens)


@dataclass(frozen=True, slots=True)
class Capacity:
    """Limits of a worker that do not change while it lives."""

    pool_blocks: int
    block_bytes: int
    block_tokens: int
    max_requests: int
    max_context_tokens: int
    # Layers of the model, where steps can compute some of them (see `StepWork.until_layer`).
    num_layers: int = 0

    @property
    def token_bytes(self) -> float:
        """Bytes of KV cache per token."""
        return self.block_bytes / self.block_tokens

    def kv_blocks(self, tokens: int) -> int:
        """Blocks that the KV cache of so many tokens takes."""
        return -(-tokens // self.block_tokens)

    def adapter_blocks(self, adapter: Adapter) -> int:
        """Blocks that an adapter takes: its true bytes, rounded up once."""
        return -(-adapter.size_bytes // self.block_bytes)
