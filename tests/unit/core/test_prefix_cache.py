"""What requests begin with alike is computed once."""

from dataclasses import replace

import pytest

from services.core.config import ReplicaConfig
from services.core.costs import StepCosts
from services.core.decisions import EvictAdapter, PreemptRequest, StartRequest
from services.core.events import AdapterDropped
from services.core.systems import SYSTEMS
from services.core.types import Adapter, Capacity, Request, RequestId
from tests.unit.core.core_world import adapter, attempt, capacity, request
from tests.unit.core.replica_bench import Bench

X, Y = adapter("x"), adapter("y")
CHUNKED = ReplicaConfig(stepping="chunked", prefill_tokens_per_step=40)


def talk(name: str, text: str, *, using: Adapter | None = None, more: int = 5) -> Request:
    """A request of those blocks and some tokens more, which generates ten tokens."""
    return request(name, using=using, context=len(text) * 10 + more, text=text)


def hits(bench: Bench, name: str) -> int:
    """Tokens that were there when it started."""
    return bench.engine.hit_tokens[attempt(name)]


def serve(bench: Bench, *requests: Request) -> list[int]:
    """One after the other; how many tokens of each were there?"""
    for each in requests:
        bench.dispatch(each)
        bench.run(costs=StepCosts())
    return [hits(bench, each.attempt.request_id) for each in requests]


def test_what_one_request_has_computed_the_next_one_does_not() -> None:
    bench = Bench()
    assert serve(bench, talk("a", "sys"), talk("b", "sys"), talk("c", "syx")) == [0, 30, 20]


def test_at_least_one_token_is_computed() -> None:
    assert serve(Bench(), talk("a", "sys", more=0), talk("b", "sys", more=0)) == [0, 20]
    assert serve(Bench(), talk("a", "sys", more=0), talk("b", "sys", more=1)) == [0, 30]


def test_nothing_is_shared_between_adapters() -> None:
    found = serve(
        Bench(),
        talk("a", "sys", using=X),
        talk("b", "sys", using=Y),
        talk("c", "sys"),
        talk("d", "sys", using=X),
    )
    assert found == [0, 0, 0, 30]


def test_nothing_is_shared_between_tenants() -> None:
    others = [request(name, context=35, text="sys", tenant=name) for name in ("t", "u")]
    assert serve(Bench(), *others) == [0, 0]


def test_one_that_starts_while_the_first_still_runs_has_its_prompt() -> None:
    bench = Bench()
    bench.dispatch(talk("a", "sys"))
    bench.step()
    bench.dispatch(talk("b", "sys"))
    bench.step()
    assert hits(bench, "b") == 30
    assert bench.machine.snapshot().kv_blocks == 3 + 1 + 1
    bench.run()


def test_one_that_was_admitted_earlier_has_what_was_computed_meanwhile() -> None:
    bench = Bench(config=CHUNKED)
    bench.dispatch(talk("a", "sys"))
    bench.dispatch(talk("b", "sys"))
    bench.dispatch(talk("c", "sys"))
    bench.run()
    assert [hits(bench, name) for name in "abc"] == [0, 30, 30]


def test_the_next_turn_of_a_talk_has_the_answer_too() -> None:
    bench = Bench()
    bench.dispatch(request("a", context=35, output=20, text="sys"))
    bench.run()
    assert serve(bench, request("b", context=90, text="sysoo")) == [50]


def test_a_chunk_that_has_not_passed_all_layers_is_not_found() -> None:
    bench = Bench(limits=replace(capacity(100), num_layers=8))
    bench.dispatch(talk("a", "sys", using=X))
    bench.progress(X, 4)
    bench.dispatch(talk("b", "sys", using=X))
    bench.step()
    assert bench.machine.snapshot().prefix.queried_tokens == 70
    assert [hits(bench, "a"), hits(bench, "b")] == [0, 0]
    bench.run()
    assert serve(bench, talk("c", "sys", using=X)) == [30]


def test_requests_that_share_a_prompt_fit_where_they_would_not_alone() -> None:
    limits = Capacity(12, 1000, 10, 16, 1000)
    for text, running in (("sysprompt", 2), ("", 1)):
        bench = Bench(limits=limits)
        bench.dispatch(request("a", context=95, output=5, text=text))
        bench.step()
        bench.dispatch(request("b", context=95, output=5, text=text))
        assert bench.machine.snapshot().running + len(bench.engine.open) >= running
        bench.step()
        assert bench.machine.snapshot().running == running
        bench.run()


def test_the_end_of_a_prompt_goes_before_its_beginning() -> None:
    bench = Bench(blocks=13)
    serve(bench, talk("a", "abcdefgh"))
    serve(bench, request("large", context=50, output=10))
    assert bench.machine.snapshot().prefix.evicted_blocks == 2
    assert serve(bench, talk("b", "abcdefgh")) == [70]


