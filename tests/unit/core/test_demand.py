"""Rates of use that outlive an adapter's stay, and the memory that they take."""

import random

import numpy as np

from services.core.demand import Demand
from services.core.types import AdapterDigest


def digest(index: int) -> AdapterDigest:
    return AdapterDigest(f"sha256:{index:064x}")


def chance(demand: Demand, index: int) -> float:
    return float(demand.chances_of([digest(index)])[0])


def test_chances_of_steady_favourites_approach_their_shares() -> None:
    rng, demand = random.Random(1), Demand()
    shares = [0.5, 0.25, 0.125, 0.125]
    for index in rng.choices(range(4), shares, k=6000):
        demand.use(digest(index))
    demand.check_integrity()
    found = demand.chances_of([digest(index) for index in range(4)])
    assert np.allclose(found, shares, atol=0.06)  # a rate is one of a few
    assert demand.weights[2] > demand.weights[0]


def test_a_set_that_changes_is_followed_and_makes_the_memory_short() -> None:
    rng, demand = random.Random(1), Demand()
    for use in range(6000):
        demand.use(digest(use // 100 * 10 + rng.randrange(3)))
    last = 5900 // 100 * 10
    assert min(chance(demand, last + index) for index in range(3)) > 0.1
    assert demand.weights[0] > demand.weights[2]


def test_a_scan_makes_nobody_a_favourite() -> None:
    demand = Demand()
    for use in range(2000):
        demand.use(digest(use % 2))
        demand.use(digest(1000 + use % 700))
    scanned = max(chance(demand, 1000 + index) for index in range(700))
    assert chance(demand, 0) > 20 * scanned


def test_an_adapter_that_was_never_used_has_a_chance() -> None:
    demand = Demand()
    demand.use(digest(0))
    assert 0 < chance(demand, 1) < chance(demand, 0)


def test_no_more_adapters_are_known_than_the_limit_and_held_ones_stay() -> None:
    demand = Demand(limit=100)
    row = demand.hold(digest(0))
    for _ in range(50):
        demand.use(digest(1))
    for index in range(2, 400):
        demand.use(digest(index))
        if index % 20 == 0:
            demand.use(digest(1))
        assert len(demand) <= 101
    demand.check_integrity()
    assert digest(0) in demand
    assert digest(1) in demand, "what is used often is not forgotten"
    demand.release(row)


def test_what_is_forgotten_was_never_used() -> None:
    demand = Demand()
    for _ in range(10):
        demand.use(digest(1))
    demand.use(digest(2))
    demand.forget(digest(1))
    assert digest(1) not in demand
    assert chance(demand, 1) < chance(demand, 2)


def test_counts_stay_finite_over_very_many_uses() -> None:
    demand = Demand()
    for use in range(60_000):  # the shortest span's scale passes its limit twice
        demand.use(digest(use % 3))
    demand.check_integrity()
    total = sum(chance(demand, index) for index in range(3))
    assert abs(total - 1.0) < 0.02
