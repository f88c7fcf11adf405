"""Loads ahead of requests: pins, hints, watermarks, cool-downs, drops and forecasts."""

from services.core.config import ReplicaConfig
from services.core.decisions import EvictAdapter, EvictionReason, LoadAdapter
from services.core.events import AdapterDropped, AdaptersWanted, PinsChanged
from services.core.types import Adapter, Pin
from tests.unit.core.core_world import adapter, attempt, request, without_blocks
from tests.unit.core.replica_bench import Bench


def pin(bench: Bench, *adapters: Adapter) -> None:
    bench.handle(PinsChanged(tuple(Pin(one, "operator") for one in adapters)))
    bench.load_all()


def loads(bench: Bench) -> list[str]:
    return [load.adapter.digest for load in bench.of(LoadAdapter)]


def reasons(bench: Bench) -> list[tuple[str, str]]:
    return [(evicted.digest, evicted.reason.value) for evicted in bench.of(EvictAdapter)]


def use_and_leave(bench: Bench, *adapters: Adapter) -> None:
    for one in adapters:
        bench.dispatch(request(f"r{bench.now}", using=one, output=1))
        bench.run()


def pinned(bench: Bench) -> dict[str, str]:
    resident = bench.machine.snapshot().resident
    return {one.digest: one.pin_reason for one in resident if one.pin_reason}


def test_pinned_adapters_are_loaded_before_hinted_ones() -> None:
    bench = Bench(blocks=20, config=ReplicaConfig(max_hint_loads=1))
    bench.handle(AdaptersWanted((adapter("hint"),)))
    bench.load_all()
    bench.handle(AdaptersWanted((adapter("next"),)))
    pin(bench, adapter("pinned"))
    assert loads(bench) == ["hint", "next", "pinned"]
    assert pinned(bench) == {"pinned": "operator"}


def test_a_pinned_adapter_outlives_wanted_ones() -> None:
    bench = Bench(blocks=11)
    pin(bench, adapter("pinned", blocks=4))
    use_and_leave(bench, adapter("idle", blocks=4))
    bench.handle(AdaptersWanted((adapter("idle", blocks=4),)))
    bench.dispatch(request("r", using=adapter("other", blocks=4), output=1))
    bench.run()
    assert reasons(bench)[0] == ("idle", "adapter")
    assert "pinned" not in dict(reasons(bench))
    assert pinned(bench) == {"pinned": "operator"}


def test_pins_beyond_their_share_of_the_pool_are_not_honoured() -> None:
    bench = Bench(blocks=20)  # of which half may be pinned
    pin(bench, adapter("a", blocks=6), adapter("b", blocks=6), adapter("c", blocks=4))
    assert pinned(bench) == {"a": "operator", "c": "operator"}
    assert loads(bench) == ["a", "c"]


def test_a_pinned_adapter_goes_for_tokens_after_all_others_and_comes_back() -> None:
    bench = Bench(blocks=12, config=ReplicaConfig(cool_down_s=1.0))
    pin(bench, adapter("pinned", blocks=4))
    use_and_leave(bench, adapter("idle", blocks=2))
    bench.dispatch(request("long", context=60, output=55))
    bench.run()
    assert reasons(bench) == [("idle", "kv"), ("pinned", "kv")]
    assert bench.resident() == [], "it is too early to load it again"
    due_s = bench.machine.next_deadline()
    assert due_s is not None
    bench.now = due_s
    bench.engine.perform(bench.machine.tick(now=bench.now))
    bench.load_all()
    assert pinned(bench) == {"pinned": "operator"}


def test_pinned_adapters_go_for_a_request_that_is_alone() -> None:
    bench = Bench(blocks=10, config=ReplicaConfig(pin_share=1.0))
    pin(bench, adapter("a", blocks=4), adapter("b", blocks=5))
    bench.dispatch(request("r", using=adapter("large", blocks=8), context=5, output=2))
    bench.run()
    assert list(bench.engine.left) == [attempt("r")]
    assert {digest for digest, _ in reasons(bench)} >= {"a", "b"}


def test_a_pin_that_ends_makes_its_adapter_like_any_other() -> None:
    bench = Bench(blocks=20)
    pin(bench, adapter("a"))
    pin(bench)
    assert pinned(bench) == {}
    assert bench.resident() == ["a"]


def test_a_failed_pin_is_tried_again_after_a_while() -> None:
    bench = Bench(blocks=20)
    bench.handle(PinsChanged((Pin(adapter("a"), "operator"),)))
    bench.handle(bench.engine.fail_load(adapter("a").digest))
    assert loads(bench) == ["a"]
    due_s = bench.machine.next_deadline()
    assert due_s is not None
    assert due_s > 10.0
    decisions = bench.machine.tick(now=due_s)
    assert without_blocks(decisions) == [LoadAdapter(adapter("a"))]


def test_a_dropped_adapter_goes_at_once_if_nobody_uses_it() -> None:
    bench = Bench(blocks=20)
    use_and_leave(bench, adapter("a"))
    decisions = bench.handle(AdapterDropped(adapter("a").digest))
    assert decisions == [EvictAdapter(adapter("a").digest, EvictionReason.DROPPED)]


