"""What the scheduler measures. Names are stable; every label has few values."""

from collections.abc import Iterable, Mapping
from typing import Final

from opentelemetry.metrics import CallbackOptions, Observation

from services.common import telemetry
from services.core.decisions import Dispatch

QUEUE_LENGTH: Final = "calumma.scheduler.queue.length"
QUEUE_DURATION: Final = "calumma.scheduler.queue.duration"
DISPATCHES: Final = "calumma.scheduler.dispatches"
REJECTIONS: Final = "calumma.scheduler.rejections"
RETURNS: Final = "calumma.scheduler.returns"
WORKERS: Final = "calumma.scheduler.workers"

_DURATION_BOUNDS_S: Final = (
    0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300,
)  # fmt: skip


class SchedulerMetrics:
    """The instruments. Gauges show what `observe` was told last."""

    def __init__(self) -> None:
        meter = telemetry.meter()
        self._queue_lengths: Mapping[str, int] = {}
        self._workers = 0
        meter.create_observable_gauge(
            QUEUE_LENGTH, [self._observe_queues], unit="{request}", description="Waiting requests"
        )
        meter.create_observable_gauge(
            WORKERS, [self._observe_workers], unit="{worker}", description="Workers attached"
        )
        self.queue_duration = meter.create_histogram(
            QUEUE_DURATION,
            unit="s",
            description="Time from acceptance to dispatch",
            explicit_bucket_boundaries_advisory=_DURATION_BOUNDS_S,
        )
        self.dispatches = meter.create_counter(DISPATCHES, unit="{request}")
        self.rejections = meter.create_counter(REJECTIONS, unit="{request}")
        self.returns = meter.create_counter(RETURNS, unit="{request}")

    def record_dispatch(self, dispatch: Dispatch) -> None:
        """A request has left its queue for a worker."""
        queue = {"calumma.queue": dispatch.queue}
        self.dispatches.add(1, {**queue, "calumma.waited_for": dispatch.waited_for})
        self.queue_duration.record(dispatch.queue_s, queue)

    def observe(self, queue_lengths: Mapping[str, int], *, workers: int) -> None:
        """Set the gauges. The exporter reads them from its own thread."""
        self._queue_lengths = queue_lengths
        self._workers = workers

    def _observe_queues(self, _: CallbackOptions) -> Iterable[Observation]:
        return [
            Observation(length, {"calumma.queue": name})
            for name, length in self._queue_lengths.items()
        ]

    def _observe_workers(self, _: CallbackOptions) -> Iterable[Observation]:
        return [Observation(self._workers)]
