"""A request inside a worker: how far its tokens are known and computed."""

from dataclasses import dataclass

from services.core.decisions import EndRequest, ExpireRequest
from services.core.events import RunningRequest
from services.core.ledger import Need, need_of_tokens
from services.core.types import AdapterDigest, Attempt, Capacity, Request


@dataclass(slots=True, eq=False)
class Sequence:
    """Known tokens are the context and what was sampled here; computed ones are in the KV cache."""

    request: Request
    order: int  # of arrival at this worker
    known_tokens: int
    computed_tokens: int = 0
    generated_tokens: int = 0
    is_admitted: bool = False
    is_started: bool = False
    leave_as: EndRequest | ExpireRequest | None = None  # once the step that it is in has ended

    @property
    def attempt(self) -> Attempt:
        """Which run of the request this is."""
        return self.request.attempt

    @property
    def digest(self) -> AdapterDigest | None:
        """Its adapter; None for the base model."""
        return self.request.adapter.digest if self.request.adapter is not None else None

    @property
    def uncomputed_tokens(self) -> int:
        """Known tokens that a step must still compute; the last of them samples the next."""
        return self.known_tokens - self.computed_tokens

    @property
    def remaining_output_tokens(self) -> int:
        """Tokens that it is expected to generate yet; at least one."""
        return max(1, self.request.remaining_output_tokens - self.generated_tokens)

    def need(self, capacity: Capacity) -> Need:
        """What it is expected to take until its end."""
        tokens = self.known_tokens + self.remaining_output_tokens
        return need_of_tokens(tokens, self.request.adapter, capacity)

    def finish_step(self, tokens: int, *, has_sampled: bool) -> None:
        """A step computed so many of its tokens and perhaps sampled one more."""
        self.computed_tokens += tokens
        if has_sampled:
            self.known_tokens += 1
            self.generated_tokens += 1
        assert self.computed_tokens <= self.known_tokens

    def restart(self) -> None:
        """Its KV cache is gone: all known tokens are to be computed again."""
        self.computed_tokens = 0
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
