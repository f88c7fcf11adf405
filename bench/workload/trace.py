"""A trace: requests in the order in which they arrive, as frozen values."""

from collections.abc import Iterable
from dataclasses import dataclass

from services.core.types import Adapter


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request as its client makes it. What it will generate is for the engine alone to know."""

    arrival_s: float
    tenant: str
    adapter: Adapter | None
    prompt_tokens: int
    output_tokens: int  # that it ends after
    max_output_tokens: int  # that it may generate
    priority: int = 0
    deadline_s: float | None = None  # its client's patience, from its arrival
    leaves_s: float | None = None  # its client cancels so long after, without having said it before

    def __post_init__(self) -> None:
        assert self.arrival_s >= 0
        assert self.prompt_tokens >= 1
        assert 1 <= self.output_tokens <= self.max_output_tokens


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrivals in order, and the adapters that they are drawn from."""

    name: str
    duration_s: float
    arrivals: tuple[Arrival, ...]
    adapters: tuple[Adapter, ...]

    def __post_init__(self) -> None:
        times_s = [arrival.arrival_s for arrival in self.arrivals]
        assert times_s == sorted(times_s)

    @property
    def rate_rps(self) -> float:
        """Requests per second, as they came out."""
        return len(self.arrivals) / self.duration_s


def merged(name: str, traces: Iterable[Trace]) -> Trace:
    """Several traces at the same time, such as one per tenant; each keeps its own rate."""
    parts = tuple(traces)
    arrivals = sorted(
        (arrival for trace in parts for arrival in trace.arrivals), key=lambda one: one.arrival_s
    )
    adapters = dict.fromkeys(adapter for trace in parts for adapter in trace.adapters)
    return Trace(name, max(t.duration_s for t in parts), tuple(arrivals), tuple(adapters))
