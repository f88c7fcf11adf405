"""Timers, the ledger, the pool and the adapter cache: the books that the machines keep."""

import pytest

from services.core.cache import AdapterCache, CachedAdapter, Urgency
from services.core.eviction import (
    Chameleon,
    ChameleonWeights,
    EvictionPolicy,
    Lru,
    build_eviction,
)
from services.core.ledger import Fit, Ledger, can_ever_fit, need_of
from services.core.pool import BlockPool
from services.core.timers import Timers, earliest
from services.core.types import AdapterDigest, Reserve
from tests.unit.core.core_world import adapter, attempt, capacity, request

PREDICTED = Reserve.PREDICTED


def test_timers_fire_in_order_of_time_then_of_setting() -> None:
    timers: Timers[str] = Timers()
    timers.set("late", at_s=2.0)
    timers.set("b", at_s=1.0)
    timers.set("a", at_s=1.0)
    assert timers.next_s() == 1.0
    assert timers.pop_due(1.5) == ["b", "a"]
    assert timers.pop_due(1.5) == []
    assert timers.next_s() == 2.0


def test_a_moved_timer_fires_once_at_its_new_time() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", at_s=1.0)
    timers.set("a", at_s=3.0)
    assert timers.pop_due(2.0) == []
    assert timers.pop_due(3.0) == ["a"]


def test_timers_that_are_due_can_be_taken_one_by_one() -> None:
    timers: Timers[str] = Timers()
    for name, at_s in (("b", 2.0), ("a", 1.0), ("gone", 1.5), ("late", 3.0)):
        timers.set(name, at_s=at_s)
    timers.cancel("gone")
    assert [timers.pop_first_due(2.0) for _ in range(3)] == ["a", "b", None]
    timers.check_integrity()
    assert timers.next_s() == 3.0


def test_cancelled_timers_do_not_pile_up() -> None:
    timers: Timers[int] = Timers()
    for index in range(10_000):
        timers.set(index, at_s=1e9)
        timers.cancel(index)
    timers.check_integrity()
    assert timers.next_s() is None
    assert earliest(timers.next_s(), 4.0, 3.0) == 3.0


def test_a_shared_adapter_is_charged_once_and_given_back_with_its_last_user() -> None:
    ledger, limits = Ledger(capacity(20)), capacity(20)
    big = adapter(blocks=10)
    for name in ("a", "b", "c"):
        need = need_of(request(name, using=big, context=10, output=10), limits, PREDICTED)
        assert ledger.fit(need) is Fit.FITS
        ledger.reserve(attempt(name), need)
    assert ledger.reserved_blocks == 10 + 3 * 2
    ledger.release(attempt("a"))
    ledger.release(attempt("b"))
    assert ledger.reserved_blocks == 10 + 2
    ledger.release(attempt("c"))
    assert ledger.reserved_blocks == 0
    assert not ledger.uses(big.digest)
    ledger.check_integrity()


def test_the_ledger_says_what_is_missing() -> None:
    limits = capacity(10, requests=2)
    ledger = Ledger(limits)
    ledger.reserve(attempt("a"), need_of(request("a", context=50, output=10), limits, PREDICTED))
    assert ledger.fit(need_of(request("b", context=50, output=10), limits, PREDICTED)) is Fit.MEMORY
    ledger.reserve(attempt("b"), need_of(request("b"), limits, PREDICTED))
    assert ledger.fit(need_of(request("c"), limits, PREDICTED)) is Fit.BATCH_SLOTS


@pytest.mark.parametrize(
    ("context", "output_max", "blocks", "fits"),
    [
        (100, 100, 20, True),
        (101, 100, 20, False),  # one token more than the pool
        (100, 10_000, 30, True),  # the engine ends it at 300 tokens
        (301, 1, 50, False),  # longer than the context limit
        (300, 1, 30, True),
    ],
)
def test_only_what_fits_alone_in_the_worst_case_can_ever_fit(
    *, context: int, output_max: int, blocks: int, fits: bool
) -> None:
    new = request("a", context=context, output=1, output_max=output_max)
    assert can_ever_fit(new, capacity(blocks, context=300)) is fits


