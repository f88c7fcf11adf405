"""The guess at an answer's length: a number that can be, whoever guesses."""

import math
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.predictor import DecayedLengths, LengthPredictor, Prediction


def test_without_history_the_guess_is_a_quarter_of_the_limit_and_anything_is_likely() -> None:
    assert LengthPredictor().predict("a", 10, 700) == Prediction(175, 700)
    assert LengthPredictor().predict("a", 10, 4000) == Prediction(256, 4000)
    assert LengthPredictor().predict(None, 10, 1) == Prediction(1, 1)


def test_an_adapters_history_wins_over_the_others() -> None:
    predictor = LengthPredictor()
    for _ in range(100):
        predictor.learn("short", 10, 5)
        predictor.learn("long", 10, 400)
    assert predictor.predict("short", 10, 1000).tokens < 30
    assert 350 < predictor.predict("long", 10, 1000).tokens < 430


def test_a_new_adapter_is_guessed_like_the_others() -> None:
    predictor = LengthPredictor()
    for _ in range(200):
        predictor.learn("known", 10, 100)
    assert 90 < predictor.predict("new", 10, 1000).tokens < 200


def test_one_answer_moves_the_guess_only_a_little() -> None:
    predictor = LengthPredictor()
    for _ in range(200):
        predictor.learn("known", 10, 100)
    predictor.learn("new", 10, 2)
    assert 50 < predictor.predict("new", 10, 1000).tokens < 150


def test_a_job_that_changes_is_followed() -> None:
    predictor = LengthPredictor()
    for _ in range(300):
        predictor.learn("a", 10, 10)
    for _ in range(150):
        predictor.learn("a", 10, 300)
    assert predictor.predict("a", 10, 1000).tokens > 250


def test_the_guess_beats_the_limit_on_lengths_that_differ_by_adapter() -> None:
    draw = random.Random(7)
    predictor = LengthPredictor()
    error_predicted = error_limit = 0.0
    for _ in range(5000):
        job = draw.randrange(50)
        length = max(1, min(512, int(draw.lognormvariate(2 + job / 20, 0.4))))
        predicted = predictor.predict(str(job), 10, 512).tokens
        error_predicted += abs(predicted - length)
        error_limit += 512 - length
        predictor.learn(str(job), 10, length)
    assert error_predicted < error_limit / 10


def _lognormal(draw: random.Random) -> float:
    return draw.lognormvariate(math.log(129), 0.93)


def _exponential(draw: random.Random) -> float:
    return draw.expovariate(1 / 150)


def _normal(draw: random.Random) -> float:
    return draw.gauss(200, 40)


@pytest.mark.parametrize(
    "draw_length",
    [
        _lognormal,
        _exponential,
        _normal,
    ],
)
def test_nine_of_ten_answers_stay_within_the_90th_percentile(
    draw_length: Callable[[random.Random], float],
) -> None:
    draw = random.Random(3)
    predictor = LengthPredictor()
    within = 0
    for count in range(6000):
        length = max(1, round(draw_length(draw)))
        within += count >= 1000 and length <= predictor.predict("a", 10, 8000).q90_tokens
        predictor.learn("a", 10, length)
    assert 0.86 < within / 5000 < 0.94


def test_a_job_of_one_length_needs_no_margin() -> None:
    predictor = LengthPredictor()
    for _ in range(500):
        predictor.learn("a", 10, 100)
    prediction = predictor.predict("a", 10, 1000)
    assert prediction.tokens <= prediction.q90_tokens <= 110


class Wrong:
    """An estimator that says whatever it is told to."""

    def __init__(self, expected: float, q90: float) -> None:
        self._said = (expected, q90)

    def estimate(
        self, adapter_digest: str | None, prompt_tokens: int, max_tokens: int
    ) -> tuple[float, float]:
        del adapter_digest, prompt_tokens, max_tokens
        if self._said == (0.0, 0.0):
            raise ZeroDivisionError
        return self._said

    def learn(self, adapter_digest: str | None, prompt_tokens: int, output_tokens: int) -> None:
        """Nothing is learned."""


@pytest.mark.parametrize(
    ("expected", "q90", "prediction"),
    [
        (math.nan, 50.0, Prediction(500, 500)),
        (-1.0, 50.0, Prediction(500, 500)),
        (math.inf, math.inf, Prediction(500, 500)),
        (-math.inf, 50.0, Prediction(500, 500)),
        (40.0, math.nan, Prediction(40, 500)),
        (40.0, -3.0, Prediction(40, 500)),
        (40.0, 20.0, Prediction(40, 40)),
        (1e300, 1e308, Prediction(500, 500)),
        (0.2, 0.3, Prediction(1, 1)),
        (0.0, 0.0, Prediction(500, 500)),  # it raises
    ],
)
def test_a_number_that_cannot_be_becomes_the_limit(
    expected: float, q90: float, prediction: Prediction
) -> None:
    assert LengthPredictor(Wrong(expected, q90)).predict("a", 10, 500) == prediction


@pytest.mark.parametrize("said", [None, 7.0, ("12", "13"), (1.0,), (None, None), (10**400, 1.0)])
def test_an_estimator_that_answers_nonsense_or_cannot_learn_fails_no_request(said: Any) -> None:
    class Nonsense(Wrong):
        def estimate(
            self, adapter_digest: str | None, prompt_tokens: int, max_tokens: int
        ) -> tuple[float, float]:
            return said  # type: ignore[no-any-return]

        def learn(self, adapter_digest: str | None, prompt_tokens: int, output_tokens: int) -> None:
            raise OSError

    predictor = LengthPredictor(Nonsense(1.0, 1.0))
    assert predictor.predict("a", 10, 500) == Prediction(500, 500)
    predictor.learn("a", 10, 20)


def test_a_guess_takes_no_time_however_many_adapters_are_known() -> None:
    """The gateway asks in its event loop."""
    predictor = LengthPredictor()
    for number in range(12_000):
        predictor.learn(str(number), 10, number % 500)
    began_s = time.perf_counter()
    for number in range(5000):
        predictor.predict(str(number), 10, 500)
        predictor.learn(str(number), 10, 50)
    assert time.perf_counter() - began_s < 1.0  # usually some 0.02


@given(
    events=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10_000)), max_size=200),
    max_tokens=st.integers(1, 100_000),
)
def test_guesses_are_within_the_limit_and_memory_is_bounded(
    events: list[tuple[int, int]], max_tokens: int
) -> None:
    lengths = DecayedLengths(adapters_max=8)
    predictor = LengthPredictor(lengths)
    for adapter, length in events:
        predictor.learn(str(adapter), 1, length)
        assert len(lengths) <= 8
        prediction = predictor.predict(str(adapter), 1, max_tokens)
        assert 1 <= prediction.tokens <= prediction.q90_tokens <= max_tokens
