"""What the parts of Chameleon do, how long each size waits under each order, and its queues."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

from bench.policies.extent import Extent
from bench.policies.jobs import Figures, Findings, Job, Key, Results, Section
from bench.policies.plots import bar_plot, timeline_plot
from bench.policies.world import MAIN, Run, World
from bench.report import Row
from bench.sim import Sample, simulate
from bench.sim.records import SIZE_CLASSES
from services.core.policies import POLICY_NAMES
from services.core.systems import SYSTEMS, System

_PARTS: Final = (
    "slora-strong",
    "chameleon",
    "chameleon-no-cache",
    "chameleon-no-queues",
    "chameleon-lru",
)
_PARTS_RPS: Final = (9.0, 11.5)
_BLOCKING: Final = replace(
    MAIN, name="loads block 2x", hardware=replace(MAIN.hardware, load_blocking=2.0)
)
_SIZES_RPS: Final = 11.5  # past the joint knee: an order shows where there is a queue
# Its queues with all else ours; the system of its name computes prompts whole.
_QUEUES_ALONE: Final = System("chameleon's queues, our steps", "chameleon")
_SIZES_SYSTEMS: Final = {
    **{name: SYSTEMS[name] for name in ("slora", "slora-strong", *POLICY_NAMES)},
    _QUEUES_ALONE.name: _QUEUES_ALONE,
}
_TIMELINE_RPS: Final = 11.5


@dataclass(frozen=True, slots=True)
class Timeline:
    """A job: one run, looked at every second."""

    world: World
    system: str
    rate_rps: float

    @property
    def cost_s(self) -> float:
        return self.rate_rps * self.world.workload.duration_s / 3000

    def run(self) -> tuple[Sample, ...]:
        scenario = self.world.scenario(SYSTEMS[self.system], self.rate_rps, 0, sample_s=1.0)
        return simulate(scenario).timeline


def parts(extent: Extent) -> Section:
    """Chameleon without its halves, where loads overlap with steps and where they block them."""
    jobs: dict[Key, Job] = {
        (world.name, rate_rps, system): Run(world.lasting(extent.part_s), system, rate_rps)
        for world, rate_rps, system in product((MAIN, _BLOCKING), _PARTS_RPS, _PARTS)
    }
    return Section("parts", jobs, lambda results: Findings(_part_rows(results)))


def sizes(extent: Extent) -> Section:
    """Every order at the same load, and Chameleon's queues over time."""
    world = MAIN.lasting(extent.part_s)
    jobs: dict[Key, Job] = {
        (name,): Run(world, system, _SIZES_RPS) for name, system in _SIZES_SYSTEMS.items()
    }
    timeline = MAIN.lasting(max(400.0, extent.part_s))  # the first quotas come after 300 s
    jobs["timeline",] = Timeline(timeline, "chameleon", _TIMELINE_RPS)
    return Section("sizes", jobs, _size_findings)


def _part_rows(results: Results) -> list[Row]:
    measures = ("p50_ttft_s", "p99_ttft_s", "p99_tbt_s", "hit_rate", "loads_per_request", "returns")
    return [
        {"section": "parts", "world": world, "rate_rps": rate_rps, "system": system}
        | {name: run[name] for name in measures}
        for (world, rate_rps, system), run in results.items()
    ]


def _size_findings(results: Results) -> Findings:
    runs: dict[str, dict[str, Any]] = {name: results[name,] for name in _SIZES_SYSTEMS}
    rows: list[Row] = [
        {"section": "sizes", "rate_rps": _SIZES_RPS, "system": name}
        | {
            f"{measure}_{size}": run[f"{measure}_{size}"]
            for measure in ("p50_wait_s", "p99_ttft_s", "max_wait_s", "p99_slowdown")
            for size in SIZE_CLASSES
        }
        for name, run in runs.items()
    ]
    return Findings(rows, figures=_figures(runs, results["timeline",]))


def _figures(runs: dict[str, dict[str, Any]], samples: tuple[Sample, ...]) -> Figures:
    bars: dict[str, dict[str, float]] = {
        name: {size: _bar(run[f"p99_ttft_s_{size}"]) for size in SIZE_CLASSES}
        for name, run in runs.items()
    }
    title = f"P99 time to first token by size class, {_SIZES_RPS:g} requests/s"
    return {
        "delay-by-size.png": bar_plot(bars, title=title, y="seconds"),
        "chameleon-queues.png": timeline_plot(
            samples, title=f"chameleon's queues and quotas, {_TIMELINE_RPS:g} requests/s"
        ),
    }


def _bar(seconds: float | None) -> float:
    """No bar for what never came."""
    return float("nan") if seconds is None else seconds
