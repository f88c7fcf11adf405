"""What a worker learns of its own steps and loads."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest

from services.core.costfit import CostFit
from services.core.costs import StepCosts, StepShape

TRUE = StepCosts(
    step_s=0.030,
    prefill_s=0.011,
    prefill_token_s=1.7e-4,
    prefill_rank_token_s=1.3e-6,
    decode_sequence_s=3e-4,
    decode_rank_s=8e-6,
    cached_token_s=1.1e-6,
)
COEFFICIENTS = (
    "step_s",
    "prefill_s",
    "prefill_token_s",
    "prefill_rank_token_s",
    "decode_sequence_s",
    "decode_rank_s",
    "cached_token_s",
)


def shapes(random: Random, count: int) -> Iterator[StepShape]:
    """Steps as a busy worker has them."""
    for _ in range(count):
        decodes = random.randint(0, 64)
        tokens = random.choice([0, random.randint(1, 1000)]) if decodes else 500
        yield StepShape(
            prefill_tokens=tokens,
            prefill_rank_tokens=tokens * random.choice([0, 8, 32, 128]),
            decode_sequences=decodes,
            decode_ranks=decodes * random.choice([8, 16, 64, 128]),
            cached_tokens=decodes * random.randint(50, 1500),
        )


def fitted(
    costs: StepCosts, *, steps: int, noise: float = 0.0, prior: StepCosts | None = None
) -> CostFit:
    random = Random(7)
    fit = CostFit(prior or StepCosts())
    for shape in shapes(random, steps):
        fit.learn_step(shape, costs.step_time_s(shape) * random.uniform(1 - noise, 1 + noise))
    return fit


def test_known_costs_are_found_within_five_percent_under_noise() -> None:
    costs = fitted(TRUE, steps=4000, noise=0.05).costs
    for name in COEFFICIENTS:
        assert getattr(costs, name) == pytest.approx(getattr(TRUE, name), rel=0.05), name


@pytest.mark.parametrize("speed", [0.01, 1.0, 100.0])
def test_after_a_few_dozen_steps_the_next_ones_are_predicted(speed: float) -> None:
    costs = replace(TRUE, **{name: getattr(TRUE, name) * speed for name in COEFFICIENTS})
    fit = fitted(costs, steps=48, noise=0.05)
    errors = [
        abs(fit.costs.step_time_s(shape) / costs.step_time_s(shape) - 1)
        for shape in shapes(Random(8), 200)
    ]
    assert sum(errors) / len(errors) < 0.05


def test_the_prior_holds_until_something_is_measured() -> None:
    fit = CostFit(TRUE)
    fit.learn_step(StepShape(decode_sequences=1), 5.0)
    assert fit.costs == TRUE
    assert not fit.is_measured


def test_steps_of_one_shape_scale_the_prior_and_leave_its_proportions() -> None:
    fit = CostFit(TRUE)
    shape = StepShape(decode_sequences=8, decode_ranks=128, cached_tokens=4000)
    for _ in range(64):
        fit.learn_step(shape, 3 * TRUE.step_time_s(shape))
    assert fit.costs.step_time_s(shape) == pytest.approx(3 * TRUE.step_time_s(shape), rel=0.01)
    assert fit.costs.prefill_token_s == pytest.approx(3 * TRUE.prefill_token_s, rel=0.05)


def test_a_hiccup_moves_little() -> None:
    fit = fitted(TRUE, steps=1600)
    shape = StepShape(decode_sequences=16, decode_ranks=512, cached_tokens=8000)
    fit.learn_step(shape, 60.0)
    for one in shapes(Random(9), 15):
        fit.learn_step(one, TRUE.step_time_s(one))
    assert fit.costs.step_time_s(shape) == pytest.approx(TRUE.step_time_s(shape), rel=0.04)


def test_a_machine_that_has_become_slower_is_followed() -> None:
    fit = fitted(TRUE, steps=3000)
    for one in shapes(Random(9), 4000):
        fit.learn_step(one, 8 * TRUE.step_time_s(one))
    shape = StepShape(decode_sequences=16, decode_ranks=512, cached_tokens=8000)
    assert fit.costs.step_time_s(shape) == pytest.approx(8 * TRUE.step_time_s(shape), rel=0.1)


def test_no_cost_but_that_of_a_first_chunk_is_negative_whatever_is_measured() -> None:
    random = Random(3)
    fit = CostFit(StepCosts())
    for shape in shapes(random, 800):
        fit.learn_step(shape, random.choice([1e-6, 0.01, 0.5, 100.0]) * random.random() + 1e-9)
        values = [getattr(fit.costs, name) for name in COEFFICIENTS if name != "prefill_s"]
        assert all(0.0 <= value < 1e3 for value in values)
        assert fit.costs.step_s + fit.costs.prefill_s >= 0.0


@pytest.mark.parametrize("time_s", [0.0, -1.0, float("inf"), float("nan")])
def test_times_that_cannot_be_are_ignored(time_s: float) -> None:
    fit = CostFit(TRUE)
    for _ in range(100):
        fit.learn_step(StepShape(decode_sequences=1), time_s)
    assert fit.costs == TRUE


def test_many_steps_later_it_still_learns() -> None:
    fit = CostFit(StepCosts())
    for shape in [*shapes(Random(1), 500)] * 45:  # the weights are scaled down meanwhile
        fit.learn_step(shape, TRUE.step_time_s(shape))
    assert fit.costs.step_s == pytest.approx(TRUE.step_s, rel=0.01)


def test_the_batch_is_the_mean_of_the_decoding_sequences() -> None:
    fit = CostFit(StepCosts())
    for index in range(3200):
        fit.learn_step(StepShape(decode_sequences=10 if index % 2 else 30), 0.05)
        fit.learn_step(StepShape(prefill_tokens=100), 0.05)
    assert fit.costs.batch == pytest.approx(20.0, rel=0.01)


def test_loads_that_share_the_link_are_not_counted_twice() -> None:
    fit = CostFit(StepCosts())
    fit.learn_load(1000, began_s=0.0, ended_s=1.0)
    fit.learn_load(1000, began_s=0.0, ended_s=2.0)
    fit.learn_load(1000, began_s=5.0, ended_s=6.0)
    assert fit.costs.load_byte_s == pytest.approx(1e-3)
