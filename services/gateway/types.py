"""The values that the gateway's modules hand each other; no protobuf, no I/O."""

from dataclasses import dataclass, field
from enum import Enum

from services.common.errors import RpcError


@dataclass(frozen=True, slots=True)
class AdapterName:
    """How a client names an adapter: at most one of `version` and `alias` is set."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        selector = self.alias if self.version is None else str(self.version)
        return self.name if selector is None else f"{self.name}@{selector}"


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One immutable set of weights, as the adapter store registers it."""

    digest: str
    name: str
    version: int
    rank: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Canary:
    """The version that `percent` of an alias's requests go to."""

    version: int
    percent: int


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """An adapter as the registry has it."""

    name: str
    revision: int
    versions: dict[int, AdapterRef]  # oldest first
    aliases: dict[str, int]
    canaries: dict[str, Canary]  # by alias
    tenants: frozenset[str]  # who may use it; empty: all


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to continue, tokenised as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Tokens to continue."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation to answer."""

    messages: tuple[Message, ...]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn, defaults filled in. `seed`: None until the gateway draws one."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Stopping:
    """When generation ends. `max_tokens`: None until the prompt's length is known."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerateSpec:
    """What a client asked for, within all limits that can be checked without tokenising."""

    request_id: str | None
    prompt: Prompt
    adapter: AdapterName | None
    sampling: Sampling
    stopping: Stopping
    logprobs: int | None
    priority: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural-log probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """One generated token and its likeliest alternatives, most likely first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one request went, seconds. None: that stage has not ended."""

    queue_s: float | None = None
    adapter_load_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    adapter_tier: int = 0  # number of calumma.common.v1.AdapterTier
    cached_tokens: int | None = None  # of the context, that prefill had not to compute

    def updated(self, later: "Timings") -> "Timings":
        """These, with whatever `later` knows."""

        def pick(old: float | None, new: float | None) -> float | None:
            return old if new is None else new

        return Timings(
            pick(self.queue_s, later.queue_s),
            pick(self.adapter_load_s, later.adapter_load_s),
            pick(self.prefill_s, later.prefill_s),
            pick(self.decode_s, later.decode_s),
            later.adapter_tier or self.adapter_tier,
            self.cached_tokens if later.cached_tokens is None else later.cached_tokens,
        )


class Finish(Enum):
    """How a worker says that a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenRun:
    """What one request produced since its worker's last frame."""

    request_id: str
    attempt: int
    first_position: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish: Finish | None = None
    timings: Timings = field(default_factory=Timings)
    error: RpcError | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of an answer. `logprobs`: one per token when asked for."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]

    def __bool__(self) -> bool:
        return bool(self.text or self.token_ids)
