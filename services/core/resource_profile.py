"""What a request will take of a worker, before it runs: memory and time (UELLM's profiler).

UELLM counts the peak of a batch's KV cache as

    4 · b · l · h · (s + n)         b sequences, l layers, h hidden size, s prompt, n output tokens

keys and values at two bytes over the whole hidden size. That holds for multi-head attention in 16
bits only: with grouped queries a token has `kv_heads` heads, not all, so on its own test model
(ChatGLM2-6B: 2 groups for 32 heads) it counts sixteen times too much. Here

    2 · bytes · l · kv_heads · head_dim · (s + n)

Times are by the costs that workers measured, lengths are predicted.
"""

from dataclasses import dataclass

from services.core.bounds import require_positive
from services.core.costs import StepCosts
from services.core.types import Request


@dataclass(frozen=True, slots=True)
class KvShape:
    """The part of a model's shape that its KV cache depends on."""

    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int = 2

    def __post_init__(self) -> None:
        require_positive(
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            element_bytes=self.element_bytes,
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token."""
        return 2 * self.element_bytes * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class ResourceProfile:
    """What one request is expected to take."""

    kv_bytes: int  # when it ends
    adapter_bytes: int  # shared by all that use the adapter
    prefill_s: float  # alone on an idle worker
    decode_s: float  # its share of the steps that it takes part in


def profile_of(request: Request, shape: KvShape, costs: StepCosts) -> ResourceProfile:
    """The expected take of a request on a model of that shape."""
    adapter = request.adapter
    tokens = request.context_tokens + request.remaining_output_tokens
    return ResourceProfile(
        kv_bytes=shape.token_bytes * tokens,
        adapter_bytes=adapter.size_bytes if adapter is not None else 0,
        prefill_s=costs.prompt_s(request.context_tokens, adapter.rank if adapter else 0),
        decode_s=costs.decode_s(request),
    )


def uellm_kv_bytes(*, sequences: int, layers: int, hidden: int, tokens: int) -> int:
    """UELLM's own count, for comparison: `tokens` is prompt and output of each sequence."""
    return 4 * sequences * layers * hidden * tokens
