"""Who holds memory at a worker, and who gives way."""

from services.core.config import ReplicaConfig
from services.core.decisions import (
    EvictAdapter,
    EvictionReason,
    LoadAdapter,
    PreemptRequest,
    StartRequest,
)
from services.core.events import AdaptersWanted, RequestAborted
from tests.unit.core.core_world import adapter, attempt, request
from tests.unit.core.replica_bench import Bench


def use_and_leave(bench: Bench, *names: str, blocks: int = 2) -> None:
    for name in names:
        bench.dispatch(request(name, using=adapter(name, blocks=blocks), output=1))
        bench.run()


def test_adapters_stay_when_their_requests_have_ended() -> None:
    bench = Bench(blocks=20)
    use_and_leave(bench, "a", "b")
    assert bench.resident() == ["a", "b"]
    decisions = bench.dispatch(request("again", using=adapter("a")))
    assert decisions[0] == StartRequest(attempt("again"))


def test_kv_cache_takes_the_memory_of_idle_adapters() -> None:
    bench = Bench(blocks=20, config=ReplicaConfig(eviction="lru"))
    use_and_leave(bench, "a", "b", "c")
    bench.dispatch(request("long", context=100, output=80))
    bench.run()
    assert bench.of(EvictAdapter) == [
        EvictAdapter(adapter("a").digest, EvictionReason.KV),
        EvictAdapter(adapter("b").digest, EvictionReason.KV),
    ]
    assert bench.resident() == ["c"]


def test_a_new_adapter_takes_the_memory_of_idle_ones() -> None:
    bench = Bench(blocks=10)
    use_and_leave(bench, "a", "b", blocks=4)
    decisions = bench.dispatch(request("r", using=adapter("c", blocks=4)))
    assert decisions == [EvictAdapter(adapter("a").digest), LoadAdapter(adapter("c", blocks=4))]


def test_admission_keeps_room_for_the_predicted_length() -> None:
    bench = Bench(blocks=10)
    bench.dispatch(request("a", context=10, output=60))
    assert bench.dispatch(request("b", context=10, output=30)) == []
    assert bench.machine.snapshot().loading == 1
    bench.run()
    assert bench.of(PreemptRequest) == []
    assert list(bench.engine.left) == [attempt("a"), attempt("b")]


def test_a_request_that_does_not_fit_holds_back_the_younger_ones() -> None:
    bench = Bench(blocks=10)
    bench.dispatch(request("a", context=10, output=60))
    bench.dispatch(request("large", context=50, output=10))
    bench.dispatch(request("small", context=5, output=5))
    assert bench.of(StartRequest) == [StartRequest(attempt("a"))]
    bench.run()
    assert [start.attempt.request_id for start in bench.of(StartRequest)] == ["a", "large", "small"]


def test_when_predictions_fail_the_youngest_gives_way_and_computes_its_tokens_again() -> None:
    bench = Bench(blocks=10)
    bench.dispatch(request("old", context=30, output=5, output_max=65), output=65)
    bench.dispatch(request("young", context=30, output=5, output_max=30), output=30)
    bench.run()
    assert bench.of(PreemptRequest) == [PreemptRequest(attempt("young"))]
    assert list(bench.engine.left) == [attempt("old"), attempt("young")]
    starts = [start.attempt.request_id for start in bench.of(StartRequest)]
    assert starts == ["old", "young", "young"]


def test_a_preempted_request_keeps_its_adapter_unless_memory_forces_it_out() -> None:
    bench = Bench(blocks=12)
    bench.dispatch(request("old", context=30, output=5, output_max=65), output=62)
    bench.dispatch(
        request("young", using=adapter("y"), context=30, output=5, output_max=30), output=30
    )
    bench.run(steps=40)
    assert bench.of(PreemptRequest) == [PreemptRequest(attempt("young"))]
    assert bench.resident() == ["y"]
    bench.run()
    assert bench.of(EvictAdapter) == []
    assert len(bench.engine.left) == 2


