"""The first guess at an answer's length."""

import random

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.predictor import LengthPredictor


def test_without_history_the_guess_is_the_limit() -> None:
    assert LengthPredictor().predict("a", 10, 700) == 700
    assert LengthPredictor().predict(None, 10, 1) == 1


def test_an_adapters_history_wins_over_the_others() -> None:
    predictor = LengthPredictor()
    for _ in range(100):
        predictor.learn("short", 10, 5)
        predictor.learn("long", 10, 400)
    assert predictor.predict("short", 10, 1000) < 30
    assert 350 < predictor.predict("long", 10, 1000) < 430


def test_a_new_adapter_is_guessed_like_the_others() -> None:
    predictor = LengthPredictor()
    for _ in range(200):
        predictor.learn("known", 10, 100)
    assert 90 < predictor.predict("new", 10, 1000) < 200


def test_one_answer_moves_the_guess_only_a_little() -> None:
    predictor = LengthPredictor()
    for _ in range(200):
        predictor.learn("known", 10, 100)
    predictor.learn("new", 10, 2)
    assert 50 < predictor.predict("new", 10, 1000) < 150


def test_a_job_that_changes_is_followed() -> None:
    predictor = LengthPredictor()
    for _ in range(300):
        predictor.learn("a", 10, 10)
    for _ in range(150):
        predictor.learn("a", 10, 300)
    assert predictor.predict("a", 10, 1000) > 250


def test_the_guess_beats_the_limit_on_lengths_that_differ_by_adapter() -> None:
    draw = random.Random(7)
    predictor = LengthPredictor()
    error_predicted = error_limit = 0.0
    for _ in range(5000):
        job = draw.randrange(50)
        length = max(1, min(512, int(draw.lognormvariate(2 + job / 20, 0.4))))
        predicted = predictor.predict(str(job), 10, 512)
        error_predicted += abs(predicted - length)
        error_limit += 512 - length
        predictor.learn(str(job), 10, length)
    assert error_predicted < error_limit / 10


@given(
    events=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10_000)), max_size=200),
    max_tokens=st.integers(1, 100_000),
)
def test_guesses_are_within_the_limit_and_memory_is_bounded(
    events: list[tuple[int, int]], max_tokens: int
) -> None:
    predictor = LengthPredictor(adapters_max=8)
    for adapter, length in events:
        predictor.learn(str(adapter), 1, length)
        assert len(predictor) <= 8
        assert 1 <= predictor.predict(str(adapter), 1, max_tokens) <= max_tokens
