"""Adapters give memory back as soon as tokens need it, and take it again after.

Memory pressure goes from nothing to all of it and back: a few requests, then so many and long ones
that the KV cache could take the whole pool, then a few again.
"""

from dataclasses import replace
from functools import cache

from bench.sim import Oracle, Result
from bench.workload import AdapterPool, Poisson, Trace, Workload, build
from services.core.systems import SYSTEMS, System
from tests.scenarios.scenario_worlds import CARD, simulate

POOL_TOKENS = 12_000
QUIET_S = 30.0
PRESSED = (30.0, 60.0)


def ramp() -> Trace:
    """Quiet, pressed and quiet again, half a minute each and a minute for what was left over."""
    pool = AdapterPool(40)
    parts = []
    for begin_s, rate_rps, scale in ((0.0, 3.0, 0.1), (30.0, 8.0, 0.5), (120.0, 3.0, 0.1)):
        workload = Workload(
            arrivals=Poisson(rate_rps),
            duration_s=30.0,
            pool=pool,
            scale=scale,
            max_output=512,
        )
        part = build(workload, seed=4)
        parts += [replace(one, arrival_s=one.arrival_s + begin_s) for one in part.arrivals]
    return Trace("ramp", 150.0, tuple(parts), pool.adapters())


@cache
def run(name: str, *, keeps: bool = True) -> Result:
    system: System = SYSTEMS[name]
    system = replace(system, replica=replace(system.replica, keeps_idle_adapters=keeps))
    card = CARD.with_pool_tokens(POOL_TOKENS)
    return simulate(system, ramp(), card=card, predictor=Oracle(), sample_s=0.5)


def test_all_requests_end_and_tokens_win_over_adapters() -> None:
    result = run("adaptive")
    assert {record.outcome for record in result.requests} == {"done"}
    blocks = {s.kv_blocks + s.adapter_blocks + s.free_blocks for s in result.timeline}
    assert len(blocks) == 1
    pool_blocks = blocks.pop()
    assert max(sample.kv_blocks for sample in result.timeline) > 0.6 * pool_blocks


def test_adapters_shrink_under_pressure_and_grow_again() -> None:
    timeline = run("adaptive").timeline
    before = [s.adapter_blocks for s in timeline if 20 <= s.time_s < QUIET_S]
    under = [s.adapter_blocks for s in timeline if PRESSED[0] + 10 <= s.time_s < PRESSED[1]]
    after = [s.adapter_blocks for s in timeline if s.time_s >= 140]
    assert min(under) < 0.7 * max(before)
    assert max(after) > 1.2 * min(under)


def test_the_cache_serves_no_worse_than_none() -> None:
    def goodput(result: Result) -> int:
        return sum(one.ttft_s <= 5.0 for one in result.requests)

    kept, dropped = run("adaptive"), run("adaptive", keeps=False)
    assert goodput(kept) >= goodput(dropped)
    loads = [sum(worker.loads for worker in one.workers) for one in (kept, dropped)]
    assert loads[0] < loads[1]
    assert kept.end_s <= dropped.end_s * 1.01