def test_the_adapter_of_a_preempted_request_goes_when_the_oldest_needs_its_memory() -> None:
    bench = Bench(blocks=10)
    bench.dispatch(request("old", context=30, output=5, output_max=70), output=70)
    bench.dispatch(
        request("young", using=adapter("y"), context=20, output=5, output_max=20), output=20
    )
    bench.run()
    assert bench.of(EvictAdapter) == [EvictAdapter(adapter("y").digest, EvictionReason.KV)]
    assert [load.adapter.digest for load in bench.of(LoadAdapter)] == ["y", "y"]
    assert list(bench.engine.left) == [attempt("old"), attempt("young")]


def test_a_lone_request_uses_the_whole_pool() -> None:
    bench = Bench(blocks=10)
    bench.dispatch(request("a", using=adapter("x", blocks=1), context=45, output=1, output_max=45))
    bench.run()
    assert list(bench.engine.left) == [attempt("a")]


def test_hints_load_into_memory_that_nobody_needs() -> None:
    bench = Bench(blocks=20)
    wanted = (adapter("a", blocks=6), adapter("b", blocks=6), adapter("c", blocks=12))
    assert bench.handle(AdaptersWanted(wanted)) == [LoadAdapter(wanted[0]), LoadAdapter(wanted[1])]
    bench.load_all()
    assert bench.resident() == ["a", "b"]


def test_hints_evict_neither_used_nor_wanted_adapters_but_idle_ones() -> None:
    bench = Bench(blocks=11)
    use_and_leave(bench, "idle", blocks=4)
    bench.dispatch(request("r", using=adapter("used", blocks=4), context=10, output=10))
    bench.load_all()
    hint = adapter("hint", blocks=4)
    assert bench.handle(AdaptersWanted((hint,))) == [
        EvictAdapter(adapter("idle").digest, EvictionReason.PREFETCH),
        LoadAdapter(hint),
    ]
    bench.load_all()
    assert bench.handle(AdaptersWanted((hint, adapter("second", blocks=4)))) == []
    assert bench.resident() == ["hint", "used"]


def test_hints_wait_while_a_request_waits_for_memory() -> None:
    bench = Bench(blocks=10)
    bench.dispatch(request("a", context=10, output=60))
    bench.dispatch(request("b", context=10, output=30))
    assert bench.handle(AdaptersWanted((adapter("x", blocks=1),))) == []
    bench.run()
    assert bench.resident() == ["x"]


def test_a_failed_hint_is_not_tried_again_until_it_is_hinted_again() -> None:
    bench = Bench(blocks=10)
    assert bench.handle(AdaptersWanted((adapter("x"),))) == [LoadAdapter(adapter("x"))]
    assert bench.handle(bench.engine.fail_load(adapter("x").digest)) == []
    assert bench.handle(AdaptersWanted((adapter("x"),))) == [LoadAdapter(adapter("x"))]


def test_a_hinted_adapter_outlives_idle_ones_when_memory_is_needed() -> None:
    bench = Bench(blocks=12)
    use_and_leave(bench, "idle")
    bench.handle(AdaptersWanted((adapter("hinted"),)))
    bench.load_all()
    bench.dispatch(request("long", context=60, output=40))
    bench.run()
    assert bench.of(EvictAdapter) == [EvictAdapter(adapter("idle").digest, EvictionReason.KV)]


def test_aborting_everything_leaves_an_empty_pool_but_for_adapters() -> None:
    bench = Bench(blocks=30)
    for index in range(6):
        bench.dispatch(request(f"r{index}", using=adapter(f"a{index}", blocks=3), context=20))
    for index in range(6):
        bench.handle(RequestAborted(attempt(f"r{index}")))
    bench.load_all()
    snapshot = bench.machine.snapshot()
    assert snapshot.kv_blocks == 0
    assert bench.machine.announcements() == ()
    assert snapshot.evictable_blocks == snapshot.adapter_blocks
