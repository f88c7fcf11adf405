"""A noisy tenant: ten with equal rates, then one of them at a hundred times its own.

Limits are everybody's, because nobody knows beforehand who will be noisy: twice a tenant's usual
tokens per second, half a minute of the usual at once, and eight requests at a time. Noise is
compared with the same system's quiet run without limits, so limits that slow quiet tenants down
count too. What the noisy one may still do is one more tenant's traffic, a tenth of the load. Jain's
index is over the nine others' delivered share of what they asked for by the end of the arrivals: 1
if all are served alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Final

from bench.policies.extent import Extent
from bench.policies.jobs import Findings, Job, Key, Results, Section
from bench.policies.world import MAIN, World, system_of
from bench.report import Row, Target
from bench.sim import RequestRecord, Result, simulate
from bench.sim.records import percentile
from bench.workload import Poisson, Trace, build, merged
from services.core.systems import SYSTEMS, System
from services.core.tenants import TenantLimits, Tenants

NAME: Final = "tenants"
_TENANTS: Final = 10
_RATE_RPS: Final = 0.6  # of each: 6 together
_NOISE: Final = 100
_NOISY: Final = "tenant-0"
_USUAL_TOKENS_PER_S: Final = 160.0  # 0.6 requests/s of 225 + 41 tokens
_LIMITS: Final = TenantLimits(
    tokens_per_s=2 * _USUAL_TOKENS_PER_S,
    burst_tokens=30 * _USUAL_TOKENS_PER_S,
    max_running=8,
)
_MOST: Final = 1.2
_ORDERS: Final = ("fifo", "vtc", "chameleon", "adaptive")
_WITH_QUOTAS: Final = ("fifo", "adaptive")
_WITH: Final = " with quotas"


def _limited(name: str) -> System:
    system = SYSTEMS[name]
    cluster = replace(system.cluster, tenants=Tenants(default=_LIMITS))
    return replace(system, name=name + _WITH, cluster=cluster)


@dataclass(frozen=True, slots=True)
class Noise:
    """A job: the tenants' traffic under one system."""

    world: World
    system: System
    is_noisy: bool
    seed: int

    @property
    def cost_s(self) -> float:
        return self.world.workload.duration_s / (50 if self.is_noisy else 400)

    def run(self) -> dict[str, Any]:
        scenario = self.world.scenario(self.system, _RATE_RPS, self.seed)
        trace = _trace(self.world, is_noisy=self.is_noisy, seed=self.seed)
        return _summary(simulate(replace(scenario, trace=trace)), trace.duration_s)


def section(extent: Extent) -> Section:
    """Every system without and with the noise."""
    world = replace(MAIN.lasting(extent.tenant_s), drain_s=60.0)
    systems = [*map(system_of, _ORDERS), *map(_limited, _WITH_QUOTAS)]
    jobs: dict[Key, Job] = {
        (system.name, is_noisy, seed): Noise(world, system, is_noisy, seed)
        for system in systems
        for is_noisy in (False, True)
        for seed in extent.seeds
    }
    names = [system.name for system in systems]
    return Section(NAME, jobs, lambda results: _findings(results, names, extent.seeds))


def _trace(world: World, *, is_noisy: bool, seed: int) -> Trace:
    return merged(
        "ten tenants",
        (
            build(
                replace(
                    world.workload,
                    tenant=(tenant := f"tenant-{index}"),
                    arrivals=Poisson(_RATE_RPS * (_NOISE if is_noisy and tenant == _NOISY else 1)),
                ),
                seed=seed * _TENANTS + index,
            )
            for index in range(_TENANTS)
        ),
    )


def _summary(result: Result, until_s: float) -> dict[str, Any]:
    noisy = [one for one in result.requests if one.tenant == _NOISY]
    others = [one for one in result.measured if one.tenant != _NOISY]
    return {
        "p50_ttft_s": percentile((one.ttft_s for one in others), 0.5),
        "p99_ttft_s": percentile((one.ttft_s for one in others), 0.99),
        "max_ttft_s": max(one.ttft_s for one in others),
        "rejected_others": sum(one.outcome == "rejected" for one in others),
        "rejected_noisy": sum(one.outcome == "rejected" for one in noisy),
        "noisy_tokens_per_s": sum(_served(one) for one in noisy if _by(one, until_s)) / until_s,
        "jain_others": _jain(others, until_s),
    }


def _jain(others: Sequence[RequestRecord], until_s: float) -> float:
    shares: list[float] = []
    for tenant in sorted({one.tenant for one in others}):
        mine = [one for one in others if one.tenant == tenant]
        served = sum(_served(one) for one in mine if _by(one, until_s))
        shares.append(served / sum(one.prompt_tokens + one.output_tokens for one in mine))
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 0.0


def _served(record: RequestRecord) -> int:
    return record.prompt_tokens + record.output_tokens if record.outcome == "done" else 0


def _by(record: RequestRecord, until_s: float) -> bool:
    return record.end_s is not None and record.end_s <= until_s


def _findings(results: Results, names: Sequence[str], seeds: Sequence[int]) -> Findings:
    rows = [_row(name, results, seeds) for name in names]
    ratio = next(row for row in rows if row["system"] == "adaptive" + _WITH)["p99_x_quiet"]
    return Findings(
        rows, [Target("others' P99 TTFT with a noisy tenant", _MOST, ratio, "x", is_upper=True)]
    )


def _row(name: str, results: Results, seeds: Sequence[int]) -> Row:
    free = _means(results, name.removesuffix(_WITH), is_noisy=False, seeds=seeds)
    quiet = _means(results, name, is_noisy=False, seeds=seeds)
    noisy = _means(results, name, is_noisy=True, seeds=seeds)
    return {
        "section": NAME,
        "system": name,
        "seeds": len(seeds),
        "p99_quiet_s": quiet["p99_ttft_s"],
        "p99_noisy_s": noisy["p99_ttft_s"],
        "p99_x_quiet": noisy["p99_ttft_s"] / free["p99_ttft_s"],
        "p50_x_quiet": noisy["p50_ttft_s"] / free["p50_ttft_s"],
        "jain_quiet": quiet["jain_others"],
        "jain_noisy": noisy["jain_others"],
        "noisy_tokens_per_s": noisy["noisy_tokens_per_s"],
        "rejected_others": noisy["rejected_others"],
        "rejected_noisy": noisy["rejected_noisy"],
    }


def _means(
    results: Results, name: str, *, is_noisy: bool, seeds: Sequence[int]
) -> dict[str, float]:
    runs = [results[name, is_noisy, seed] for seed in seeds]
    return {measure: fmean(run[measure] for run in runs) for measure in runs[0]}
