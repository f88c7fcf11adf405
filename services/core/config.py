"""Limits and options of the two machines, plain values that services fill from their settings."""

from dataclasses import dataclass


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

    def __post_init__(self) -> None:
        assert self.queue_limit >= 1
        assert min(self.worker_grace_s, self.gateway_grace_s, self.no_worker_wait_s) >= 0
        assert self.prefetch_depth >= 0
        assert self.prefetch_interval_s > 0
        assert self.load_bound >= 1


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """Limits of one worker's scheduling."""

    prefill_tokens_per_step: int = 256
    max_loads: int = 4  # at once, of adapters that are not in host memory
    max_hint_loads: int = 2  # of those, for requests that are not here yet
    max_hints: int = 64  # the rest of a longer hint is ignored
    eviction: str = "lru"  # see services.core.eviction

    def __post_init__(self) -> None:
        assert self.prefill_tokens_per_step >= 1
        assert self.max_loads >= 1
        assert self.max_hint_loads >= 0
        assert self.max_hints >= 0


@dataclass(frozen=True, slots=True)
class MultilevelConfig:
    """Shape of the multi-level queue, see `services.core.multilevel`."""

    # size = prompt_weight · prompt + output_weight · predicted output + cells_per_rank · rank,
    # in tokens. 2 : 3 is the paper's A : B; 4 rows per rank is S-LoRA's charge (q, k, v, o).
    prompt_weight: float = 1.0
    output_weight: float = 1.5
    cells_per_rank: float = 4.0
    cutoffs: tuple[float, ...] = (384.0, 1024.0, 2560.0)  # level i takes sizes below cutoffs[i]
    shares: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)  # of the workers' KV tokens, per level
    starvation_s: float = 10.0  # who waited longer goes first, whatever its size or priority
    bypasses: int = 16  # younger requests that may pass one that does not fit, before it blocks

    def __post_init__(self) -> None:
        assert len(self.shares) == len(self.cutoffs) + 1
        assert list(self.cutoffs) == sorted(set(self.cutoffs))
        assert min(self.shares) > 0
        assert self.starvation_s >= 0
        assert self.bypasses >= 0