def test_an_adapter_counts_against_what_can_ever_fit() -> None:
    assert can_ever_fit(request("a", using=adapter(blocks=18)), capacity(20))
    assert not can_ever_fit(request("a", using=adapter(blocks=19)), capacity(20))


def test_the_pool_gives_out_every_block_once() -> None:
    pool = BlockPool(10)
    of_kv = pool.take_kv(3)
    of_adapter = pool.hold_adapter(adapter().digest, 7)
    assert {*of_kv, *of_adapter} == set(range(10))
    assert pool.free_blocks == 0
    with pytest.raises(AssertionError):
        pool.take_kv(1)
    pool.return_kv(of_kv)
    pool.release_adapter(adapter().digest)
    pool.check_integrity(())
    assert pool.free_blocks == 10


def test_the_pool_gives_out_what_was_freed_last() -> None:
    pool = BlockPool(100)
    pool.take_kv(5)
    of_kv = pool.take_kv(4)
    pool.return_kv(of_kv)
    assert pool.take_kv(4) == of_kv
    assert pool.take_kv(1) == [9]


def victims(
    cache: AdapterCache,
    wanted: dict[AdapterDigest, Urgency] | None = None,
    *,
    spare: Urgency = (-1, 0),
    now: float,
) -> list[AdapterDigest]:
    cache.check_integrity()
    return list(cache.victims((wanted or {}).get, spare=spare, now=now))


def loaded_cache(policy: EvictionPolicy, *names_and_blocks: tuple[str, int]) -> AdapterCache:
    cache = AdapterCache(policy)
    for name, blocks in names_and_blocks:
        one = adapter(name, blocks=blocks)
        cache.begin_load(CachedAdapter(one, blocks, last_used_s=0.0))
        cache.end_load(one.digest)
    return cache


def test_adapters_in_use_or_loading_are_never_victims() -> None:
    cache = loaded_cache(Lru(), ("a", 1), ("b", 1))
    cache.use(adapter("a").digest, now=1.0)
    cache.begin_load(CachedAdapter(adapter("c"), 1, last_used_s=1.0))
    assert victims(cache, now=2.0) == [adapter("b").digest]


def test_wanted_adapters_go_last_and_the_least_urgent_first() -> None:
    cache = loaded_cache(Lru(), ("a", 1), ("b", 1), ("c", 1), ("d", 1))
    wanted = {adapter("a").digest: (0, 5), adapter("b").digest: (0, 2), adapter("c").digest: (1, 0)}
    assert victims(cache, wanted, now=1.0) == ["d", "c", "a", "b"]
    assert victims(cache, wanted, spare=(0, 4), now=1.0) == ["d", "c", "a"]
    assert victims(cache, wanted, spare=(2, 0), now=1.0) == ["d"]


def test_lru_evicts_the_one_unused_for_longest() -> None:
    cache = loaded_cache(Lru(), ("a", 1), ("b", 1), ("c", 1))
    for name, now in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        cache.use(adapter(name).digest, now=now)
        cache.unuse(adapter(name).digest, now=now)
    assert victims(cache, now=4.0) == ["b", "c", "a"]


def test_chameleon_keeps_large_frequent_and_recent_adapters() -> None:
    cache = loaded_cache(Chameleon(), ("small", 1), ("large", 16), ("hot", 1))
    for name, times in (("small", 1), ("large", 1), ("hot", 10)):
        for _ in range(times):
            cache.use(adapter(name).digest, now=1.0)
            cache.unuse(adapter(name).digest, now=1.0)
    # Recency is equal; 0.45·1/10 + 0.45·1/16, then 0.45 + 0.45·1/16, then 0.45·1/10 + 0.45.
    assert victims(cache, now=2.0) == ["small", "hot", "large"]


def test_chameleon_forgets_uses_of_windows_long_past() -> None:
    cache = loaded_cache(Chameleon(ChameleonWeights(window_s=10.0)), ("old", 2), ("new", 2))
    for _ in range(50):
        cache.use(adapter("old").digest, now=1.0)
        cache.unuse(adapter("old").digest, now=1.0)
    cache.use(adapter("new").digest, now=41.0)
    cache.unuse(adapter("new").digest, now=41.0)
    assert victims(cache, now=42.0) == ["old", "new"]


def test_an_unknown_eviction_policy_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown eviction policy 'mru', have lru, lfu,"):
        build_eviction("mru")
