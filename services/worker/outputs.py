"""What a request has produced, and how far its gateway has it.

An `Output` grows by one token per step and ends exactly once. Positions count the output tokens of
all attempts, so that a later attempt goes on where the earlier one stopped.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from services.common.errors import RpcError
from services.core.types import Attempt, GatewayId


class Tier(StrEnum):
    """Where a request's adapter was when the request came."""

    NONE = "none"  # the base model needs none
    DEVICE = "device"
    HOST = "host"
    STORE = "store"


class Finish(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of each stage; None until the stage has ended.

    `cached_tokens`: of its context, that prefill had not to compute; None before prefill.
    """

    queue_s: float | None = None
    adapter_load_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    tier: Tier = Tier.NONE
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ended. `error` is set exactly when `finish` is ERROR."""

    finish: Finish
    timings: Timings
    error: RpcError | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probability of one output token, and of the likeliest ones, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class Output:
    """The tokens of one attempt. `logprobs` has an entry per token when the request wants them."""

    attempt: Attempt
    gateway_id: GatewayId
    first_position: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ending: Ending | None = None
    sent_tokens: int = 0  # handed to the gateway's present stream
    is_ending_sent: bool = False

    @property
    def end_position(self) -> int:
        """Output tokens of all attempts so far."""
        return self.first_position + len(self.token_ids)

    @property
    def has_unsent(self) -> bool:
        """True if the gateway's present stream lacks something."""
        if self.sent_tokens < len(self.token_ids):
            return True
        return self.ending is not None and not self.is_ending_sent

    def end(self, ending: Ending) -> None:
        """Set the ending. A request ends once."""
        assert self.ending is None
        self.ending = ending

    def rewind(self, next_position: int) -> None:
        """Send again from this position on, and the ending too."""
        skipped = next_position - self.first_position
        self.sent_tokens = min(max(skipped, 0), len(self.token_ids))
        self.is_ending_sent = False

    def take(self, tokens_max: int) -> "Slice":
        """The next unsent tokens; they count as sent from now on."""
        start = self.sent_tokens
        self.sent_tokens = min(start + tokens_max, len(self.token_ids))
        is_last = self.ending is not None and self.sent_tokens == len(self.token_ids)
        self.is_ending_sent = self.is_ending_sent or is_last
        return Slice(
            attempt=self.attempt,
            first_position=self.first_position + start,
            token_ids=self.token_ids[start : self.sent_tokens],
            logprobs=self.logprobs[start : self.sent_tokens],
            ending=self.ending if is_last else None,
        )


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of one request's tokens on its way to the gateway."""

    attempt: Attempt
    first_position: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    ending: Ending | None
