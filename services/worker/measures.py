"""The worker's metrics, and the few numbers of its recent past that its reports carry.

Gauges are read by the exporter's thread, so they read one immutable snapshot that the driver
replaces.
"""

import statistics
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from opentelemetry.metrics import CallbackOptions, Observation

from services.common import telemetry
from services.core.decisions import EvictionReason
from services.core.snapshots import ReplicaSnapshot
from services.worker.outputs import Tier

STEP_DURATION: Final = "calumma.worker.step.duration"
LOAD_DURATION: Final = "calumma.worker.adapter.load.duration"
LOAD_STAGE: Final = "calumma.worker.adapter.load.stage"
ADAPTER_REQUESTS: Final = "calumma.worker.adapter.requests"
ADAPTER_BYTES: Final = "calumma.worker.adapter.bytes"
EVICTIONS: Final = "calumma.worker.adapter.evictions"
PREFETCHES: Final = "calumma.worker.adapter.prefetches"
OUTPUT_TOKENS: Final = "calumma.worker.output_tokens"
REQUESTS: Final = "calumma.worker.requests"
POOL_BLOCKS: Final = "calumma.worker.pool.blocks"
LEAKED_BLOCKS: Final = "calumma.worker.pool.leaked_blocks"
PREFIX_TOKENS: Final = "calumma.worker.prefix.tokens"
PREFIX_EVICTIONS: Final = "calumma.worker.prefix.evictions"

_STEPS_REMEMBERED: Final = 33
_STEP_BOUNDS_S: Final = [0.001 * 2 ** (i / 2) for i in range(24)]  # 1 ms to 2.9 s
_LOAD_BOUNDS_S: Final = [0.001 * 2**i for i in range(16)]  # 1 ms to 33 s


@dataclass(frozen=True, slots=True)
class LoadStages:
    """Seconds of a load: until its first byte was here, until its last, until the engine had all.

    What the engine took while bytes still came is part of `download_s`, which is 0 from host
    memory. `first_layers_s` says after how much of all that a prompt could be begun.
    """

    wait_s: float
    download_s: float
    engine_s: float
    first_layers_s: float | None = None  # None: not before the end

    @property
    def total_s(self) -> float:
        return self.wait_s + self.download_s + self.engine_s


