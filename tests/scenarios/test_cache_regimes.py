"""The default eviction against recency, wherever one of them could have an edge."""

from functools import cache

import pytest

from bench.cache.regimes import REGIMES, Regime
from bench.cache.replay import AllResident, BestSet, Cached, Foreseeing, Outcome, Strategy, outcome

REQUESTS = 2500


@cache
def replayed(regime: Regime, strategy: Strategy, seed: int = 5) -> Outcome:
    uses = regime.uses(REQUESTS, seed=seed)
    return outcome(strategy, uses, regime.budget * float(uses.sizes.sum()))


def available(regime: Regime) -> Regime:
    if not regime.is_available:
        pytest.skip("the shared data is not here")
    return regime


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_the_default_finds_at_least_what_recency_does(regime: Regime) -> None:
    ours, lru = (replayed(available(regime), Cached(name)) for name in ("cost", "lru"))
    assert ours.hit_rate >= lru.hit_rate - 0.002
    # Small adapters stay for their hits, so where favourites shift fast the misses are larger.
    assert ours.gib_per_1000 <= lru.gib_per_1000 * 1.12


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_who_knows_the_future_finds_more(regime: Regime) -> None:
    ours = replayed(available(regime), Cached("cost"))
    by_size = replayed(regime, Foreseeing(by_size=True))
    everything = replayed(regime, AllResident())
    assert ours.hit_rate < by_size.hit_rate < everything.hit_rate
    assert ours.gib_per_1000 > replayed(regime, Foreseeing(by_size=False)).gib_per_1000


def test_the_default_is_near_the_best_where_favourites_never_change() -> None:
    regime = REGIMES[0]
    ours = replayed(regime, Cached("cost"))
    assert ours.hit_rate >= 0.95 * replayed(regime, Foreseeing(by_size=False)).hit_rate
    assert ours.hit_rate >= 0.93 * replayed(regime, BestSet("hits")).hit_rate


def test_a_replay_is_the_same_for_the_same_seed() -> None:
    uses = [REGIMES[0].uses(500, seed=seed).chosen.tolist() for seed in (1, 1, 2)]
    assert uses[0] == uses[1] != uses[2]
