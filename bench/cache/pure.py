"""Caches alone: every policy and every bound in every regime, and what is claimed of ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from bench.cache.regimes import REGIMES, Regime
from bench.cache.replay import (
    AllResident,
    BestSet,
    Cached,
    Foreseeing,
    Outcome,
    Strategy,
    outcome,
)
from bench.policies.jobs import Findings, Job, Key, Results, Section
from bench.policies.plots import bar_plot
from bench.report import Row, Target

OURS: Final = "cost"
BASELINE: Final = "lru"
MIN: Final = "Belady (MIN)"
MIN_BY_SIZE: Final = "Belady by size"
_SLACK: Final = 0.002  # of a hit rate: below it two policies are as good
_POLICIES: Final = ("lru", "lfu", "gdsf", "fairshare", "chameleon", "cost")
_STRATEGIES: Final[dict[str, Strategy]] = {
    **{name: Cached(name) for name in _POLICIES},
    "best fixed set, hits": BestSet("hits"),
    "best fixed set, bytes": BestSet("bytes"),
    MIN: Foreseeing(by_size=False),
    MIN_BY_SIZE: Foreseeing(by_size=True),
    "all resident": AllResident(),
}
_PLOTTED: Final = ("lru", "gdsf", "chameleon", "cost", MIN)


@dataclass(frozen=True, slots=True)
class Replay:
    """A job: one strategy in one regime."""

    regime: Regime
    strategy: Strategy
    requests: int
    seed: int

    @property
    def cost_s(self) -> float:
        return self.requests / 10_000

    def run(self) -> Outcome:
        """Replay it."""
        uses = self.regime.uses(self.requests, seed=self.seed)
        return outcome(self.strategy, uses, self.regime.budget * float(uses.sizes.sum()))


def section(*, requests: int, seeds: Sequence[int]) -> Section:
    """Regimes whose data is absent are left out, and said to be."""
    jobs: dict[Key, Job] = {
        (regime, name, seed): Replay(regime, strategy, requests, seed)
        for regime in REGIMES
        if regime.is_available
        for name, strategy in _STRATEGIES.items()
        for seed in seeds
    }
    return Section("replay", jobs, _findings)


def _findings(results: Results) -> Findings:
    groups: dict[tuple[Regime, str], list[Outcome]] = {}
    for (regime, name, _), found in results.items():
        groups.setdefault((regime, name), []).append(found)
    rows = [_row(regime, name, groups) for regime, name in groups]
    lacking = [regime.name for regime in REGIMES if not regime.is_available]
    rows += [{"section": "lacking", "regime": name, "lacks": "its data"} for name in lacking]
    plotted = {
        regime.name: {one: _hits(groups[regime, one]) for one in _PLOTTED}
        for regime in REGIMES
        if regime.is_available
    }
    figure = bar_plot(plotted, title="hit rate by regime", y="hit rate")
    return Findings(rows, _targets(groups, results), {"hit-rates.png": figure})


def _row(regime: Regime, name: str, groups: dict[tuple[Regime, str], list[Outcome]]) -> Row:
    found = groups[regime, name]
    rates = [one.hit_rate for one in found]
    return {
        "section": "replay",
        "regime": regime.name,
        "policy": name,
        "hit_rate": fmean(rates),
        "spread": f"{min(rates):.3f} - {max(rates):.3f}",
        "of_belady": fmean(rates) / _hits(groups[regime, MIN]),
        "gib_per_1000": _moved(found),
        "bytes_x_lru": _moved(found) / _moved(groups[regime, BASELINE]),
    }


def _targets(groups: dict[tuple[Regime, str], list[Outcome]], results: Results) -> list[Target]:
    """The worst regime decides each claim, and the worst seed the first."""
    regimes = {regime for regime, _ in groups}
    of_belady = {
        regime: _hits(groups[regime, OURS]) / _hits(groups[regime, MIN]) for regime in regimes
    }
    gains = [
        found.hit_rate - results[regime, BASELINE, seed].hit_rate
        for (regime, name, seed), found in results.items()
        if name == OURS
    ]
    zipf = [share for regime, share in of_belady.items() if regime.kind == "zipf"]
    other = [share for regime, share in of_belady.items() if regime.kind != "zipf"]
    return [
        Target("hit rate above lru, worst regime and seed", -_SLACK, min(gains), ""),
        Target("hit rate over Belady's, worst of fixed favourites", 0.95, min(zipf), "x"),
        Target("hit rate over Belady's, worst of the others", 0.90, min(other), "x"),
    ]


def _hits(found: Sequence[Outcome]) -> float:
    return fmean(one.hit_rate for one in found)


def _moved(found: Sequence[Outcome]) -> float:
    return fmean(one.gib_per_1000 for one in found)
