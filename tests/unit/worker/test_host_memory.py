"""Host memory of adapters: the arena's ranges, and what the host cache keeps in it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.types import Adapter, AdapterDigest
from services.worker.arena import ALIGNMENT, HostArena, Slab
from services.worker.host_cache import HostCache

UNIT = ALIGNMENT


def _adapter(number: int, units: int = 1) -> Adapter:
    return Adapter(AdapterDigest(f"sha256:{number:064x}"), 8, units * UNIT)


def _put(cache: HostCache, adapter: Adapter) -> Slab:
    """As a load does that has ended, with nobody using the blob any more."""
    slab = cache.allocate(adapter.size_bytes)
    cache.put(adapter, slab)
    slab.release()
    return slab


def _digests(cache: HostCache) -> list[AdapterDigest]:
    return [adapter.digest for adapter in cache]


# --- the arena --------------------------------------------------------------------------------


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.integers(1, 5 * UNIT)),
            st.tuples(st.just("release"), st.integers(0, 30)),
        ),
        max_size=60,
    )
)
def test_slabs_never_overlap_and_given_back_ranges_join(actions: list[tuple[str, int]]) -> None:
    arena = HostArena(16 * UNIT)
    held: list[tuple[Slab, int]] = []
    for number, (action, value) in enumerate(actions):
        if action == "take":
            could = arena.could_take(value, without=())
            slab = arena.take(value)
            assert (slab is not None) == could
            if slab is not None:
                slab.view[:] = bytes([number % 251]) * value
                held.append((slab, number))
        elif held:
            held.pop(value % len(held))[0].release()
        arena.check_integrity()
        for slab, writer in held:
            assert set(bytes(slab.view)) == {writer % 251}
    for slab, _ in held:
        slab.release()
    arena.check_integrity()
    assert arena.used_bytes == 0
    whole = arena.take(16 * UNIT)
    assert whole is not None


def test_a_slab_begins_at_a_multiple_of_the_alignment() -> None:
    arena = HostArena(8 * UNIT)
    first, second = arena.take(1), arena.take(UNIT + 1)
    assert first is not None
    assert second is not None
    assert arena.used_bytes == 3 * UNIT


def test_memory_goes_back_with_its_last_user() -> None:
    arena = HostArena(UNIT)
    slab = arena.take(UNIT)
    assert slab is not None
    slab.hold()
    slab.release()
    assert arena.take(UNIT) is None
    slab.release()
    assert arena.take(UNIT) is not None


def test_memory_outside_is_counted_for_as_long_as_it_is_held() -> None:
    arena = HostArena(0)
    slab = arena.take_outside(1000)
    assert (len(slab.view), slab.view.readonly, arena.outside_bytes) == (1000, False, 1000)
    slab.release()
    assert arena.outside_bytes == 0


def test_an_arena_larger_than_any_address_space_is_refused() -> None:
    with pytest.raises(ValueError, match="no mapping of"):
        HostArena(2**62)


# --- the host cache ---------------------------------------------------------------------------


def test_the_least_recently_used_blob_makes_room() -> None:
    cache = HostCache(HostArena(3 * UNIT))
    one, two, three, four = (_adapter(number) for number in range(1, 5))
    for adapter in (one, two, three):
        _put(cache, adapter)
    used = cache.get(one.digest)
    assert used is not None
    used.release()
    _put(cache, four)
    assert _digests(cache) == [three.digest, one.digest, four.digest]
    assert cache.get(two.digest) is None
    cache.check_integrity()


def test_a_blob_in_use_stays_and_an_older_idle_one_goes() -> None:
    cache = HostCache(HostArena(2 * UNIT))
    one, two = _adapter(1), _adapter(2)
    _put(cache, one)
    _put(cache, two)
    assert cache.get(one.digest) is not None
    assert cache.get(two.digest) is not None
    cache.drop(two.digest)  # its user goes on with it
    assert not cache.allocate(UNIT).is_inside
    assert _digests(cache) == [one.digest]


def test_a_blob_larger_than_the_arena_drives_nothing_out() -> None:
    cache = HostCache(HostArena(3 * UNIT))
    _put(cache, _adapter(1))
    slab = _put(cache, _adapter(2, units=4))
    assert not slab.is_inside
    assert _digests(cache) == [_adapter(1).digest]
    assert cache.arena.outside_bytes == 0


def test_nothing_is_given_up_when_no_range_can_be_had() -> None:
    cache = HostCache(HostArena(3 * UNIT))
    for number in range(3):
        _put(cache, _adapter(number))
    middle = cache.get(_adapter(1).digest)  # what is free beside it is too short for two
    assert middle is not None
    assert not cache.allocate(2 * UNIT).is_inside
    assert len(cache) == 3


def test_what_is_near_is_the_same_object_until_it_changes() -> None:
    cache = HostCache(HostArena(2 * UNIT))
    _put(cache, _adapter(1))
    before = cache.digests
    used = cache.get(_adapter(1).digest)
    assert used is not None
    used.release()
    assert cache.digests is before
    _put(cache, _adapter(2))
    assert cache.digests == {_adapter(1).digest, _adapter(2).digest}
    cache.drop(_adapter(1).digest)
    assert cache.digests == {_adapter(2).digest}
    assert before == {_adapter(1).digest}