class Measures:
    """What is counted. One per worker."""

    def __init__(self) -> None:
        meter = telemetry.meter()
        self._step = meter.create_histogram(
            STEP_DURATION,
            unit="s",
            description="Duration of engine steps",
            explicit_bucket_boundaries_advisory=_STEP_BOUNDS_S,
        )
        self._load = meter.create_histogram(
            LOAD_DURATION,
            unit="s",
            description="Time to bring an adapter into device memory, by where it was",
            explicit_bucket_boundaries_advisory=_LOAD_BOUNDS_S,
        )
        self._load_stage = meter.create_histogram(
            LOAD_STAGE,
            unit="s",
            description="Parts of that time: wait, download, engine (what was left of its part)",
            explicit_bucket_boundaries_advisory=_LOAD_BOUNDS_S,
        )
        self._adapter_requests = meter.create_counter(
            ADAPTER_REQUESTS,
            unit="{request}",
            description="Requests with an adapter, by where it was when they came",
        )
        self._adapter_bytes = meter.create_counter(
            ADAPTER_BYTES, unit="By", description="Bytes of adapters moved, by the tier they reach"
        )
        self._evictions = meter.create_counter(
            EVICTIONS, unit="{adapter}", description="Adapters that left device memory, by reason"
        )
        meter.create_observable_counter(
            PREFETCHES,
            callbacks=[self._observe_prefetches],
            unit="{adapter}",
            description="Loads ahead of any request, by outcome: all that began, used, wasted",
        )
        self._tokens = meter.create_counter(
            OUTPUT_TOKENS, unit="{token}", description="Tokens generated"
        )
        meter.create_observable_gauge(
            REQUESTS,
            callbacks=[self._observe_requests],
            unit="{request}",
            description="Requests here, by state: running, or loading (waiting to start)",
        )
        meter.create_observable_gauge(
            POOL_BLOCKS,
            callbacks=[self._observe_blocks],
            unit="{block}",
            description="Blocks of the memory pool, by use: kv, prefix, adapter, free",
        )
        meter.create_observable_gauge(
            LEAKED_BLOCKS,
            callbacks=[self._observe_leaks],
            unit="{block}",
            description="Blocks of the memory pool that nothing accounts for: 0, but for a bug",
        )
        meter.create_observable_counter(
            PREFIX_TOKENS,
            callbacks=[self._observe_prefix_tokens],
            unit="{token}",
            description="Tokens of contexts, by outcome: cached, or computed",
        )
        meter.create_observable_counter(
            PREFIX_EVICTIONS,
            callbacks=[self._observe_prefix_evictions],
            unit="{block}",
            description="Blocks of cached prefixes that gave way to requests or adapters",
        )
        self._recent_s: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._snapshot: ReplicaSnapshot | None = None
        self._leaked_blocks = 0
        self.steps = 0
        self.output_tokens = 0
        self.tiers: Counter[Tier] = Counter()  # of requests with an adapter, when they came
        self.evictions = 0
        self.loaded_bytes = 0  # into device memory
        self.downloaded_bytes = 0  # into host memory

    @property
    def step_s(self) -> float:
        """Median of the last steps; 0 before the first."""
        return statistics.median(self._recent_s) if self._recent_s else 0.0

    def record_step(self, duration_s: float, *, tokens: int) -> None:
        self.steps += 1
        self.output_tokens += tokens
        self._recent_s.append(duration_s)
        self._step.record(duration_s)
        self._tokens.add(tokens)

    @property
    def hits(self) -> int:
        """Requests whose adapter was in device memory when they came."""
        return self.tiers[Tier.DEVICE]

    @property
    def misses(self) -> int:
        """Requests whose adapter was not, or was loading."""
        return self.tiers[Tier.HOST] + self.tiers[Tier.STORE]

    def record_arrival(self, tier: Tier) -> None:
        """A request came, and its adapter was there."""
        if tier is not Tier.NONE:
            self.tiers[tier] += 1
            self._adapter_requests.add(1, {"tier": tier})

    def record_load(self, stages: LoadStages, tier: Tier, size_bytes: int) -> None:
        """An adapter is in device memory. `tier`: where it came from."""
        self._load.record(stages.total_s, {"tier": tier})
        self._load_stage.record(stages.wait_s, {"tier": tier, "stage": "wait"})
        self._load_stage.record(stages.engine_s, {"tier": tier, "stage": "engine"})
        self.loaded_bytes += size_bytes
        self._adapter_bytes.add(size_bytes, {"tier": Tier.DEVICE})
        if tier is Tier.STORE:
            self._load_stage.record(stages.download_s, {"tier": tier, "stage": "download"})
            self.downloaded_bytes += size_bytes
            self._adapter_bytes.add(size_bytes, {"tier": Tier.HOST})

    def record_eviction(self, reason: EvictionReason) -> None:
        """An adapter left device memory."""
        self.evictions += 1
        self._evictions.add(1, {"reason": reason})

    def show(self, snapshot: ReplicaSnapshot, *, leaked_blocks: int = 0) -> None:
        """Let the gauges read this from now on."""
        self._snapshot = snapshot
        self._leaked_blocks = leaked_blocks

    def _observe_requests(self, _options: CallbackOptions) -> Iterable[Observation]:
        if (snapshot := self._snapshot) is not None:
            yield Observation(snapshot.running, {"state": "running"})
            yield Observation(snapshot.loading, {"state": "loading"})

    def _observe_prefetches(self, _options: CallbackOptions) -> Iterable[Observation]:
        if (snapshot := self._snapshot) is not None:
            yield Observation(snapshot.cache.prefetches, {"outcome": "begun"})
            yield Observation(snapshot.cache.prefetch_hits, {"outcome": "used"})
            yield Observation(snapshot.cache.prefetch_wastes, {"outcome": "wasted"})

    def _observe_blocks(self, _options: CallbackOptions) -> Iterable[Observation]:
        if (snapshot := self._snapshot) is not None:
            yield Observation(snapshot.kv_blocks, {"use": "kv"})
            yield Observation(snapshot.prefix_blocks, {"use": "prefix"})
            yield Observation(snapshot.adapter_blocks, {"use": "adapter"})
            yield Observation(snapshot.free_blocks, {"use": "free"})

    def _observe_leaks(self, _options: CallbackOptions) -> Iterable[Observation]:
        yield Observation(self._leaked_blocks)

    def _observe_prefix_tokens(self, _options: CallbackOptions) -> Iterable[Observation]:
        if (snapshot := self._snapshot) is not None:
            counts = snapshot.prefix
            yield Observation(counts.hit_tokens, {"outcome": "cached"})
            computed_tokens = counts.queried_tokens - counts.hit_tokens
            yield Observation(computed_tokens, {"outcome": "computed"})

    def _observe_prefix_evictions(self, _options: CallbackOptions) -> Iterable[Observation]:
        if (snapshot := self._snapshot) is not None:
            yield Observation(snapshot.prefix.evicted_blocks)
