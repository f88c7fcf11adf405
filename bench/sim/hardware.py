"""True costs: what the simulated hardware takes, whatever the policies believe.

The coefficients are those of the live simulated engine (`services.worker.engine.profiles`), so that
both worlds run on one card; here are the regimes around them: how adapters come, how much a load
disturbs the steps, how regular the steps are. No policy sees a value of this module: policies have
`services.core.costs`, fitted to the steps that they measure.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from services.core.types import Adapter, Capacity
from services.worker.engine.profiles import PROFILES, HardwareProfile, PartLoad, StepLoad


@dataclass(frozen=True, slots=True)
class Hardware:
    """A device, the model on it and the way to its adapters."""

    profile: HardwareProfile
    max_requests: int = 512  # batch slots: enough that memory is what limits
    block_tokens: int = 16
    # A load blocks the device for so many times its transfer; 0: transfers overlap with steps.
    load_blocking: float = 0.0
    # Layers of an adapter can be used as they come, as live; see `bench.sim.residency`. The
    # published comparisons of policies are without it: there no transfer outlasts a step by much.
    overlaps_prefill: bool = False
    step_noise: float = 0.0  # standard deviation of the logarithm of a step's time
    host_cache_bytes: int = 256 * 2**30
    is_host_warm: bool = True  # every adapter is in host memory at the start, as far as they fit
    store_latency_s: float = 0.02
    store_bytes_per_s: float = 1.25e9  # a 10 Gbit/s network

    def __post_init__(self) -> None:
        assert self.max_requests >= 1
        assert self.block_tokens >= 1
        assert min(self.load_blocking, self.step_noise, self.store_latency_s) >= 0
        assert self.host_cache_bytes >= 0
        assert self.store_bytes_per_s > 0
        assert not (self.overlaps_prefill and self.load_blocking), "a blocked device computes none"

    def with_lora_scale(self, scale: float) -> Self:
        """The same with LoRA kernels that take so many times as long."""
        profile = replace(
            self.profile,
            prefill_lora_ms=self.profile.prefill_lora_ms * scale,
            decode_lora_ms=self.profile.decode_lora_ms * scale,
            rank_token_ms=self.profile.rank_token_ms * scale,
            decode_rank_ms=self.profile.decode_rank_ms * scale,
        )
        return replace(self, profile=profile)

    def with_pool_tokens(self, tokens: int) -> Self:
        """The same with a memory pool of another size."""
        memory_bytes = tokens * self.profile.kv_bytes_per_token
        return replace(self, profile=replace(self.profile, memory_bytes=memory_bytes))

    @property
    def capacity(self) -> Capacity:
        """What a worker on it announces."""
        block_bytes = self.block_tokens * self.profile.kv_bytes_per_token
        return Capacity(
            pool_blocks=self.profile.memory_bytes // block_bytes,
            block_bytes=block_bytes,
            block_tokens=self.block_tokens,
            max_requests=self.max_requests,
            max_context_tokens=self.profile.max_context_tokens,
            num_layers=self.profile.num_layers if self.overlaps_prefill else 0,
        )

    def step_s(
        self, load: StepLoad | None, rng: random.Random, *, parts: Sequence[PartLoad] = ()
    ) -> float:
        """Seconds of a step. `load`: all that passes every layer; None: nothing does."""
        step_s = self.profile.step_s(load, parts)
        return step_s * rng.lognormvariate(0.0, self.step_noise) if self.step_noise else step_s

    def load_s(self, size_bytes: int) -> float:
        """Seconds of a transfer from host to device memory."""
        return self.profile.load_s(size_bytes)

    def download_s(self, size_bytes: int) -> float:
        """Seconds from the store to host memory, over an idle network."""
        return self.store_latency_s + size_bytes / self.store_bytes_per_s

    def isolated_ttft_s(
        self, prompt_tokens: int, adapter: Adapter | None, *, is_cold: bool
    ) -> float:
        """Time to first token of a request that is alone, its prompt computed in one step.

        Cold: its adapter is in host memory and must be loaded first, whole.
        """
        rank = 0 if adapter is None else adapter.rank
        prompt = StepLoad(
            prefill_tokens=prompt_tokens if prompt_tokens > 1 else 0,
            prefill_rank_tokens=prompt_tokens * rank if prompt_tokens > 1 else 0,
            decode_sequences=int(prompt_tokens == 1),
            decode_ranks=rank if prompt_tokens == 1 else 0,
            cached_tokens=0,
            has_adapters=rank > 0,
        )
        blocked = max(1.0, self.load_blocking)
        load_s = self.load_s(adapter.size_bytes) * blocked if adapter and is_cold else 0.0
        return load_s + self.profile.step_s(prompt)

    def isolated_service_s(
        self, prompt_tokens: int, output_tokens: int, adapter: Adapter | None
    ) -> float:
        """Time to the last token of a request that is alone, its adapter loaded."""
        rank = 0 if adapter is None else adapter.rank
        steps = output_tokens - 1
        # Step i reads prompt + i tokens; the sum over all steps is that of a step at their mean.
        one = StepLoad(
            prefill_tokens=0,
            prefill_rank_tokens=0,
            decode_sequences=1,
            decode_ranks=rank,
            cached_tokens=prompt_tokens + steps // 2,
            has_adapters=rank > 0,
        )
        first_s = self.isolated_ttft_s(prompt_tokens, adapter, is_cold=False)
        return first_s + steps * self.profile.step_s(one)


def hardware(name: str) -> Hardware:
    """A profile by name, with loads that overlap. Raises KeyError for an unknown one."""
    return Hardware(PROFILES[name])
