"""Which idle adapter goes, by each policy, and what policies refuse."""

import itertools
import random
import time

import pytest

from services.core.cache import AdapterCache, CachedAdapter
from services.core.eviction import EVICTION_NAMES, build_eviction
from services.core.types import Adapter, AdapterDigest
from tests.unit.core.core_world import adapter


def loaded(cache: AdapterCache, one: Adapter, *, now: float = 0.0) -> None:
    blocks = one.size_bytes // 1000
    cache.begin_load(CachedAdapter(one, blocks, last_used_s=now))
    cache.end_load(one.digest)


def used(cache: AdapterCache, one: Adapter, *, now: float) -> None:
    cache.use(one.digest, now=now)
    cache.unuse(one.digest, now=now)


def order(cache: AdapterCache, *, now: float) -> list[AdapterDigest]:
    cache.check_integrity()
    return list(cache.victims(lambda _: None, spare=(-2, 0), now=now))


def cache_of(name: str, **options: str) -> AdapterCache:
    return AdapterCache(build_eviction(name, options))


def test_cost_keeps_what_is_used_often_whatever_came_last() -> None:
    cache = cache_of("cost")
    often, once = adapter("often"), adapter("once")
    loaded(cache, often)
    loaded(cache, once)
    for now in range(5):
        used(cache, often, now=float(now))
    used(cache, once, now=6.0)
    assert order(cache, now=7.0) == ["once", "often"]


def test_cost_knows_an_adapter_that_comes_back() -> None:
    cache = cache_of("cost")
    back, new = adapter("back"), adapter("new")
    loaded(cache, back)
    for now in range(5):
        used(cache, back, now=float(now))
    cache.remove(back.digest)
    loaded(cache, back, now=10.0)
    loaded(cache, new, now=10.0)
    used(cache, back, now=10.0)
    used(cache, new, now=11.0)
    assert order(cache, now=12.0) == ["new", "back"]


def test_cost_keeps_small_adapters_among_equals_and_large_ones_if_misses_cost_nothing_else() -> (
    None
):
    small, large = adapter("small", blocks=1), adapter("large", blocks=16)
    for miss_s, first in (("0.016", "large"), ("0", "small")):
        cache = cache_of("cost", miss_s=miss_s)
        cache.set_near(frozenset([small.digest, large.digest]))
        for one in (small, large):
            loaded(cache, one)
            used(cache, one, now=1.0)
        used(cache, large, now=2.0)  # a little more often used
        assert order(cache, now=3.0)[0] == first


def test_cost_keeps_what_would_have_to_be_downloaded() -> None:
    cache = cache_of("cost")
    near, far = adapter("near"), adapter("far")
    cache.set_near(frozenset([near.digest]))
    for one in (far, near):
        loaded(cache, one)
        used(cache, one, now=1.0)
    assert order(cache, now=2.0) == ["near", "far"]
    cache.set_near(frozenset([near.digest, far.digest]))
    assert order(cache, now=2.0) == ["far", "near"]


def test_lfu_counts_uses_since_the_load() -> None:
    cache = cache_of("lfu")
    twice, once, idle = adapter("twice"), adapter("once"), adapter("idle")
    for one in (twice, once, idle):
        loaded(cache, one)
    used(cache, twice, now=1.0)
    used(cache, twice, now=2.0)
    used(cache, once, now=3.0)
    assert order(cache, now=4.0) == ["idle", "once", "twice"]


def test_gdsf_lets_old_favourites_go_in_the_end() -> None:
    cache = cache_of("gdsf")
    old = adapter("old", blocks=1)
    loaded(cache, old)
    for _ in range(3):
        used(cache, old, now=0.0)
    survived = 0
    for turn in range(10):
        fresh = adapter(f"fresh{turn}", blocks=1)
        loaded(cache, fresh, now=turn + 1.0)
        used(cache, fresh, now=turn + 1.0)
        victim = next(cache.victims(lambda _: None, spare=(-2, 0), now=turn + 2.0))
        cache.remove(victim)
        if victim == old.digest:
            break
        survived += 1
    assert 2 <= survived < 9


def test_fairshare_weighs_all_three_terms_alike() -> None:
    recent, frequent = adapter("recent", blocks=2), adapter("frequent", blocks=2)
    orders = {}
    for name in ("chameleon", "fairshare"):
        cache = cache_of(name, recency_by="linear")
        for one in (recent, frequent):
            loaded(cache, one)
        for now in (1.0, 2.0):
            used(cache, frequent, now=now)
        used(cache, recent, now=200.0)
        orders[name] = order(cache, now=201.0)
    assert orders == {"chameleon": ["recent", "frequent"], "fairshare": ["frequent", "recent"]}


