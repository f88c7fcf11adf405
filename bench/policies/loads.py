"""Times at given loads on the main calibration, beside what the paper says of Chameleon."""

from collections.abc import Sequence
from itertools import product
from statistics import median
from typing import Any, Final

from bench.policies.extent import Extent
from bench.policies.jobs import Findings, Job, Key, Results, Section
from bench.policies.plots import Line, Panel, load_plot
from bench.policies.world import MAIN, Run
from bench.report import Row, Target
from bench.sim import Slo
from bench.sim.records import SIZE_CLASSES

NAME: Final = "loads"
_SYSTEMS: Final = ("slora", "slora-strong", "chameleon", "chameleon-paced", "adaptive")
# Chameleon against S-LoRA, change of P50 and P99 time to first token.
_PUBLISHED: Final = {6.0: (-0.139, -0.147), 8.0: (-0.209, -0.246), 9.0: (-0.481, -0.807)}
_MEASURES: Final = (
    "p50_ttft_s",
    "p99_ttft_s",
    "p99_tbt_s",
    *(f"p99_slowdown_{size}" for size in SIZE_CLASSES),
    "max_wait_s",
    "hit_rate",
    "loads_per_request",
)
_MORE: Final = ("p50_alone_s", "p99_alone_s", "mean_step_s")
# Who, against whom, at which load, which percentile of the time to first token: how much less.
_CUTS: Final = (
    ("chameleon", "slora", 9.0, "p99", 0.75),
    ("chameleon", "slora", 9.0, "p50", 0.48),
    ("adaptive", "slora", 9.0, "p99", 0.87),
    ("adaptive", "slora", 9.0, "p50", 0.92),
    ("adaptive", "slora-strong", 6.0, "p99", 0.50),
    ("adaptive", "slora-strong", 6.0, "p50", 0.75),
)
_SLOWDOWNS_AT_9: Final = {"small": 20.0, "medium": 14.0, "large": 12.0}


def section(extent: Extent) -> Section:
    """Every system at every load with every seed; the paced Chameleon with one."""
    world = MAIN.lasting(extent.load_s)
    jobs: dict[Key, Job] = {
        (system, rate_rps, seed): Run(world, system, rate_rps, seed)
        for system, rate_rps, seed in product(_SYSTEMS, extent.loads_rps, extent.seeds)
        if system != "chameleon-paced" or seed == extent.seeds[0]
    }
    return Section(NAME, jobs, lambda results: _findings(results, extent.loads_rps))


def _findings(results: Results, loads_rps: Sequence[float]) -> Findings:
    medians = {
        (system, rate_rps): _medians(results, system, rate_rps)
        for rate_rps, system in product(loads_rps, _SYSTEMS)
    }
    rows = [_row(system, rate_rps, medians, results) for system, rate_rps in medians]
    cuts = [_cut_row(cut, medians) for cut in _CUTS]
    figures = {"times-by-load.png": _plot(medians, loads_rps)}
    return Findings([*rows, *cuts], _targets(cuts, medians), figures)


Medians = dict[tuple[str, float], dict[str, float]]


def _runs(results: Results, system: str, rate_rps: float) -> list[dict[str, Any]]:
    return [run for key, run in results.items() if key[:2] == (system, rate_rps)]


def _medians(results: Results, system: str, rate_rps: float) -> dict[str, float]:
    """Over seeds. What a run could not measure, because it never came, is infinite."""
    runs = _runs(results, system, rate_rps)
    return {name: median(_value(run[name]) for run in runs) for name in (*_MEASURES, *_MORE)}


def _value(value: float | None) -> float:
    return float("inf") if value is None else value


def _row(system: str, rate_rps: float, medians: Medians, results: Results) -> Row:
    own, base = medians[system, rate_rps], medians["slora", rate_rps]
    p99s = [_value(run["p99_ttft_s"]) for run in _runs(results, system, rate_rps)]
    published = _PUBLISHED.get(rate_rps, (None, None))
    is_chameleon = system.startswith("chameleon")
    return {
        "section": NAME,
        "rate_rps": rate_rps,
        "system": system,
        "seeds": len(p99s),
        **{name: own[name] for name in _MEASURES},
        "p99_ttft_spread": f"{min(p99s):.2f}-{max(p99s):.2f}",
        "p50_change": own["p50_ttft_s"] / base["p50_ttft_s"] - 1,
        "p99_change": own["p99_ttft_s"] / base["p99_ttft_s"] - 1,
        "published_p50": published[0] if is_chameleon else None,
        "published_p99": published[1] if is_chameleon else None,
        "mean_step_s": own["mean_step_s"],
    }


def _cut_row(cut: tuple[str, str, float, str, float], medians: Medians) -> Row:
    system, baseline, rate_rps, share, target = cut
    own, base = medians[system, rate_rps], medians[baseline, rate_rps][f"{share}_ttft_s"]
    reached = 1 - own[f"{share}_ttft_s"] / base
    alone = 1 - own[f"{share}_alone_s"] / base
    return {
        "section": NAME,
        "claim": f"{system}'s {share} TTFT at {rate_rps:g} RPS below {baseline}'s",
        "cut": reached,
        "target": target,
        "cut_if_alone": alone,
        "missing_lever": _lever(reached, target, alone, own["mean_step_s"]),
    }


def _lever(reached: float, target: float, alone: float, step_s: float) -> str:
    if reached >= target:
        return "none"
    if alone < target:
        return "work: a request alone takes longer than that"
    return f"shorter steps: one takes {step_s * 1e3:.0f} ms, and a prompt comes during another"


def _targets(cuts: Sequence[Row], medians: Medians) -> list[Target]:
    return [
        *(Target(cut["claim"], cut["target"], cut["cut"], "of it") for cut in cuts),
        *(
            Target(
                f"adaptive's P99 slowdown of {size} requests at 9 RPS",
                target,
                medians["adaptive", 9.0][f"p99_slowdown_{size}"],
                "x",
                is_upper=True,
            )
            for size, target in _SLOWDOWNS_AT_9.items()
        ),
    ]


def _plot(medians: Medians, loads_rps: Sequence[float]) -> bytes:
    def panel(title: str, measure: str, limit: float) -> Panel:
        lines = [
            Line(system, loads_rps, [medians[system, rate][measure] for rate in loads_rps])
            for system in _SYSTEMS
        ]
        return Panel(title, lines, limit)

    slo = Slo()
    return load_plot(
        [
            panel("P99 time to first token", "p99_ttft_s", slo.ttft_s),
            panel("P99 of requests' mean time between tokens", "p99_tbt_s", slo.tbt_s),
        ]
    )
