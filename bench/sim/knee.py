"""The load that a system bears: the highest rate at which its percentiles keep the objective.

Bracketing and bisection per seed. Two knees from the same runs: by time to first token alone, and
joint with the time between tokens; the first is cheap to raise at the second's cost.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bench.sim.records import Result, percentile, tbt_of
from bench.sim.simulation import Scenario, simulate

_BRACKET_RPS: Final = 1.0  # width of the bracket that bisection begins with


@dataclass(frozen=True, slots=True)
class Slo:
    """P99 over the requests of the measure window."""

    ttft_s: float = 5.0
    tbt_s: float = 0.15  # mean of a request
    share: float = 0.99

    def meets_ttft(self, result: Result) -> bool:
        ttfts_s = [record.ttft_s for record in result.measured]
        return bool(ttfts_s) and percentile(ttfts_s, self.share) <= self.ttft_s

    def meets_joint(self, result: Result) -> bool:
        tbts_s = [tbt for one in result.measured if (tbt := tbt_of(one)) is not None]
        is_steady = not tbts_s or percentile(tbts_s, self.share) <= self.tbt_s
        return is_steady and self.meets_ttft(result)


@dataclass(frozen=True, slots=True)
class Knee:
    """Requests per second, one per seed. `low` of the search stands for anything below it."""

    ttft_rps: tuple[float, ...]
    joint_rps: tuple[float, ...]

    @property
    def ttft_median_rps(self) -> float:
        return statistics.median(self.ttft_rps)

    @property
    def joint_median_rps(self) -> float:
        return statistics.median(self.joint_rps)

    @property
    def spread_rps(self) -> tuple[float, float]:
        """Largest less smallest, of both knees."""
        return (
            max(self.ttft_rps) - min(self.ttft_rps),
            max(self.joint_rps) - min(self.joint_rps),
        )


def knees(
    scenario_at: Callable[[float, int], Scenario],
    *,
    seeds: Sequence[int],
    low_rps: float,
    high_rps: float,
    slo: Slo | None = None,
    tolerance_rps: float = 0.1,
) -> Knee:
    """Search between two rates. `scenario_at(rate_rps, seed)` makes the run of a rate."""
    grid = Grid(low_rps, high_rps, tolerance_rps)
    searches = [_Search(scenario_at, seed, slo or Slo()) for seed in seeds]
    joint_rps = tuple(grid.highest(search.meets_joint) for search in searches)
    # Who meets both meets the one, so the second search begins where the first ended.
    ttft_rps = tuple(
        grid.highest(search.meets_ttft, at_least=joint, below=search.least_without_ttft)
        for search, joint in zip(searches, joint_rps, strict=True)
    )
    return Knee(ttft_rps, joint_rps)


@dataclass(frozen=True, slots=True)
class Grid:
    """Rates so far apart, from `low` on."""

    low: float
    high: float
    step: float

    def highest(
        self,
        is_met: Callable[[float], bool],
        *,
        at_least: float | None = None,
        below: float | None = None,
    ) -> float:
        """The highest rate that is met below the first bracket that is not; `low` if none is.

        Known before: that it is met at `at_least`, and not met at `below`.
        """
        met = 0 if at_least is None else round((at_least - self.low) / self.step)
        if met == 0 and not is_met(self.low):
            return self.low
        last = round((self.high - self.low) / self.step)
        stride = max(1, round(_BRACKET_RPS / self.step))
        failed = last + 1 if below is None else round((below - self.low) / self.step)
        while met < min(last, failed - stride):
            rung = min(last, met + stride)
            if not is_met(self._rate(rung)):
                failed = rung
                break
            met = rung
        while failed - met > 1 and met < last:
            middle = (met + failed) // 2
            if is_met(self._rate(middle)):
                met = middle
            else:
                failed = middle
        return self._rate(met)

    def _rate(self, index: int) -> float:
        return round(self.low + index * self.step, 6)


class _Search:
    """Runs of one seed, each rate once."""

    def __init__(self, scenario_at: Callable[[float, int], Scenario], seed: int, slo: Slo) -> None:
        self._scenario_at = scenario_at
        self._seed = seed
        self._slo = slo
        self._verdicts: dict[float, tuple[bool, bool]] = {}

    def meets_ttft(self, rate_rps: float) -> bool:
        return self._verdict(rate_rps)[0]

    def meets_joint(self, rate_rps: float) -> bool:
        return self._verdict(rate_rps)[1]

    @property
    def least_without_ttft(self) -> float | None:
        """Of the rates that were run so far."""
        return min((rate for rate, (ttft, _) in self._verdicts.items() if not ttft), default=None)

    def _verdict(self, rate_rps: float) -> tuple[bool, bool]:
        if rate_rps not in self._verdicts:
            result = simulate(self._scenario_at(rate_rps, self._seed))
            verdict = (self._slo.meets_ttft(result), self._slo.meets_joint(result))
            self._verdicts[rate_rps] = verdict
        return self._verdicts[rate_rps]
