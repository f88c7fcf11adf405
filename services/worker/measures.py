"""The worker's metrics, and the few numbers of its recent past that its reports carry.

Gauges are read by the exporter's thread, so they read one immutable snapshot that the driver
replaces.
"""

import statistics
from collections import deque
from collections.abc import Iterable
from typing import Final

from opentelemetry.metrics import CallbackOptions, Observation

from services.common import telemetry
from services.core.snapshots import ReplicaSnapshot
from services.worker.outputs import Tier

STEP_DURATION: Final = "calumma.worker.step.duration"
LOAD_DURATION: Final = "calumma.worker.adapter.load.duration"
OUTPUT_TOKENS: Final = "calumma.worker.output_tokens"
REQUESTS: Final = "calumma.worker.requests"
POOL_BLOCKS: Final = "calumma.worker.pool.blocks"

_STEPS_REMEMBERED: Final = 33
_STEP_BOUNDS_S: Final = [0.001 * 2 ** (i / 2) for i in range(24)]  # 1 ms to 2.9 s
_LOAD_BOUNDS_S: Final = [0.001 * 2**i for i in range(16)]  # 1 ms to 33 s


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
            description="Blocks of the memory pool, by use: kv, adapter, free",
        )
        self._recent_s: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._snapshot: ReplicaSnapshot | None = None
        self.steps = 0
        self.output_tokens = 0

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

    def record_load(self, duration_s: float, tier: Tier) -> None:
        self._load.record(duration_s, {"tier": tier})

    def show(self, snapshot: ReplicaSnapshot) -> None:
        """Let the gauges read this from now on."""
        self._snapshot = snapshot

    def _observe_requests(self, _options: CallbackOptions) -> Iterable[Observation]:
        if (snapshot := self._snapshot) is not None:
            yield Observation(snapshot.running, {"state": "running"})
            yield Observation(snapshot.loading, {"state": "loading"})

    def _observe_blocks(self, _options: CallbackOptions) -> Iterable[Observation]:
        if (snapshot := self._snapshot) is not None:
            yield Observation(snapshot.kv_blocks, {"use": "kv"})
            yield Observation(snapshot.adapter_blocks, {"use": "adapter"})
            yield Observation(snapshot.free_blocks, {"use": "free"})
