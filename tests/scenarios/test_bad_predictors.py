"""Predictions of output lengths are wrong in every way: nobody starves and nothing breaks.

A prediction that is late, dead or nonsense is the request's own limit (`services.gateway.predictor`
sees to it), so those are one kind here.
"""

import functools
import math
import statistics

import pytest

from bench.sim import (
    Adversarial,
    Broken,
    Constant,
    Oracle,
    PredictorKind,
    Result,
)
from tests.scenarios.scenario_worlds import CARD, SERVED, conversations, p99_ttft_s, simulate

WRONG: dict[str, PredictorKind] = {
    "zero": Constant(0),
    "longest": Constant(1e9),
    "dead": Constant(math.nan),
    "nonsense": Broken(),
    "opposite": Adversarial(),
}
SCARCE = CARD.with_pool_tokens(12_000)
COMPARED = ("zero", "longest", "opposite")  # the others are limits, as "longest" is
REGIMES = {"plentiful": (CARD, 6.0), "scarce": (SCARCE, 4.0)}  # each near what the card bears
SEEDS = (0, 1, 2)


@functools.cache
def runs(name: str, regime: str, predictor: PredictorKind) -> list[Result]:
    card, rate_rps = REGIMES[regime]
    traces = [conversations(rate_rps, 120.0, seed=seed) for seed in SEEDS]
    return [
        simulate(name, one, card=card, predictor=predictor, checks_integrity=False, sample_s=None)
        for one in traces
    ]


def mean_p99_s(results: list[Result]) -> float:
    return statistics.mean(p99_ttft_s(result.requests) for result in results)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", [*SERVED, "sjf", "vtc", "slo_odbs", "slora-strong"])
def test_all_get_their_whole_answers_although_memory_is_scarce(name: str, kind: str) -> None:
    trace = conversations(5.0, 15.0)
    result = simulate(name, trace, card=SCARCE, predictor=WRONG[kind])
    assert {record.outcome for record in result.requests} == {"done"}
    # A request that outgrew its promise may have to give way, but goes on: it is not for ever.
    assert max(record.preemptions for record in result.requests) <= 5
    assert sum(record.preemptions for record in result.requests) <= len(result.requests)


# By the fifo that has everything else of `adaptive`, and by the papers' own.
@pytest.mark.parametrize("kind", COMPARED)
@pytest.mark.parametrize("regime", REGIMES)
def test_the_adaptive_order_never_costs_much_over_first_come_first_served(
    regime: str, kind: str
) -> None:
    """A tenth, and half of that for the noise of a P99 of three short runs."""
    found_s = mean_p99_s(runs("adaptive", regime, WRONG[kind]))
    assert found_s <= 1.15 * mean_p99_s(runs("fifo", regime, WRONG[kind]))
    assert found_s <= 1.1 * mean_p99_s(runs("slora", regime, Oracle()))


def test_right_predictions_preempt_nobody_and_wrong_ones_seldom() -> None:
    for predictor, share in ((Oracle(), 0.0), *((WRONG[kind], 0.1) for kind in COMPARED)):
        records = [r for one in runs("adaptive", "scarce", predictor) for r in one.requests]
        assert sum(record.preemptions for record in records) <= share * len(records)
