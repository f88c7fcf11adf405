"""Predictors are as good as they are said to be, and nonsense never reaches the scheduler."""

import math

import pytest

from bench.sim import (
    Accurate,
    Adversarial,
    Broken,
    Constant,
    Learned,
    Oracle,
    PredictorKind,
)
from bench.sim.predictors import Predictor
from bench.workload import Poisson, Workload, build

WORKLOAD = Workload(arrivals=Poisson(20.0), duration_s=100, context_tokens_max=100_000)
ARRIVALS = build(WORKLOAD).arrivals


def predictions(kind: PredictorKind) -> list[tuple[int, int, int]]:
    predictor = Predictor(kind, ARRIVALS, seed=1)
    found: list[tuple[int, int, int]] = []
    for arrival in ARRIVALS:
        prediction = predictor.predict(arrival)
        found.append((arrival.output_tokens, prediction.tokens, prediction.q90_tokens))
        predictor.end(arrival)
    return found


def test_the_oracle_knows() -> None:
    assert all(truth == tokens == q90 for truth, tokens, q90 in predictions(Oracle()))


@pytest.mark.parametrize("probability", [0.6, 0.8])
def test_accuracy_is_the_share_of_exact_answers_and_nine_of_ten_stay_within_the_q90(
    probability: float,
) -> None:
    found = predictions(Accurate(probability))
    exact = sum(truth == tokens for truth, tokens, _ in found) / len(found)
    within = sum(truth <= q90 for truth, _, q90 in found) / len(found)
    assert exact == pytest.approx(probability, abs=0.04)
    assert within == pytest.approx(0.9, abs=0.05)


def test_the_adversary_takes_short_for_long() -> None:
    found = sorted(predictions(Adversarial()))
    tenth = len(found) // 10
    shortest, longest = found[:tenth], found[-tenth:]
    assert min(tokens for _, tokens, _ in shortest) > max(tokens for _, tokens, _ in longest)


@pytest.mark.parametrize("kind", [Broken(), Constant(math.nan), Constant(-3), Constant(1e30)])
def test_nonsense_becomes_a_possible_number(kind: PredictorKind) -> None:
    for arrival, (_, tokens, q90) in zip(ARRIVALS, predictions(kind), strict=True):
        assert 1 <= tokens <= q90 <= arrival.max_output_tokens


def test_the_live_predictor_learns_from_what_has_ended() -> None:
    found = predictions(Learned())
    assert found[0][2] == ARRIVALS[0].max_output_tokens, "anything is likely at first"
    late = found[-500:]
    truths, guesses = (sum(one[column] for one in late) for column in (0, 1))
    assert guesses == pytest.approx(truths, rel=0.15)
    within = sum(truth <= q90 for truth, _, q90 in late) / len(late)
    assert within == pytest.approx(0.9, abs=0.07)
