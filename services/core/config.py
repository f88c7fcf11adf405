"""Limits and options of the two machines, plain values that services fill from their settings."""

from dataclasses import dataclass, field
from typing import Literal

from services.core.tenants import Tenants
from services.core.types import Reserve


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Limits of the cluster's queue and of its patience."""

    queue_limit: int = 100_000
    worker_grace_s: float = 5.0  # a worker may be gone so long before its requests are returned
    gateway_grace_s: float = 10.0  # a gateway may be gone so long before its requests are dropped
    no_worker_wait_s: float = 30.0  # a request is rejected after so long without any worker
    retry_after_s: float = 2.0  # told to those rejected for want of a worker or of queue space
    prefetch_depth: int = 8  # adapters hinted per worker; 0 turns hints off
    prefetch_interval_s: float = 0.05  # between two looks at the queue for hints
    load_bound: float = 1.25  # requests of a worker over the mean, up to which affinity counts
    reserve: Reserve = Reserve.PREDICTED
    tenants: Tenants = field(default_factory=Tenants)
    # Prompts that a worker may have waiting to be computed, in seconds of its time, before it gets
    # another: who waits for compute waits in the policy's queue, where it can still be passed.
    prefill_ahead_s: float = 0.4
    # Dispatch at once, whatever the workers' memory: each then queues for itself (S-LoRA).
    dispatches_ahead: bool = False

    def __post_init__(self) -> None:
        assert self.queue_limit >= 1
        assert min(self.worker_grace_s, self.gateway_grace_s, self.no_worker_wait_s) >= 0
        assert self.prefetch_depth >= 0
        assert self.prefetch_interval_s > 0
        assert self.load_bound >= 1
        assert self.prefill_ahead_s > 0


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """Limits of one worker's scheduling."""

    # How prompts and decodes share steps, see `services.core.batching`. "target": a step takes as
    # many prompt tokens as keep it within `tbt_target_s`; "chunked": `prefill_tokens_per_step`;
    # "whole": newly admitted prompts are computed whole, in steps of their own (S-LoRA).
    stepping: Literal["target", "chunked", "whole"] = "target"
    tbt_target_s: float = 0.145  # of a step, hence of a request's mean time between tokens
    slack_share: float = 1.0  # of the time all decoding requests are ahead of it, usable by a step
    patience_s: float = 8.0  # a prompt that waited longer gets longer steps, all at twice as long
    step_limit_s: float = 0.5  # of "target": no step is planned longer, even if nothing decodes
    step_tokens_limit: int = 8192  # of "target": no step has more prompt tokens
    min_prefill_tokens: int = 32  # of "target": prompts go on at least so fast
    prefill_tokens_per_step: int = 256  # of "chunked"; of a batch that "whole" or "slora" admits
    # Beside decodes, a prompt whose adapter is still coming goes on once so large a share of the
    # layers is new: each part costs launches again, see `services.core.layerwise`.
    overlap_min_share: float = 0.25
    # Who may start, see `services.core.admission`. "promise": by the ledger's sum of promises;
    # "slora": by the largest memory that all who run will hold together at one time.
    admission: Literal["promise", "slora"] = "promise"
    admission_every_steps: int = 1  # decode steps between two admissions while busy (S-LoRA: 10)
    reserve: Reserve = Reserve.PREDICTED
    keeps_idle_adapters: bool = True  # False: freed with their last user (S-LoRA)
    max_loads: int = 4  # at once, of adapters that are not in host memory
    max_hint_loads: int = 2  # of those, for requests that are not here yet
    max_hints: int = 64  # the rest of a longer hint is ignored
    prefix_cache: bool = True  # what requests begin with alike is computed once
    eviction: str = "cost"  # see services.core.eviction
    eviction_options: tuple[tuple[str, str], ...] = ()  # of that policy, by name
    # Of loads ahead of requests, see `services.core.prefetch`. Shares of the pool.
    pin_share: float = 0.5  # that pinned adapters may take
    ahead_low_share: float = 0.02  # left unpromised by every load ahead
    ahead_high_share: float = 0.05  # unpromised before loads ahead go on after that was reached
    cool_down_s: float = 2.0  # before what the KV cache pushed out is loaded ahead
    # Loads ahead of requests that nobody has made yet, see `services.core.forecast`. 0: none.
    forecast_s: float = 0.0  # how far it looks
    forecast_chance: float = 0.5  # of a request within that time, for an adapter to be loaded
    day_offset_s: float | None = None  # since midnight when the clock was 0; None: not known

    def __post_init__(self) -> None:
        assert self.prefill_tokens_per_step >= 1
        assert self.step_tokens_limit >= self.min_prefill_tokens >= 1
        assert min(self.tbt_target_s, self.step_limit_s) > 0
        assert 0 <= self.slack_share <= 1
        assert self.patience_s > 0
        assert self.admission_every_steps >= 1
        assert 0 < self.overlap_min_share <= 1
        assert self.max_loads >= 1
        assert self.max_hint_loads >= 0
        assert self.max_hints >= 0
        assert 0 <= self.pin_share <= 1
        assert 0 <= self.ahead_low_share <= self.ahead_high_share <= 1
        assert self.cool_down_s >= 0
        assert self.forecast_s >= 0
        assert 0 < self.forecast_chance <= 1
