"""What a run leaves: a record per request and per worker, samples over time, and their summary.

Percentiles are by nearest rank over every request of the measure window. One that never got what is
measured (a first token, an end) counts as infinitely late: nothing that was rejected or left over
makes a percentile look better.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from bench.sim.clients import Client, Outcome
from bench.sim.hardware import Hardware

SizeClass = Literal["small", "medium", "large"]
SIZE_CLASSES: Final[tuple[SizeClass, ...]] = ("small", "medium", "large")


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request. Times are seconds since the run began, None for what never happened."""

    index: int
    tenant: str
    rank: int  # 0: base model
    size: SizeClass  # a third of the requests each, by service alone on true costs
    prompt_tokens: int
    output_tokens: int
    tokens: int  # delivered
    outcome: Outcome
    reason: str
    arrived_s: float
    dispatched_s: float | None  # by the scheduler, first time
    started_s: float | None  # by a worker, first time
    first_token_s: float | None
    end_s: float | None
    mean_tbt_s: float | None  # between its tokens; None below two
    max_gap_s: float
    queue: str
    waited_for: str
    attempts: int
    preemptions: int
    isolated_warm_s: float  # time to first token alone, adapter loaded
    isolated_cold_s: float  # adapter in host memory
    service_s: float  # time to last token alone

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return math.inf if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def e2e_s(self) -> float:
        """Time to last token."""
        if self.outcome != "done" or self.end_s is None:
            return math.inf
        return self.end_s - self.arrived_s

    @property
    def wait_s(self) -> float:
        """Time until its first step, in whatever queues it waited."""
        return math.inf if self.started_s is None else self.started_s - self.arrived_s

    @property
    def slowdown(self) -> float:
        """Time to first token over that of the same request alone, its adapter in host memory."""
        return self.ttft_s / self.isolated_cold_s


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One life of a worker."""

    worker_id: str
    steps: int
    busy_s: float
    cache_hits: int  # requests whose adapter was in device memory when they came here
    cache_misses: int
    loads: int
    loaded_bytes: int
    downloads: int
    downloaded_bytes: int
    evictions: int
    preemptions: int
    aborted: int


@dataclass(frozen=True, slots=True)
class QueueSample:
    """One of the policy's queues."""

    name: str
    length: int
    oldest_s: float
    quota_tokens: float | None
    used_tokens: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The state at one moment, summed over the workers."""

    time_s: float
    queues: tuple[QueueSample, ...]
    running: int  # requests with an open sequence
    loading: int  # at workers, not started
    kv_blocks: int
    adapter_blocks: int
    free_blocks: int
    adapter_uses: int  # requests with an adapter that have come to workers so far
    adapter_hits: int  # of those, whose adapter was in device memory then
    loaded_bytes: int  # so far


@dataclass(frozen=True, slots=True)
class Result:
    """One run. `measured_from_s`: requests that arrived before it are in no statistic."""

    system: str
    trace: str
    seed: int
    measured_from_s: float
    end_s: float
    returns: int  # attempts given back: squashed, or their worker was lost
    requests: tuple[RequestRecord, ...]
    workers: tuple[WorkerRecord, ...]
    timeline: tuple[Sample, ...]

    @property
    def measured(self) -> list[RequestRecord]:
        """Requests of the measure window."""
        return [one for one in self.requests if one.arrived_s >= self.measured_from_s]

    def summary(self) -> dict[str, Any]:
        """The figures of the run, flat; None for what is infinite or has no request."""
        records = self.measured
        outcomes = Counter(record.outcome for record in records)
        hits = sum(worker.cache_hits for worker in self.workers)
        lookups = hits + sum(worker.cache_misses for worker in self.workers)
        figures: dict[str, float] = {
            "requests": len(records),
            "done": outcomes["done"],
            "violations": len(records) - outcomes["done"],
            **{f"outcome_{name}": count for name, count in sorted(outcomes.items())},
            **_percentiles(records),
            **_by_size(records),
            "max_gap_s": max((record.max_gap_s for record in records), default=math.nan),
            "hit_rate": hits / lookups if lookups else math.nan,
            "loads_per_request": sum(worker.loads for worker in self.workers) / max(1, lookups),
            "loaded_bytes": sum(worker.loaded_bytes for worker in self.workers),
            "busy_share": sum(worker.busy_s for worker in self.workers)
            / max(1e-9, self.end_s * len(self.workers)),
            "steps": sum(worker.steps for worker in self.workers),
            "preemptions": sum(worker.preemptions for worker in self.workers),
            "evictions": sum(worker.evictions for worker in self.workers),
            "returns": self.returns,
        }
        return {name: _finite(value) for name, value in figures.items()}

    def to_json(self) -> str:
        """All of it, the same text for the same run."""
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False, separators=(",", ":"))


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that this share of the values does not exceed; NaN of none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def tbt_of(record: RequestRecord) -> float | None:
    """Mean time between tokens; infinite for a request that stopped halfway."""
    if record.outcome == "unfinished" and record.output_tokens > 1:
        return math.inf
    return record.mean_tbt_s


def records_of(clients: Sequence[Client], hardware: Hardware) -> tuple[RequestRecord, ...]:
    """A record per client, in order of arrival."""
    services_s = [_service_s(client, hardware) for client in clients]
    cuts = (percentile(services_s, 1 / 3), percentile(services_s, 2 / 3))
    return tuple(
        _record(client, hardware, service_s, SIZE_CLASSES[sum(service_s > cut for cut in cuts)])
        for client, service_s in zip(clients, services_s, strict=True)
    )


def _record(client: Client, hardware: Hardware, service_s: float, size: SizeClass) -> RequestRecord:
    arrival = client.arrival
    assert client.outcome is not None
    mean_tbt_s = None
    if client.first_s is not None and client.emitted > 1:
        mean_tbt_s = (client.last_s - client.first_s) / (client.emitted - 1)
    return RequestRecord(
        index=client.index,
        tenant=arrival.tenant,
        rank=arrival.adapter.rank if arrival.adapter is not None else 0,
        size=size,
        prompt_tokens=arrival.prompt_tokens,
        output_tokens=arrival.output_tokens,
        tokens=client.emitted,
        outcome=client.outcome,
        reason=client.reason,
        arrived_s=arrival.arrival_s,
        dispatched_s=client.dispatched_s,
        started_s=client.started_s,
        first_token_s=client.first_s,
        end_s=client.end_s,
        mean_tbt_s=mean_tbt_s,
        max_gap_s=client.gap_max_s,
        queue=client.queue,
        waited_for=client.waited_for,
        attempts=client.number,
        preemptions=client.preemptions,
        isolated_warm_s=_isolated_s(client, hardware, is_cold=False),
        isolated_cold_s=_isolated_s(client, hardware, is_cold=True),
        service_s=service_s,
    )


def _isolated_s(client: Client, hardware: Hardware, *, is_cold: bool) -> float:
    arrival = client.arrival
    return hardware.isolated_ttft_s(arrival.prompt_tokens, arrival.adapter, is_cold=is_cold)


def _service_s(client: Client, hardware: Hardware) -> float:
    arrival = client.arrival
    return hardware.isolated_service_s(
        arrival.prompt_tokens, arrival.output_tokens, arrival.adapter
    )


def _percentiles(records: Sequence[RequestRecord]) -> dict[str, float]:
    measures: dict[str, Callable[[RequestRecord], float | None]] = {
        "ttft_s": lambda one: one.ttft_s,
        "tbt_s": tbt_of,
        "e2e_s": lambda one: one.e2e_s,
        "wait_s": lambda one: one.wait_s,
    }
    figures: dict[str, float] = {}
    for name, measure in measures.items():
        values = [value for one in records if (value := measure(one)) is not None]
        for share in (0.5, 0.9, 0.99):
            figures[f"p{share * 100:.0f}_{name}"] = percentile(values, share)
        figures[f"max_{name}"] = max(values, default=math.nan)
    return figures


def _by_size(records: Sequence[RequestRecord]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for size in SIZE_CLASSES:
        mine = [record for record in records if record.size == size]
        figures[f"p99_slowdown_{size}"] = percentile((one.slowdown for one in mine), 0.99)
        figures[f"p99_ttft_s_{size}"] = percentile((one.ttft_s for one in mine), 0.99)
        figures[f"p50_wait_s_{size}"] = percentile((one.wait_s for one in mine), 0.5)
        figures[f"max_wait_s_{size}"] = max((one.wait_s for one in mine), default=math.nan)
    return figures


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
