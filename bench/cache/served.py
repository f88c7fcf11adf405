"""The whole worker: what an eviction moves over the link and what it does to times to first token.

500 adapters on half of Chameleon's pool, 8 requests/s of the Azure conversations: `bench.sim`
around the real machines, so the KV cache takes memory when it needs it, requests overlap, and
queued ones are hinted. Favourites that never change, and ones that do every minute.

Belady's figures are not of a simulation, where who comes when depends on who waits: the same
requests, in the order of their arrival, are replayed over the mean memory that the KV cache left in
the run with our policy.

The first third of a run is not counted, for policies and bounds alike: every adapter's first load
is everybody's, and favourites are learned. Hits and bytes are those after the sample nearest to
that moment, times to first token those of the requests that came after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Final

import numpy as np

from bench.cache.pure import BASELINE, MIN, MIN_BY_SIZE, OURS
from bench.cache.regimes import RATE_RPS, Uses
from bench.cache.replay import AllResident, Foreseeing, Strategy, outcome
from bench.policies.jobs import Findings, Job, Key, Results, Section
from bench.policies.world import MAIN, World
from bench.report import Row, Target
from bench.sim import Result, simulate
from bench.workload import AdapterPool, Popularity, Trace
from services.core.systems import SYSTEMS, System

_POOL_TOKENS: Final = 30_000
_ADAPTERS: Final = 500
_SHIFT_S: Final = 60.0
_WARMUP: Final = 1.0 / 3.0  # of a run is not counted
_SYSTEM: Final = "adaptive"
_EVICTIONS: Final = ("lru", "gdsf", "chameleon", "cost")
_BOUNDS: Final[dict[str, Strategy]] = {
    MIN: Foreseeing(by_size=False),
    MIN_BY_SIZE: Foreseeing(by_size=True),
    "all resident": AllResident(),
}
_MEASURES: Final = ("hit_rate", "gib_per_1000", "p50_ttft_s", "p99_ttft_s")
_FIXED: Final = "fixed favourites"
_SHIFTING: Final = "favourites shift every minute"


@dataclass(frozen=True, slots=True)
class Served:
    """A job: one run of the simulator, and with our policy what Belady would have made of it."""

    world: World
    eviction: str
    seed: int

    @property
    def cost_s(self) -> float:
        return self.world.workload.duration_s / 100

    def run(self) -> dict[str, dict[str, float]]:
        """Measures by policy or bound."""
        scenario = self.world.scenario(_evicting(self.eviction), RATE_RPS, self.seed, sample_s=1.0)
        warmup_s = _WARMUP * self.world.workload.duration_s
        scenario = replace(scenario, window=replace(scenario.window, warmup_s=warmup_s))
        result = simulate(scenario)
        summary: dict[str, Any] = result.summary()
        found = {
            self.eviction: {
                **_moved(result, warmup_s),
                "p50_ttft_s": summary["p50_ttft_s"],
                "p99_ttft_s": summary["p99_ttft_s"],
            }
        }
        if self.eviction == OURS:
            left_blocks = fmean(one.adapter_blocks + one.free_blocks for one in result.timeline)
            budget_bytes = left_blocks * scenario.hardware.capacity.block_bytes
            found |= _bounds(scenario.trace, budget_bytes)
        return found


def _moved(result: Result, since_s: float) -> dict[str, float]:
    """The share of hits in the uses after that moment, and what they loaded."""
    before = min(result.timeline, key=lambda sample: abs(sample.time_s - since_s))
    workers = result.workers
    hits = sum(worker.cache_hits for worker in workers) - before.adapter_hits
    uses = sum(worker.cache_hits + worker.cache_misses for worker in workers) - before.adapter_uses
    loaded_bytes = sum(worker.loaded_bytes for worker in workers) - before.loaded_bytes
    return {
        "hit_rate": hits / uses,
        "gib_per_1000": loaded_bytes / 2**30 / uses * 1000,
    }


def section(*, duration_s: float, seeds: Sequence[int]) -> Section:
    """Both worlds under every eviction."""
    jobs: dict[Key, Job] = {
        (name, eviction, seed): Served(world.lasting(duration_s), eviction, seed)
        for name, world in _worlds().items()
        for eviction in _EVICTIONS
        for seed in seeds
    }
    return Section("served", jobs, _findings)


def _worlds() -> dict[str, World]:
    hardware = MAIN.hardware.with_pool_tokens(_POOL_TOKENS)
    workload = replace(MAIN.workload, pool=AdapterPool(_ADAPTERS))
    fixed = replace(MAIN, hardware=hardware, workload=workload)
    popularity = Popularity(shift_s=_SHIFT_S)
    shifting = replace(fixed, workload=replace(workload, popularity=popularity))
    return {_FIXED: fixed, _SHIFTING: shifting}


def _evicting(eviction: str) -> System:
    system = SYSTEMS[_SYSTEM]
    return replace(system, replica=replace(system.replica, eviction=eviction))


def _bounds(trace: Trace, budget_bytes: float) -> dict[str, dict[str, float]]:
    places = {adapter.digest: place for place, adapter in enumerate(trace.adapters)}
    chosen = [places[one.adapter.digest] for one in trace.arrivals if one.adapter is not None]
    times_s = [one.arrival_s for one in trace.arrivals if one.adapter is not None]
    uses = Uses(trace.adapters, np.array(times_s), np.array(chosen, dtype=np.int64))
    nothing = {"p50_ttft_s": float("nan"), "p99_ttft_s": float("nan")}
    bounds: dict[str, dict[str, float]] = {}
    for name, strategy in _BOUNDS.items():
        found = outcome(strategy, uses, budget_bytes, warmup=_WARMUP)
        bounds[name] = {
            "hit_rate": found.hit_rate,
            "gib_per_1000": found.gib_per_1000,
            **nothing,
        }
    return bounds


def _findings(results: Results) -> Findings:
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for (world, _, _), found in results.items():
        for name, measures in found.items():
            groups.setdefault((world, name), []).append(measures)
    means = {
        key: {name: fmean(one[name] for one in runs) for name in _MEASURES}
        for key, runs in groups.items()
    }
    rows: list[Row] = [
        {
            "section": "served",
            "world": world,
            "policy": name,
            **means[world, name],
            "spread": _spread(groups[world, name]),
            "bytes_x_lru": means[world, name]["gib_per_1000"]
            / means[world, BASELINE]["gib_per_1000"],
        }
        for world, name in groups
    ]
    return Findings(rows, _targets(means))


def _targets(means: dict[tuple[str, str], dict[str, float]]) -> list[Target]:
    ours, lru = means[_FIXED, OURS], means[_FIXED, BASELINE]
    short = means[_FIXED, MIN]["hit_rate"] - ours["hit_rate"]
    worst = min(means[w, OURS]["hit_rate"] - means[w, BASELINE]["hit_rate"] for w in _worlds())
    bytes_x_lru = ours["gib_per_1000"] / lru["gib_per_1000"]
    return [
        Target("served: bytes moved over lru's", 0.80, bytes_x_lru, "x", is_upper=True),
        Target("served: hit rate below Belady's", 0.05, short, "", is_upper=True),
        Target("served: hit rate above lru's, worse world", -0.002, worst, ""),
    ]


def _spread(runs: Sequence[dict[str, float]]) -> str:
    rates = [one["hit_rate"] for one in runs]
    return f"{min(rates):.3f} - {max(rates):.3f}"