def test_what_is_used_again_stays_and_what_came_once_goes() -> None:
    bench = Bench(blocks=20)
    for index in range(10):
        text = f"sys{index}uvwxyz"
        serve(bench, talk(f"r{index}", text))
    assert serve(bench, talk("last", "sys!")) == [30]


def test_a_preempted_request_finds_its_prompt_again() -> None:
    bench = Bench(blocks=12)
    for name in "ab":
        new = request(name, context=35, output=1, output_max=60, text=name * 3)
        bench.dispatch(new, output=40)
    bench.run()
    assert bench.of(PreemptRequest)
    assert len(bench.of(StartRequest)) > 2
    assert hits(bench, "b") == 30


def test_a_request_that_fails_leaves_nothing_to_be_found() -> None:
    bench = Bench()
    bench.dispatch(talk("a", "sys"))
    bench.handle(bench.engine.finish_step(bench.outputs, failing={RequestId("a")}))
    assert bench.machine.snapshot().prefix_blocks == 0
    assert serve(bench, talk("b", "sys"), talk("c", "sys")) == [0, 30]


def test_a_failure_spoils_what_the_request_began_with() -> None:
    bench = Bench()
    serve(bench, talk("a", "sys"), talk("x", "sys", using=X))
    bench.dispatch(talk("b", "sys"))
    bench.handle(bench.engine.finish_step(bench.outputs, failing={RequestId("b")}))
    assert serve(bench, talk("c", "sys"), talk("y", "sys", using=X)) == [0, 30]


def test_a_dropped_adapter_takes_what_was_computed_with_it_along() -> None:
    bench = Bench()
    serve(bench, talk("a", "sys", using=X), talk("b", "sys", using=Y))
    bench.handle(AdapterDropped(X.digest))
    assert bench.machine.snapshot().prefix_blocks == 4
    assert serve(bench, talk("c", "sys", using=X), talk("d", "sys", using=Y)) == [0, 30]


def test_an_adapter_that_is_used_a_lot_is_not_pushed_out_by_prompts() -> None:
    bench = Bench(blocks=30)
    bench.bring_near(X)
    for index in range(40):
        serve(bench, request(f"x{index}", using=X, context=5))
        serve(bench, talk(f"p{index}", chr(ord("A") + index) * 8))
    assert X.digest in bench.resident()
    assert bench.machine.snapshot().prefix.evicted_blocks > 100


def test_a_prompt_that_is_used_a_lot_is_not_pushed_out_by_adapters() -> None:
    bench = Bench(blocks=30)
    rare = [adapter(f"rare{index}", blocks=8) for index in range(40)]
    bench.bring_near(*rare)
    found = []
    for index, one in enumerate(rare):
        found += serve(bench, talk(f"p{index}", "system"))
        serve(bench, request(f"x{index}", using=one, context=5))
    assert found == [0] + [60] * 39


@pytest.mark.parametrize(("first", "second"), [("prompt", "adapter"), ("adapter", "prompt")])
def test_under_lru_what_was_unused_for_longest_goes(first: str, second: str) -> None:
    bench = Bench(blocks=10, config=ReplicaConfig(eviction="lru"))
    new = {
        "prompt": talk("p", "abcd", more=1),
        "adapter": request("x", using=adapter("x", blocks=4), context=5, output=5),
    }
    serve(bench, new[first], new[second])
    serve(bench, request("short", context=25, output=5))
    is_here = "x" in bench.resident()
    assert (is_here, bench.machine.snapshot().prefix_blocks) == (
        (True, 3) if first == "prompt" else (False, 5)
    )


def test_what_somebody_waits_for_stays_before_any_prompt() -> None:
    bench = Bench(blocks=20)
    serve(bench, request("x", using=X, context=5), talk("p", "abcdefgh"), talk("q", "abcdefgh"))
    bench.dispatch(request("first", context=80, output=80))
    bench.dispatch(request("waits", using=X, context=80, output=20))
    bench.run()
    assert not [one for one in bench.of(EvictAdapter) if one.digest == X.digest]


def test_without_the_cache_nothing_is_kept() -> None:
    bench = Bench(config=ReplicaConfig(prefix_cache=False))
    assert serve(bench, talk("a", "sys"), talk("b", "sys")) == [0, 0]
    assert bench.machine.snapshot().prefix_blocks == 0


def test_systems_of_papers_have_no_prefix_cache_and_ours_has() -> None:
    having = {name for name, system in SYSTEMS.items() if system.replica.prefix_cache}
    assert "adaptive" in having
    assert having.isdisjoint({"slora", "slora-strong", "slora-every-step", "slo_odbs", "odbs"})
    assert not any(name.startswith("chameleon-") for name in having)


def test_counts_tell_what_was_found() -> None:
    bench = Bench()
    serve(bench, talk("a", "sys"), talk("b", "sys"))
    snapshot = bench.machine.snapshot()
    assert (snapshot.prefix.queried_tokens, snapshot.prefix.hit_tokens) == (70, 30)
    assert snapshot.prefix_blocks == 4
    assert bench.machine.leaked_blocks == 0
