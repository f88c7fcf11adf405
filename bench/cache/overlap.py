"""What hiding loads is worth, and what is left for a cache to save once they are hidden.

Chameleon's set-up, 100 adapters at 8 requests/s, on our queue and steps. Four ways of a load: it
stops the device for as long as the transfer takes, for twice as long, it runs beside the steps, and
beside the steps with prompts computed as far as its layers are here. With and without a cache, and
with adapters in host memory or, no copies being kept there, in a store behind 10 Gbit/s. Two cases
more are of a worker that is mostly idle.

A transfer from host memory ends within a step or two on this card, so the prompt waits for it: the
last two ways differ only where adapters come from the store.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Final

from bench.policies.jobs import Findings, Job, Key, Results, Section, run_sections
from bench.policies.world import MAIN, Run, World
from bench.report import Row, Target
from bench.sim import Hardware
from services.core.systems import SYSTEMS, System

NAME: Final = "overlap"
RATE_RPS: Final = 8.0
_QUIET_RPS: Final = 0.5  # most requests are alone
FULL_S: Final = 900.0
QUICK_S: Final = 120.0
_SYSTEM: Final = "adaptive"
_NO_CACHE: Final = "none"
_HOST, _STORE = "host memory", "store"
_BLOCKS, _BLOCKS_TWICE, _BESIDE, _BY_LAYER = (
    "stops the device",
    "stops it for twice its time",
    "beside the steps",
    "by layer",
)
_MEASURES: Final = ("p50_ttft_s", "p99_ttft_s", "p99_tbt_s", "hit_rate", "loads_per_request")
# Chameleon's, at 8 requests/s: its cache against S-LoRA, which drops adapters with their last user.
_LESS: Final = 0.26


@dataclass(frozen=True, slots=True)
class _Case:
    """Where adapters come from, how, and what keeps them."""

    source: str
    load: str
    cache: str  # a policy of eviction, or none
    rate_rps: float = RATE_RPS

    def world(self) -> World:
        """The card and its way to adapters."""
        hardware = MAIN.hardware
        if self.source == _STORE:
            hardware = replace(hardware, is_host_warm=False, host_cache_bytes=0)
        return replace(MAIN, hardware=self._loading(hardware))

    def system(self) -> System:
        """Ours, but for the cache."""
        system = SYSTEMS[_SYSTEM]
        if self.cache == _NO_CACHE:
            return replace(system, replica=replace(system.replica, keeps_idle_adapters=False))
        return replace(system, replica=replace(system.replica, eviction=self.cache))

    def _loading(self, hardware: Hardware) -> Hardware:
        blocking = {_BLOCKS: 1.0, _BLOCKS_TWICE: 2.0}.get(self.load, 0.0)
        return replace(hardware, load_blocking=blocking, overlaps_prefill=self.load == _BY_LAYER)


_BASELINE: Final = _Case(_HOST, _BLOCKS, _NO_CACHE)
_WORSE_BASELINE: Final = _Case(_HOST, _BLOCKS_TWICE, _NO_CACHE)
_CACHED: Final = _Case(_HOST, _BY_LAYER, "chameleon")
_COLD_WHOLE: Final = _Case(_STORE, _BESIDE, _NO_CACHE)
_COLD_BY_LAYER: Final = _Case(_STORE, _BY_LAYER, _NO_CACHE)
_CASES: Final = (
    _BASELINE,
    _WORSE_BASELINE,
    _Case(_HOST, _BESIDE, _NO_CACHE),
    _Case(_HOST, _BY_LAYER, _NO_CACHE),
    _Case(_HOST, _BLOCKS, "lru"),
    _Case(_HOST, _BY_LAYER, "lru"),
    _CACHED,
    _COLD_WHOLE,
    _COLD_BY_LAYER,
    _Case(_STORE, _BESIDE, "lru"),
    _Case(_STORE, _BY_LAYER, "lru"),
    _Case(_STORE, _BESIDE, _NO_CACHE, _QUIET_RPS),
    _Case(_STORE, _BY_LAYER, _NO_CACHE, _QUIET_RPS),
)


def rows(*, quick: bool) -> list[dict[str, object]]:
    """One row per case. Quick ones are too short and too few to claim anything by."""
    duration_s, seeds = (QUICK_S, (0,)) if quick else (FULL_S, (0, 1, 2))
    (findings,) = run_sections([section(duration_s=duration_s, seeds=seeds)])
    return [dict(row) for row in findings.rows]


def section(*, duration_s: float, seeds: Sequence[int]) -> Section:
    """Every case with every seed."""
    jobs: dict[Key, Job] = {
        (case, seed): Run(case.world().lasting(duration_s), case.system(), case.rate_rps, seed)
        for case in _CASES
        for seed in seeds
    }
    return Section(NAME, jobs, _findings)


def _findings(results: Results) -> Findings:
    runs = {case: [run for (of, _), run in results.items() if of == case] for case in _CASES}
    p99_s = {case: fmean(run["p99_ttft_s"] for run in runs[case]) for case in _CASES}
    return Findings([_row(case, runs[case], p99_s) for case in _CASES], _targets(p99_s))


def _row(case: _Case, runs: Sequence[dict[str, Any]], p99_s: dict[_Case, float]) -> Row:
    each_s = [run["p99_ttft_s"] for run in runs]
    return {
        "section": NAME,
        "rate_rps": case.rate_rps,
        "adapters in": case.source,
        "a load": case.load,
        "cache": case.cache,
        **{name: fmean(run[name] for run in runs) for name in _MEASURES},
        "p99_ttft_spread": f"{min(each_s):.3f} - {max(each_s):.3f}",
        "p99_x_blocking": p99_s[case] / p99_s[_BASELINE],
        "p99_x_cached": p99_s[case] / p99_s[_CACHED],
    }


def _targets(p99_s: dict[_Case, float]) -> list[Target]:
    less = "overlap: less P99 TTFT with cache and overlap than without, where a load"
    by_layer = p99_s[_COLD_BY_LAYER] / p99_s[_COLD_WHOLE]
    return [
        Target(f"{less} {_BLOCKS}", _LESS, 1 - p99_s[_CACHED] / p99_s[_BASELINE], ""),
        Target(f"{less} {_BLOCKS_TWICE}", _LESS, 1 - p99_s[_CACHED] / p99_s[_WORSE_BASELINE], ""),
        Target("overlap: P99 TTFT by layer over whole, store", 1.0, by_layer, "x", is_upper=True),
    ]