def test_a_dropped_adapter_goes_with_its_last_user() -> None:
    bench = Bench(blocks=20)
    bench.dispatch(request("r", using=adapter("a"), output=3))
    bench.load_all()
    assert bench.handle(AdapterDropped(adapter("a").digest)) == []
    bench.run()
    assert list(bench.engine.left) == [attempt("r")]
    assert reasons(bench) == [("a", "dropped")]


def test_a_dropped_adapter_is_neither_hinted_nor_pinned_any_more() -> None:
    bench = Bench(blocks=20)
    pin(bench, adapter("pinned"))
    bench.handle(AdaptersWanted((adapter("hinted"),)))
    bench.load_all()
    for name in ("pinned", "hinted"):
        bench.handle(AdapterDropped(adapter(name).digest))
    bench.now += 100.0
    bench.engine.perform(bench.machine.tick(now=bench.now))
    assert bench.resident() == []
    assert loads(bench) == ["pinned", "hinted"]


def test_an_adapter_dropped_while_it_is_loading_goes_when_it_has_come() -> None:
    bench = Bench(blocks=20)
    bench.handle(AdaptersWanted((adapter("a"),)))
    assert bench.handle(AdapterDropped(adapter("a").digest)) == []
    bench.load_all()
    assert reasons(bench) == [("a", "dropped")]


def test_loads_ahead_leave_the_low_watermark_and_go_on_above_the_high_one() -> None:
    config = ReplicaConfig(ahead_low_share=0.1, ahead_high_share=0.4, max_hint_loads=8)
    bench = Bench(blocks=20, config=config)
    bench.dispatch(request("short", context=10, output=20), output=20)  # 3 blocks
    hints = [adapter(f"h{index}", blocks=5) for index in range(4)]
    bench.handle(AdaptersWanted(tuple(hints)))
    assert loads(bench) == ["h0", "h1", "h2"], "a fourth would leave nothing"
    bench.load_all()
    bench.handle(AdaptersWanted((*hints[:3], adapter("small", blocks=1))))
    assert loads(bench)[3:] == [], "2 blocks are left, and it is below the high watermark"
    bench.handle(AdaptersWanted((hints[0], adapter("small", blocks=1))))
    assert loads(bench)[3:] == ["small"], "the others are not wanted any more: 12 are left"


def test_what_tokens_pushed_out_is_not_loaded_ahead_at_once() -> None:
    bench = Bench(blocks=12, config=ReplicaConfig(cool_down_s=5.0))
    bench.handle(AdaptersWanted((adapter("hinted", blocks=4),)))
    bench.load_all()
    bench.dispatch(request("long", context=60, output=45))
    bench.run()
    assert reasons(bench) == [("hinted", "kv")]
    assert loads(bench) == ["hinted"]
    bench.now += 6.0
    bench.handle(AdaptersWanted((adapter("hinted", blocks=4),)))
    assert loads(bench) == ["hinted", "hinted"]


def test_loads_ahead_are_counted_and_so_is_what_came_of_them() -> None:
    bench = Bench(blocks=20)
    bench.handle(AdaptersWanted((adapter("used"), adapter("wasted"))))
    bench.load_all()
    bench.dispatch(request("r", using=adapter("used"), output=1))
    bench.run()
    bench.handle(AdapterDropped(adapter("wasted").digest))
    use_and_leave(bench, adapter("missed"), adapter("missed"))
    counts = bench.machine.snapshot().cache
    assert (counts.prefetches, counts.prefetch_hits, counts.prefetch_wastes) == (2, 1, 1)
    assert (counts.hits, counts.misses, counts.evictions) == (2, 1, 1)


def periodic(forecast_s: float) -> Bench:
    """One adapter is used every 100 s, the other memory by ever new ones meanwhile."""
    bench = Bench(blocks=10, config=ReplicaConfig(forecast_s=forecast_s, eviction="lru"))
    for period in range(10):
        bench.now = 100.0 * period
        use_and_leave(bench, adapter("hourly", blocks=4))
        for index in range(4):
            bench.now = 100.0 * period + 10.0 * (index + 1)
            use_and_leave(bench, adapter(f"once{period}-{index}", blocks=4))
    return bench


def test_an_adapter_is_loaded_before_the_request_that_its_habit_foretells() -> None:
    bench = periodic(40.0)
    assert "hourly" not in bench.resident()
    for seconds in range(950, 1000, 5):
        bench.now = float(seconds)
        bench.engine.perform(bench.machine.tick(now=bench.now))
        bench.load_all()
    assert "hourly" in bench.resident()
    hits = bench.machine.snapshot().cache.prefetch_hits
    bench.now = 1000.0
    use_and_leave(bench, adapter("hourly", blocks=4))
    assert bench.machine.snapshot().cache.prefetch_hits == hits + 1


def test_nothing_is_foretold_unless_asked_for() -> None:
    bench = periodic(0.0)
    bench.engine.perform(bench.machine.tick(now=990.0))
    assert "hourly" not in bench.resident()
    assert bench.machine.snapshot().cache.prefetches == 0
    assert bench.machine.next_deadline() is None
