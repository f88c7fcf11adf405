"""The search for the highest bearable rate, and percentiles that hide nothing."""

import math
from dataclasses import replace

import pytest

from bench.sim import Scenario, Slo, Window, knees, simulate
from bench.sim.knee import Grid
from bench.sim.records import percentile
from bench.workload import Poisson, Workload, build
from tests.sim.sim_worlds import card, conversations, scenario, system


@pytest.mark.parametrize("limit", [1.0, 1.05, 3.7, 4.0, 9.99, 10.0, 99.0])
def test_the_search_ends_within_a_step_of_the_limit(limit: float) -> None:
    asked: list[float] = []

    def is_met(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    found = Grid(1.0, 10.0, 0.1).highest(is_met)
    assert found <= limit
    assert found == pytest.approx(min(limit, 10.0), abs=0.1 + 1e-9)
    assert len(asked) == len(set(asked)) <= 16


def test_nothing_above_the_lowest_rate_is_found_where_that_one_fails() -> None:
    assert Grid(1.0, 10.0, 0.1).highest(lambda _: False) == 1.0


@pytest.mark.parametrize("guess", [1.0, 5.0, 6.2, 6.3, 6.4, 9.0, 10.0])
def test_a_search_may_begin_anywhere(guess: float) -> None:
    asked: list[float] = []

    def is_met(rate: float) -> bool:
        asked.append(rate)
        return rate <= 6.3

    assert Grid(1.0, 10.0, 0.1).highest(is_met, guess=guess) == pytest.approx(6.3)
    assert len(asked) == len(set(asked)) <= 12
    assert asked[0] == guess


def test_a_percentile_is_a_value_that_occurred() -> None:
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 0.99) == 99.0
    assert percentile(values, 1.0) == 100.0
    assert percentile([*values, math.inf, math.inf], 0.99) == math.inf
    assert math.isnan(percentile([], 0.5))


def test_the_joint_knee_is_never_above_the_one_of_first_tokens() -> None:
    def at(rate_rps: float, seed: int) -> Scenario:
        workload = Workload(arrivals=Poisson(rate_rps), duration_s=40.0, scale=0.3, max_output=400)
        return scenario(
            build(workload, seed=seed),
            hardware=card(12_000),
            system=system("adaptive"),
            checks_integrity=False,
            sample_s=None,
            window=Window(drain_s=30.0),
        )

    knee = knees(at, seeds=(0, 1), low_rps=1.0, high_rps=9.0, tolerance_rps=1.0)
    assert len(knee.joint_rps) == 2
    assert all(joint <= ttft for joint, ttft in zip(knee.joint_rps, knee.ttft_rps, strict=True))
    assert 1.0 <= knee.joint_median_rps <= 9.0


def test_an_objective_counts_those_that_never_began() -> None:
    run = scenario(conversations(duration_s=5.0), window=Window(drain_s=0.0))
    assert not Slo().meets_ttft(simulate(replace(run, hardware=replace(card(), max_requests=1))))
    assert Slo().meets_ttft(simulate(replace(run, window=Window(drain_s=60.0))))
