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

_BRACKET_RPS: Final = 0.5  # width of the first bracket; the next ones are twice as wide


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
    guess_rps: float | None = None,
) -> Knee:
    """Search between two rates. `scenario_at(rate_rps, seed)` makes the run of a rate.

    The search of the first seed begins at the guess, those of the others at the first one's knees.
    """
    grid = Grid(low_rps, high_rps, tolerance_rps)
    ttft_rps: list[float] = []
    joint_rps: list[float] = []
    for seed in seeds:
        search = _Search(scenario_at, seed, slo or Slo())
        joint = grid.highest(search.meets_joint, guess=joint_rps[0] if joint_rps else guess_rps)
        search.joint_rps = joint
        ttft_rps.append(grid.highest(search.meets_ttft, guess=(ttft_rps or [joint])[0]))
        joint_rps.append(joint)
    return Knee(tuple(ttft_rps), tuple(joint_rps))


@dataclass(frozen=True, slots=True)
class Grid:
    """Rates so far apart, from `low` on."""

    low: float
    high: float
    step: float

    def highest(self, is_met: Callable[[float], bool], *, guess: float | None = None) -> float:
        """A rate that is met while the next one is not: brackets grow from the guess, up or down.

        `low` stands for anything below it.
        """
        last = round((self.high - self.low) / self.step)
        stride = max(1, round(_BRACKET_RPS / self.step))
        first = 0 if guess is None else round((guess - self.low) / self.step)
        met, failed = -1, last + 1
        if is_met(self._rate(first)):
            met = first
            while met < last:
                rung = min(last, met + stride)
                if not is_met(self._rate(rung)):
                    failed = rung
                    break
                met, stride = rung, 2 * stride
        else:
            failed = first
            while failed > 0:
                rung = max(0, failed - stride)
                if is_met(self._rate(rung)):
                    met = rung
                    break
                failed, stride = rung, 2 * stride
        while failed - met > 1 and failed > 0:
            middle = (met + failed) // 2
            if is_met(self._rate(middle)):
                met = middle
            else:
                failed = middle
        return self._rate(max(0, met))

    def _rate(self, index: int) -> float:
        return round(self.low + index * self.step, 6)


class _Search:
    """Runs of one seed, each rate once, and none whose outcome others tell.

    Set `joint_rps` when that knee is known: who meets both up to there meets the one.
    """

    def __init__(self, scenario_at: Callable[[float, int], Scenario], seed: int, slo: Slo) -> None:
        self.joint_rps = 0.0
        self._scenario_at = scenario_at
        self._seed = seed
        self._slo = slo
        self._verdicts: dict[float, tuple[bool, bool]] = {}

    def meets_ttft(self, rate_rps: float) -> bool:
        if rate_rps not in self._verdicts:
            if any(rate <= rate_rps and not ttft for rate, (ttft, _) in self._verdicts.items()):
                return False
            if rate_rps < self.joint_rps:
                return True
        return self._verdict(rate_rps)[0]

    def meets_joint(self, rate_rps: float) -> bool:
        return self._verdict(rate_rps)[1]

    def _verdict(self, rate_rps: float) -> tuple[bool, bool]:
        if rate_rps not in self._verdicts:
            result = simulate(self._scenario_at(rate_rps, self._seed))
            verdict = (self._slo.meets_ttft(result), self._slo.meets_joint(result))
            self._verdicts[rate_rps] = verdict
        return self._verdicts[rate_rps]
