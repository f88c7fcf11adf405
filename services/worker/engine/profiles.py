"""How long hardware takes: the costs of the simulated engine, live and in `bench.sim`.

`a40-llama-7b`: Llama-7B in fp16 on one A40 with 60,000 cached tokens. The coefficients are a fit to
single-request times to first token published for adapters of rank 8 to 128 (74.1, 78.7, 88.1, 106.8
and 144.2 ms) and to the shares of loading and adapter compute in them; modelled, not measured.
`a40-24g-llama-7b`: the same card with half its memory. Of an A40's 45 GiB the pool above takes
29.3, the weights 12.6 and the rest 3.1; a card of 24 GiB that holds the latter two has 8.3 GiB,
17,000 tokens, for the pool.
`a100-llama-7b`, `h200-llama-8b`: derived from the A40's by the ratios of published peak compute
(149.7, 312 and 989.5 dense fp16 TFLOP/s) and memory bandwidth (696, 2039 and 4800 GB/s), see
`_derived`; modelled, and less certain than the A40's.
`cpu-smollm2`: SmolLM2-135M in bf16 on two idle CPU cores, fitted to this engine's own decode steps
of 1, 8 and 32 sequences (10.5, 17.3 and 29.6 ms; 38.5 ms with 32 over eight adapters and the base)
and to its prefill of 2,300 tokens/s.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one step computes. A sum over ranks counts the adapter of each sequence."""

    prefill_tokens: int
    prefill_rank_tokens: int  # sum of tokens x rank
    decode_sequences: int
    decode_ranks: int
    cached_tokens: int  # KV cache that is read: contexts of decodes, prefixes of prompt chunks
    has_adapters: bool


@dataclass(frozen=True, slots=True)
class PartLoad:
    """A chunk that passes a share of the layers, because its adapter is still coming or was."""

    tokens: int
    rank: int
    share: float


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """A device and the model on it. Coefficients in milliseconds.

    A step reads the weights once (`weights_ms`) or computes longer than that; the rest is added.
    """

    name: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_context_tokens: int
    num_layers: int
    kv_bytes_per_token: int
    memory_bytes: int
    fixed_ms: float
    weights_ms: float
    token_ms: float  # per prefill token
    sequence_ms: float  # per decoding sequence
    cached_token_ms: float
    prefill_lora_ms: float  # once, when a prefill chunk is in the step
    decode_lora_ms: float  # once, when there is none
    rank_token_ms: float
    decode_rank_ms: float
    load_bytes_per_s: float  # host to device

    def step_s(self, load: StepLoad | None, parts: Sequence[PartLoad] = ()) -> float:
        """Seconds of a step. `load`: all that passes every layer; None: nothing does."""
        whole_ms = self.fixed_ms if load is None else self._whole_ms(load)
        return (whole_ms + sum(self._part_ms(part) for part in parts)) / 1000

    def load_s(self, size_bytes: int) -> float:
        return size_bytes / self.load_bytes_per_s

    def _whole_ms(self, load: StepLoad) -> float:
        compute_ms = max(self.weights_ms, self.token_ms * load.prefill_tokens)
        decode_ms = (
            self.sequence_ms * load.decode_sequences + self.cached_token_ms * load.cached_tokens
        )
        return self.fixed_ms + compute_ms + decode_ms + self._lora_ms(load)

    def _part_ms(self, part: PartLoad) -> float:
        """It runs by itself, so its layers' weights are read for it again."""
        compute_ms = max(self.weights_ms, self.token_ms * part.tokens)
        rank_ms = self.rank_token_ms * part.tokens * part.rank
        return (compute_ms + self.prefill_lora_ms + rank_ms) * part.share

    def _lora_ms(self, load: StepLoad) -> float:
        if not load.has_adapters:
            return 0.0
        launch_ms = self.prefill_lora_ms if load.prefill_tokens else self.decode_lora_ms
        return (
            launch_ms
            + self.rank_token_ms * load.prefill_rank_tokens
            + self.decode_rank_ms * load.decode_ranks
        )


