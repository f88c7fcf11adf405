"""What wrong output lengths do: `adaptive` against `fifo` on the same steps, told the same."""

from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any, Final

from bench.policies.extent import Extent
from bench.policies.jobs import Findings, Job, Key, Results, Section
from bench.policies.world import MAIN, SMALL_CARD, Run, World
from bench.report import Row, Target
from bench.sim import (
    Accurate,
    Adversarial,
    Broken,
    Constant,
    Learned,
    Oracle,
    PredictorKind,
    hardware,
)

NAME: Final = "predictors"
_PREDICTORS: Final[dict[str, PredictorKind]] = {
    "oracle": Oracle(),
    "80 % right": Accurate(0.8),
    "60 % right": Accurate(0.6),
    "adversarial": Adversarial(),
    "learned": Learned(),
    "constant 50": Constant(50.0),
    "broken": Broken(),
}
_SYSTEMS: Final = ("fifo", "adaptive")
_MOST: Final = 1.10  # of FIFO's P99 time to first token
# Both are a little below the joint knee there: a queue comes and goes.
_MEMORIES: Final = (
    (replace(MAIN, name="plentiful"), 9.5),
    (replace(MAIN, name="scarce (24 GB card)", hardware=hardware(SMALL_CARD)), 8.0),
)


def section(extent: Extent) -> Section:
    """Both policies with every predictor, in both memories, with every seed."""
    cases = product(_MEMORIES, _PREDICTORS, _SYSTEMS, extent.seeds)
    jobs: dict[Key, Job] = {
        (world.name, name, system, seed): Run(
            _with(world, name).lasting(extent.part_s), system, rate_rps, seed
        )
        for (world, rate_rps), name, system, seed in cases
    }
    return Section(NAME, jobs, _findings)


def _with(world: World, predictor: str) -> World:
    return replace(world, predictor=_PREDICTORS[predictor])


def _findings(results: Results) -> Findings:
    rows = [
        _row(world.name, rate_rps, predictor, results)
        for (world, rate_rps), predictor in product(_MEMORIES, _PREDICTORS)
    ]
    targets = [
        Target(
            f"adaptive's P99 TTFT over fifo's, {row['predictor']}, {row['memory']}",
            _MOST,
            row["p99_ttft_x_fifo"],
            "x",
            is_upper=True,
        )
        for row in rows
    ]
    return Findings(rows, targets)


def _row(memory: str, rate_rps: float, predictor: str, results: Results) -> Row:
    fifo, adaptive = (
        [run for key, run in results.items() if key[:3] == (memory, predictor, system)]
        for system in _SYSTEMS
    )
    return {
        "section": NAME,
        "memory": memory,
        "rate_rps": rate_rps,
        "predictor": predictor,
        **{
            f"{name}_{system}": _median(runs, measure)
            for name, measure in (("p99_ttft_s", "p99_ttft_s"), ("p99_tbt_s", "p99_tbt_s"))
            for system, runs in (("fifo", fifo), ("adaptive", adaptive))
        },
        "preemptions_adaptive": _median(adaptive, "preemptions"),
        "p99_ttft_x_fifo": _median(adaptive, "p99_ttft_s") / _median(fifo, "p99_ttft_s"),
    }


def _median(runs: list[dict[str, Any]], measure: str) -> float:
    return median(float("inf") if run[measure] is None else run[measure] for run in runs)
