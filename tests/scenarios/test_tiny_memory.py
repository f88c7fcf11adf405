"""Many adapters, the base model, chunked prompts and clients that leave, in very little memory.

Every run asserts the machines' invariants after each event, and at its end that nobody holds
memory, a batch slot, a quota or an adapter for a request that has gone.
"""

import random
from dataclasses import replace

import pytest

from bench.sim import Accurate
from bench.workload import AdapterPool, Popularity, Trace
from services.core.systems import SYSTEMS
from tests.scenarios.scenario_worlds import CARD, conversations, simulate

POOL_TOKENS = 5000  # about ten requests, or ten adapters of rank 128


def leaving(trace: Trace, share: float, *, seed: int) -> Trace:
    """So many clients cancel at some time in the next ten seconds: queued, loading or decoding."""
    rng = random.Random(seed)
    return replace(
        trace,
        arrivals=tuple(
            replace(one, leaves_s=rng.uniform(0.0, 10.0)) if rng.random() < share else one
            for one in trace.arrivals
        ),
    )


@pytest.mark.parametrize("name", SYSTEMS)
def test_nothing_leaks_when_a_third_of_the_clients_leave(name: str) -> None:
    traffic = conversations(
        5.0, 20.0, seed=3, pool=AdapterPool(60), popularity=Popularity(base_share=0.3)
    )
    trace = leaving(traffic, 0.3, seed=3)
    chosen = SYSTEMS[name]
    if chosen.replica.stepping == "target":
        chunked = replace(chosen.replica, stepping="chunked", prefill_tokens_per_step=128)
        chosen = replace(chosen, replica=chunked)
    card = CARD.with_pool_tokens(POOL_TOKENS)
    result = simulate(chosen, trace, card=card, predictor=Accurate(0.6))

    left = [one for one in result.requests if one.outcome == "cancelled"]
    assert {one.outcome for one in result.requests} == {"done", "cancelled"}
    assert any(one.started_s is None for one in left)
    assert any(one.tokens > 0 for one in left)
    for record, request in zip(result.requests, trace.arrivals, strict=True):
        assert record.tokens == record.output_tokens or request.leaves_s is not None
