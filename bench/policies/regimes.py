"""The same systems where something is scarce, slow, bursty or different, and two evictions.

Other lengths than the conversation trace's are scaled so that the fluid bound of the joint knee is
the main calibration's, 11.6 requests/s: the same rates are the same share of what the card can do.
"""

from dataclasses import replace
from itertools import product
from typing import Any, Final

from bench.policies.extent import Extent
from bench.policies.jobs import Findings, Job, Key, Results, Section
from bench.policies.world import MAIN, SMALL_CARD, Run, World
from bench.report import Row
from bench.sim import hardware
from bench.workload import AdapterPool, Gamma, OnOff, Popularity, Workload
from services.core.systems import SYSTEMS, System

NAME: Final = "regimes"
_SYSTEMS: Final = ("slora-strong", "chameleon", "fifo", "adaptive")
_HALF_POOL_TOKENS: Final = 30_000
_SHIFT_S: Final = 60.0
_EVICTION_RPS: Final = 8.0
_EVICTIONS: Final = ("lru", "chameleon")
_MEASURES: Final = (
    "p50_ttft_s",
    "p99_ttft_s",
    "p99_tbt_s",
    "p99_slowdown_small",
    "p99_slowdown_large",
    "max_wait_s",
    "hit_rate",
    "loads_per_request",
    "violations",
)


def _worlds() -> tuple[World, ...]:
    half = MAIN.hardware.with_pool_tokens(_HALF_POOL_TOKENS)
    return (
        replace(MAIN, name="24 GB card", hardware=hardware(SMALL_CARD)),
        replace(_lengths("half pool, long outputs", "sharegpt", 0.23), hardware=half),
        *_many_adapters(),
        replace(
            MAIN,
            name="loads block 2x",
            hardware=replace(MAIN.hardware, load_blocking=2.0),
        ),
        replace(
            MAIN,
            name="loads block 4x",
            hardware=replace(MAIN.hardware, load_blocking=4.0),
        ),
        replace(MAIN, name="bursts, CV 4", workload=_arriving(Gamma(6.0, cv=4.0))),
        replace(MAIN, name="bursts, on and off", workload=_arriving(OnOff(6.0))),
        _lengths("code", "azure-code", 0.152),
        _lengths("servegen", "servegen-m-large", 0.247, Popularity(adapters="clients")),
    )


def _many_adapters() -> tuple[World, ...]:
    half = replace(MAIN, hardware=MAIN.hardware.with_pool_tokens(_HALF_POOL_TOKENS))
    some, many = (
        replace(
            half,
            name=f"{count} adapters, half pool",
            workload=replace(half.workload, pool=AdapterPool(count)),
        )
        for count in (500, 2000)
    )
    shifting = replace(
        some,
        name=f"{some.name}, hot set shifts",
        workload=replace(some.workload, popularity=Popularity(shift_s=_SHIFT_S)),
    )
    return some, many, shifting


def _arriving(arrivals: Gamma | OnOff) -> Workload:
    return replace(MAIN.workload, arrivals=arrivals)


def _lengths(name: str, lengths: str, scale: float, popularity: Popularity | None = None) -> World:
    workload = replace(
        MAIN.workload, lengths=lengths, scale=scale, popularity=popularity or Popularity()
    )
    return replace(MAIN, name=name, workload=workload)


def section(extent: Extent) -> Section:
    """Every world at every load, one seed."""
    jobs: dict[Key, Job] = {
        (world.name, rate_rps, system): Run(world.lasting(extent.regime_s), system, rate_rps)
        for world, rate_rps, system in product(_worlds(), extent.regime_loads_rps, _SYSTEMS)
    }
    evictions: dict[Key, Job] = {
        (world.name, _EVICTION_RPS, system.name): Run(
            world.lasting(extent.regime_s), system, _EVICTION_RPS
        )
        for world, system in product(_many_adapters(), map(_evicting, _EVICTIONS))
    }
    return Section(NAME, jobs | evictions, _findings)


def _evicting(eviction: str) -> System:
    adaptive = SYSTEMS["adaptive"]
    replica = replace(adaptive.replica, eviction=eviction)
    return replace(adaptive, name=f"adaptive, evicts by {eviction}", replica=replica)


def _findings(results: Results) -> Findings:
    return Findings([_row(key, run) for key, run in results.items()])


def _row(key: Key, run: dict[str, Any]) -> Row:
    world, rate_rps, system = key
    return {
        "section": NAME,
        "world": world,
        "rate_rps": rate_rps,
        "system": system,
        **{name: run[name] for name in _MEASURES},
    }
