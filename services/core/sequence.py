"""A request inside a worker: how far its tokens are known and computed."""

from services.core.decisions import EndRequest, ExpireRequest, StepWork
from services.core.events import RunningRequest
from services.core.ledger import Need, need_of_tokens
from services.core.prefix import CachedBlock
from services.core.types import Capacity, Request, Reserve


class Sequence:
    """Known tokens are the context and what was sampled here; computed ones are in the KV cache.

    What never changes is kept beside the request, because steps ask for it all the time.

    While its adapter is coming, `ready_layers` says how far; None: all of it is here. A chunk that
    was begun with part of the layers stays `chunk_tokens` long until it has passed them all; only
    then are its tokens computed.
    """

    __slots__ = (
        "attempt",
        "blocks",
        "cached",
        "chunk_tokens",
        "computed_tokens",
        "decode",
        "digest",
        "first_token_s",
        "held_tokens",
        "is_admitted",
        "is_started",
        "keys",
        "known_tokens",
        "leave_as",
        "order",
        "passed_layers",
        "promised_blocks",
        "rank",
        "ready_layers",
        "request",
        "request_id",
        "told_blocks",
    )

    def __init__(self, request: Request, order: int) -> None:
        self.request = request
        self.order = order  # of arrival at this worker
        self.attempt = request.attempt
        self.request_id = request.attempt.request_id
        self.digest = request.adapter.digest if request.adapter is not None else None
        self.rank = request.adapter.rank if request.adapter is not None else 0
        self.decode = StepWork(self.request_id, 1, samples=True)  # its work in every decode step
        self.keys = request.prefix_keys  # of its full blocks, as far as they are known
        self.known_tokens = request.context_tokens
        self.computed_tokens = 0
        self.chunk_tokens = 0  # of the chunk that has passed some layers; 0: there is none
        self.passed_layers = 0  # by that chunk
        self.ready_layers: int | None = None
        self.blocks: list[int] = []  # of KV cache, in order
        self.cached: list[CachedBlock] = []  # what the first so many of them are, listed ones
        self.told_blocks = 0  # the first so many of them the engine knows
        self.held_tokens = 0  # that they have room for
        self.promised_blocks = 0  # besides those that are listed
        self.first_token_s: float | None = None
        self.is_admitted = False
        self.is_started = False
        self.leave_as: EndRequest | ExpireRequest | None = None  # once its step has ended

    @property
    def generated_tokens(self) -> int:
        """Tokens that this attempt has sampled."""
        return self.known_tokens - self.request.context_tokens

    @property
    def own_blocks(self) -> int:
        """Blocks that nobody else can use."""
        return len(self.blocks) - len(self.cached)

    @property
    def uncomputed_tokens(self) -> int:
        """Known tokens that a step must still compute; the last of them samples the next."""
        return self.known_tokens - self.computed_tokens

    @property
    def remaining_output_tokens(self) -> int:
        """Tokens that it is expected to generate yet; at least one."""
        return max(1, self.request.remaining_output_tokens - self.generated_tokens)

    def reserved_tokens(self, reserve: Reserve) -> int:
        """Tokens that it is promised room to generate yet; at least one."""
        return max(1, self.request.reserved_output_tokens(reserve) - self.generated_tokens)

    def need(self, capacity: Capacity, reserve: Reserve) -> Need:
        """What it is promised until its end."""
        tokens = self.known_tokens + self.reserved_tokens(reserve)
        return need_of_tokens(tokens, self.request.adapter, capacity)

    def finish_part(self, until_layer: int) -> None:
        """A step computed its chunk up to that layer."""
        assert self.chunk_tokens
        assert self.passed_layers < until_layer
        self.passed_layers = until_layer

    def finish_step(self, tokens: int, *, has_sampled: bool, now: float) -> None:
        """A step computed so many of its tokens and perhaps sampled one more."""
        assert self.chunk_tokens in {0, tokens}
        self.chunk_tokens = self.passed_layers = 0
        self.computed_tokens += tokens
        if has_sampled:
            self.known_tokens += 1
            if self.first_token_s is None:
                self.first_token_s = now
        assert self.computed_tokens <= self.known_tokens

    def next_token_due_s(self, target_s: float) -> float:
        """When its next token must be there for its mean time between tokens to be the target."""
        assert self.first_token_s is not None
        return self.first_token_s + target_s * self.generated_tokens

    def restart(self) -> None:
        """Its KV cache is gone: all known tokens are to be computed again."""
        self.computed_tokens = self.chunk_tokens = self.passed_layers = 0
        self.ready_layers = None
        self.blocks, self.cached = [], []
        self.told_blocks = self.held_tokens = self.promised_blocks = 0
        self.is_admitted = False
        self.is_started = False

    def announcement(self) -> RunningRequest:
        """How a worker that attaches announces it."""
        return RunningRequest(
            attempt=self.attempt,
            gateway_id=self.request.gateway_id,
            adapter_digest=self.digest,
            context_tokens=self.known_tokens,
            remaining_output_tokens=self.remaining_output_tokens,
        )
