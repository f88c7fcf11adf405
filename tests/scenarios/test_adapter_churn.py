"""Very many adapters, few of them in memory: the cache keeps what is wanted, and nothing thrashes.

A load that is not for a request that needs it now is one too many: what was loaded ahead must not
go for the next one that is loaded ahead, and so on in a circle.
"""

from dataclasses import replace

import pytest

from bench.sim import Learned
from bench.workload import AdapterPool, Popularity
from tests.scenarios.scenario_worlds import CARD, SERVED, conversations, simulate, system

SMALL_BYTES = 2**19  # per rank: a card's memory holds some hundred adapters
SCARCE = CARD.with_pool_tokens(16_000)
PATTERNS = {
    "1000": (1000, Popularity()),
    "10000": (10_000, Popularity()),
    "shift": (1000, Popularity(shift_s=20.0)),
    "scan": (1000, Popularity(scan_share=0.5)),
}
# Of requests, found in memory when they came to the worker; most requests are for the favourites.
HIT_RATE_MIN = {"1000": 0.28, "10000": 0.13, "shift": 0.17, "scan": 0.22}


def figures(name: str, pattern: str, eviction: str, rate_rps: float) -> dict[str, float]:
    count, popularity = PATTERNS[pattern]
    pool = AdapterPool(count, rank_bytes=SMALL_BYTES)
    trace = conversations(rate_rps, 60.0, seed=1, pool=pool, popularity=popularity)
    chosen = system(name)
    chosen = replace(chosen, replica=replace(chosen.replica, eviction=eviction))
    result = simulate(
        chosen, trace, card=SCARCE, predictor=Learned(), sample_s=None, checks_integrity=False
    )
    assert {record.outcome for record in result.requests} == {"done"}
    return result.summary()


@pytest.mark.parametrize("eviction", ["lru", "chameleon", "cost"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", SERVED)
def test_favourites_stay_and_no_request_costs_more_than_a_load(
    name: str, pattern: str, eviction: str
) -> None:
    usual = figures(name, pattern, eviction, 4.0)
    assert usual["hit_rate"] >= HIT_RATE_MIN[pattern]
    assert usual["loads_per_request"] <= 1.0 - usual["hit_rate"] + 0.05
    # With a queue that never empties there are always adapters to be loaded ahead.
    assert figures(name, pattern, eviction, 9.0)["loads_per_request"] <= 1.0