def test_chameleon_measures_size_by_rank_if_told_so() -> None:
    many_blocks = Adapter(AdapterDigest("many-blocks"), 8, 9000)
    high_rank = Adapter(AdapterDigest("high-rank"), 64, 3000)
    for size_by, first in (("blocks", "high-rank"), ("rank", "many-blocks")):
        cache = cache_of("chameleon", size_by=size_by)
        for one in (many_blocks, high_rank):
            loaded(cache, one)
        assert order(cache, now=1.0)[0] == first


@pytest.mark.parametrize(("tie", "first"), [("digest", "a"), ("oldest", "b"), ("smallest", "c")])
def test_ties_are_broken_as_told(tie: str, first: str) -> None:
    cache = cache_of("chameleon", frequency="0", recency="0", size="0", tie=tie)
    for name, blocks, now in (("a", 3, 3.0), ("b", 2, 1.0), ("c", 1, 2.0)):
        loaded(cache, adapter(name, blocks=blocks))
        used(cache, adapter(name, blocks=blocks), now=now)
    assert order(cache, now=4.0)[0] == first


def test_wanted_adapters_go_by_score_if_told_so() -> None:
    wanted = {adapter("low").digest: (0, 1), adapter("high", blocks=9).digest: (0, 2)}
    orders = []
    for wanted_order in ("urgency", "score"):
        cache = cache_of("chameleon", wanted_order=wanted_order)
        loaded(cache, adapter("low"))
        loaded(cache, adapter("high", blocks=9))
        orders.append(list(cache.victims(wanted.get, spare=(-2, 0), now=1.0)))
    assert orders == [["high", "low"], ["low", "high"]]


@pytest.mark.parametrize("name", EVICTION_NAMES)
def test_every_policy_ranks_each_idle_adapter_once(name: str) -> None:
    cache = AdapterCache(build_eviction(name))
    adapters = [adapter(f"a{index:03}", blocks=1 + index % 7) for index in range(200)]
    for index, one in enumerate(adapters):
        loaded(cache, one, now=index / 10)
        if index % 3:
            used(cache, one, now=index / 10)
    cache.use(adapters[5].digest, now=30.0)
    ranked = order(cache, now=31.0)
    assert len(ranked) == len(set(ranked)) == 199
    assert adapters[5].digest not in ranked
    assert ranked == order(cache, now=31.0)


@pytest.mark.parametrize("name", EVICTION_NAMES)
def test_thousands_of_idle_adapters_among_100000_do_not_slow_a_use_down(name: str) -> None:
    rng = random.Random(1)
    adapters = [adapter(f"a{index}", blocks=1) for index in range(100_000)]
    weights = list(itertools.accumulate(1 / (place + 1) for place in range(len(adapters))))
    chosen = rng.choices(adapters, cum_weights=weights, k=12_000)
    cache, held = AdapterCache(build_eviction(name)), 0
    began_s = time.process_time()
    for index, one in enumerate(chosen):
        now = index / 100
        if one.digest not in cache:
            if held == 2000:
                cache.remove(next(cache.victims(lambda _: None, spare=(-2, 0), now=now)))
                held -= 1
            loaded(cache, one, now=now)
            held += 1
        used(cache, one, now=now)
    spent_s = time.process_time() - began_s
    assert held == 2000
    assert len(chosen) / spent_s > 3000, "20,000 a second on an idle core"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mru", {}, "unknown eviction policy 'mru', have lru, lfu, gdsf, chameleon"),
        ("lru", {"window_s": "3"}, "'lru' has no options, got window_s"),
        ("cost", {"half_life": "3"}, "unknown eviction option 'half_life', have miss_s"),
        ("cost", {"miss_s": "-1"}, "miss_s must be a number of at least 0, not '-1'"),
        ("cost", {"miss_s": "nan"}, "miss_s must be a number of at least 0, not 'nan'"),
        ("chameleon", {"window_s": "0"}, "window_s must be a number above 0, not '0'"),
        ("chameleon", {"size_by": "bytes"}, "size_by must be blocks or rank, not 'bytes'"),
    ],
)
def test_what_is_no_policy_or_option_is_refused(
    name: str, options: dict[str, str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        build_eviction(name, options)
