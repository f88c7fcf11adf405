"""What a policy believes that work costs: seconds of a step, of a load, of a whole request.

Linear in what a step computes, because that is how steps behave (weights are read once, prompt
tokens are compute, cached tokens and adapter rows are reads). The coefficients are fitted to the
steps that workers have measured (`services.core.costfit`). These are beliefs: a simulator has
costs of its own, of another type, and no policy ever sees them.
"""

from dataclasses import dataclass

from services.core.types import Adapter, Request


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one step computes. Sums over ranks count the adapter of each token's sequence.

    What passes part of the layers only counts with its share of them.
    """

    prefill_tokens: float = 0
    prefill_rank_tokens: float = 0  # sum of tokens x rank
    decode_sequences: float = 0
    decode_ranks: float = 0
    cached_tokens: int = 0  # KV cache that the step reads


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Coefficients in seconds. The defaults are a mid-size GPU's, until something is measured."""

    step_s: float = 0.03  # of any step
    prefill_s: float = 0.0  # more, once a step holds a prompt chunk; may be negative
    prefill_token_s: float = 2e-4
    prefill_rank_token_s: float = 1e-6
    decode_sequence_s: float = 1e-4
    decode_rank_s: float = 4e-6
    cached_token_s: float = 1e-6
    load_byte_s: float = 1e-10  # adapter bytes from host memory to the device
    batch: float = 16.0  # decoding sequences of a usual step: who shares a step's fixed cost

    def step_time_s(self, shape: StepShape) -> float:
        """Seconds of one step."""
        return (
            self.step_s
            + (self.prefill_s if shape.prefill_tokens else 0.0)
            + self.prefill_token_s * shape.prefill_tokens
            + self.prefill_rank_token_s * shape.prefill_rank_tokens
            + self.decode_sequence_s * shape.decode_sequences
            + self.decode_rank_s * shape.decode_ranks
            + self.cached_token_s * shape.cached_tokens
        )

    def prompt_s(self, tokens: int, rank: int) -> float:
        """Seconds to compute a prompt alone: what its first token takes on an idle worker."""
        per_token_s = self.prefill_token_s + self.prefill_rank_token_s * rank
        return max(0.0, self.step_s + self.prefill_s + per_token_s * tokens)

    def load_s(self, adapter: Adapter) -> float:
        """Seconds to bring an adapter from host memory to the device."""
        return self.load_byte_s * adapter.size_bytes

    def decode_s(self, request: Request) -> float:
        """Seconds of a worker that decoding its output takes, its share of shared steps."""
        rank = request.adapter.rank if request.adapter is not None else 0
        output_tokens = request.remaining_output_tokens
        cached_tokens = request.context_tokens + output_tokens / 2
        per_token_s = (
            self.step_s / max(1.0, self.batch)
            + self.decode_sequence_s
            + self.decode_rank_s * rank
            + self.cached_token_s * cached_tokens
        )
        return per_token_s * output_tokens

    def service_s(self, request: Request, *, is_near: bool = True) -> float:
        """Seconds of a worker that it takes in all, its adapter's load too if not `is_near`."""
        rank = request.adapter.rank if request.adapter is not None else 0
        load_s = 0.0 if is_near or request.adapter is None else self.load_s(request.adapter)
        return load_s + self.prompt_s(request.context_tokens, rank) + self.decode_s(request)