_LLAMA_7B_KV_BYTES = 2 * 32 * 4096 * 2
_LLAMA_8B_KV_BYTES = 2 * 32 * 8 * 128 * 2
_SMOLLM2_KV_BYTES = 2 * 30 * 3 * 64 * 2


def _derived(
    base: HardwareProfile,
    *,
    name: str,
    compute: float,
    bandwidth: float,
    parameters: float = 1.0,
    kv_bytes_per_token: int,
    pool_tokens: int,
    link: float = 1.0,
) -> HardwareProfile:
    """The base on a device so many times as fast, for a model so many times as large.

    Weights and cached tokens are read, prompt tokens computed. LoRA rows are read, too: at the
    fitted 1.3 us per token and rank the kernels reach 1 % of the card's peak compute. What the host
    does per step, per launch and per sequence stays as it is.
    """
    kv_share = kv_bytes_per_token / base.kv_bytes_per_token
    return replace(
        base,
        name=name,
        kv_bytes_per_token=kv_bytes_per_token,
        memory_bytes=pool_tokens * kv_bytes_per_token,
        weights_ms=base.weights_ms * parameters / bandwidth,
        token_ms=base.token_ms * parameters / compute,
        cached_token_ms=base.cached_token_ms * kv_share / bandwidth,
        rank_token_ms=base.rank_token_ms / bandwidth,
        decode_rank_ms=base.decode_rank_ms / bandwidth,
        load_bytes_per_s=base.load_bytes_per_s * link,
    )


_A40 = HardwareProfile(
    name="a40-llama-7b",
    vocab_size=32_000,
    eos_token_ids=(2,),
    max_context_tokens=4096,
    num_layers=32,
    kv_bytes_per_token=_LLAMA_7B_KV_BYTES,
    memory_bytes=60_000 * _LLAMA_7B_KV_BYTES,
    fixed_ms=6.0,
    weights_ms=19.4,
    token_ms=0.173,
    sequence_ms=0.1,
    cached_token_ms=1.08e-3,
    prefill_lora_ms=11.5,
    decode_lora_ms=5.0,
    rank_token_ms=1.29e-3,
    decode_rank_ms=0.0042,
    load_bytes_per_s=10.15 * 2**20 * 1000,
)

PROFILES: Final = {
    profile.name: profile
    for profile in (
        _A40,
        replace(_A40, name="a40-24g-llama-7b", memory_bytes=17_000 * _LLAMA_7B_KV_BYTES),
        # 80 GiB less the same 15.7 GiB.
        _derived(
            _A40,
            name="a100-llama-7b",
            compute=312 / 149.7,
            bandwidth=2039 / 696,
            kv_bytes_per_token=_LLAMA_7B_KV_BYTES,
            pool_tokens=131_000,
        ),
        # 139 GiB less 15 of weights and 4; PCIe 5 instead of 4.
        _derived(
            _A40,
            name="h200-llama-8b",
            compute=989.5 / 149.7,
            bandwidth=4800 / 696,
            parameters=8.03 / 6.74,
            kv_bytes_per_token=_LLAMA_8B_KV_BYTES,
            pool_tokens=983_000,
            link=2.0,
        ),
        HardwareProfile(
            name="cpu-smollm2",
            vocab_size=49_152,
            eos_token_ids=(2,),
            max_context_tokens=2048,
            num_layers=30,
            kv_bytes_per_token=_SMOLLM2_KV_BYTES,
            memory_bytes=2 * 2**30,
            fixed_ms=5.4,
            weights_ms=4.5,
            token_ms=0.42,
            sequence_ms=0.55,
            cached_token_ms=1.0e-3,
            prefill_lora_ms=4.0,
            decode_lora_ms=3.5,
            rank_token_ms=0.6e-3,
            decode_rank_ms=0.015,
            load_bytes_per_s=2.0e9,
        ),
    )
}
