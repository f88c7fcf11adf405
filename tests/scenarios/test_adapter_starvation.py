"""A popular adapter fills the memory: whoever needs another one still gets its turn.

There is room for one adapter and a few requests. Memory never drains by itself while requests of
the popular one keep coming, so a scheduler that starts whatever fits never loads the other one.
"""

import functools

import pytest

from bench.sim import Result
from bench.workload import Arrival, Trace
from services.core.types import Adapter, AdapterDigest
from tests.scenarios.scenario_worlds import CARD, simulate
from tests.sim.sim_worlds import arrival, trace

A, B, C = (Adapter(AdapterDigest(f"sha256:{i:064x}"), 64, 64 * 2**21) for i in range(3))
ADAPTER_TOKENS = 256
KV_TOKENS = 1500
SMALL_CARD = CARD.with_pool_tokens(ADAPTER_TOKENS + KV_TOKENS)
POPULAR_S = 30.0
BEGIN_S = 2.0


def popular(rate_rps: float) -> list[Arrival]:
    """Requests for A, evenly, a hundred tokens and forty each."""
    count = int(POPULAR_S * rate_rps)
    return [chat(A, number / rate_rps) for number in range(count)]


def chat(adapter: Adapter, at_s: float) -> Arrival:
    return arrival(at_s, adapter=adapter, prompt_tokens=100, output_tokens=40)


@functools.cache
def requests_for(others: tuple[Adapter, ...], rate_rps: float) -> Trace:
    """Those for A, and two turns of one for each of the others."""
    asked_s = [BEGIN_S + 6.0 * turn + 0.1 * i for turn in range(2) for i in range(len(others))]
    rare = [chat(others[i % len(others)], at_s) for i, at_s in enumerate(asked_s)]
    requests = sorted([*popular(rate_rps), *rare], key=lambda one: one.arrival_s)
    return trace(*requests)


@functools.cache
def in_line(others: tuple[Adapter, ...], rate_rps: float) -> Result:
    """The same first come, first served."""
    return simulate("fifo", requests_for(others, rate_rps), card=SMALL_CARD)


# How long others wait in a first come, first served line, and how much longer they may: until the
# memory has drained for them (a second of passing, then the longest request that runs).
@pytest.mark.parametrize("rate_rps", [3.0, 5.0, 8.0])
@pytest.mark.parametrize("others", [(B,), (B, C)], ids=["A_B", "A_B_C"])
@pytest.mark.parametrize("name", ["adaptive", "chameleon", "fifo", "vtc", "slo_odbs", "slora"])
def test_the_others_wait_is_bounded_and_adapters_do_not_thrash(
    name: str, others: tuple[Adapter, ...], rate_rps: float
) -> None:
    world = requests_for(others, rate_rps)
    result = simulate(name, world, card=SMALL_CARD)
    fair = in_line(others, rate_rps)

    assert all(record.outcome == "done" for record in result.requests)
    each = zip(result.requests, fair.requests, world.arrivals, strict=True)
    for record, fair_record, request in each:
        if request.adapter is not A:
            assert record.ttft_s <= fair_record.ttft_s + 4.0
    rare = sum(request.adapter is not A for request in world.arrivals)
    turns = 2 * rare + 1  # each of the others in, and A back in
    assert sum(worker.loads for worker in result.workers) <= 3 * turns
