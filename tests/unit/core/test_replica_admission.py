"""Who may start: S-LoRA's peak, computed by hand, its pace, and what it loads ahead."""

from dataclasses import replace
from typing import Literal

import pytest

from services.core.admission import peak_tokens
from services.core.config import ReplicaConfig
from services.core.decisions import (
    EndRequest,
    EvictAdapter,
    EvictionReason,
    LoadAdapter,
    PreemptRequest,
    StartRequest,
)
from services.core.events import RequestAborted
from services.core.types import Reserve
from tests.unit.core.core_world import adapter, attempt, request
from tests.unit.core.replica_bench import Bench, token_capacity

SLORA = ReplicaConfig(
    stepping="whole",
    admission="slora",
    reserve=Reserve.MAX,
    prefill_tokens_per_step=100,
    keeps_idle_adapters=False,
)
PACED = replace(SLORA, admission_every_steps=10)


def slora(tokens: int, config: ReplicaConfig = SLORA, *, requests: int = 16) -> Bench:
    return Bench(limits=token_capacity(tokens, requests=requests), config=config)


def started(bench: Bench) -> list[str]:
    return [start.attempt.request_id for start in bench.of(StartRequest)]


def count_steps_until_started(bench: Bench, name: str) -> int:
    for steps in range(100):
        if name in started(bench):
            return steps
        bench.step()
    raise AssertionError(f"{name} did not start")


@pytest.mark.parametrize(
    ("growths", "peak"),
    [
        ([], 0),
        ([(18, 11)], 29),
        ([(100, 10), (5, 90)], 110),  # max(100·1 + 10, 5·2 + 100)
        ([(9, 11), (4, 21), (1, 31)], 66),  # max(20, 8 + 32, 3 + 63)
        ([(50, 10), (40, 10), (1, 5)], 100),  # max(60, 80 + 20, 3 + 25)
    ],
)
def test_the_peak_is_the_most_that_all_hold_together(
    growths: list[tuple[int, int]], peak: int
) -> None:
    assert peak_tokens(growths) == peak


@pytest.mark.parametrize(("tokens", "fits"), [(51, False), (52, True)])
def test_a_request_starts_if_the_peak_with_it_is_below_the_pool(tokens: int, *, fits: bool) -> None:
    """When b is looked at, a has 2 of its 20 tokens: it holds 10 + 2 and adds 20 - 2 - 1.

    b would hold 20 + 1 and add 10 - 1: max(17 + 12, 9·2 + 12 + 21) = 51. By promises it would
    need 30 + 30.
    """
    bench = slora(tokens)
    bench.dispatch(request("a", context=10, output=20))
    bench.dispatch(request("b", context=20, output=10))
    bench.step()
    bench.step()
    assert started(bench) == (["a", "b"] if fits else ["a"])


@pytest.mark.parametrize(("tokens", "fits"), [(58, False), (59, True)])
def test_distinct_adapters_of_the_batch_leave_less_room(tokens: int, *, fits: bool) -> None:
    x, y = adapter("x", blocks=4), adapter("y", blocks=3)
    bench = slora(tokens)
    bench.bring_near(x, y)
    bench.dispatch(request("a", using=x, context=10, output=20))
    bench.load_all()
    bench.dispatch(request("b", using=y, context=20, output=10))
    bench.step()
    bench.step()
    assert (LoadAdapter(y) in bench.log) == fits


def test_a_shared_adapter_is_counted_once() -> None:
    x = adapter("x", blocks=4)
    bench = slora(56)
    bench.bring_near(x)
    bench.dispatch(request("a", using=x, context=10, output=20))
    bench.load_all()
    bench.dispatch(request("b", using=x, context=20, output=10))
    bench.step()
    bench.step()
    assert started(bench) == ["a", "b"]


def test_predicted_lengths_let_more_start_than_the_maximum() -> None:
    for reserve, names in ((Reserve.MAX, ["a"]), (Reserve.PREDICTED, ["a", "b"])):
        bench = slora(100, replace(SLORA, reserve=reserve))
        bench.dispatch(request("a", context=10, output=10, output_max=60), output=20)
        bench.dispatch(request("b", context=10, output=10, output_max=60), output=20)
        bench.step()
        bench.step()
        assert started(bench) == names


def test_prompts_of_a_new_batch_stay_within_a_limit() -> None:
    bench = slora(1000)
    bench.dispatch(request("a", context=10, output=50))
    for name in ("b", "c", "d"):
        bench.dispatch(request(name, context=45, output=50))
    bench.step()
    bench.step()
    assert started(bench) == ["a", "b", "c"]
    assert bench.steps()[-1] == "b:45 c:45"


def test_a_prompt_beyond_the_limit_is_a_batch_of_its_own() -> None:
    bench = slora(1000)
    bench.dispatch(request("a", context=400, output=5))
    bench.run()
    assert bench.steps() == ["a:400", *["a:1"] * 4]


def test_no_more_requests_run_than_there_are_slots() -> None:
    bench = slora(1000, requests=2)
    for name in ("a", "b", "c"):
        bench.dispatch(request(name, context=5, output=30))
    bench.step()
    bench.step()
    assert started(bench) == ["a", "b"]


def test_the_first_that_does_not_fit_holds_back_the_rest() -> None:
    bench = slora(100)
    bench.dispatch(request("a", context=10, output=30))
    bench.dispatch(request("large", context=60, output=20))
    bench.dispatch(request("small", context=2, output=2))
    for _ in range(5):
        bench.step()
    assert started(bench) == ["a"]
    bench.run()
    assert started(bench)[:2] == ["a", "large"]


def test_while_something_runs_admission_is_tried_after_ten_decode_steps() -> None:
    bench = slora(1000, PACED)
    bench.dispatch(request("a", context=10, output=100))
    bench.dispatch(request("b", context=10, output=100))
    assert count_steps_until_started(bench, "b") == 1 + 10
    bench.dispatch(request("c", context=10, output=100))
    assert count_steps_until_started(bench, "c") == 1 + 10


def test_when_nothing_runs_admission_is_tried_at_once() -> None:
    bench = slora(1000, PACED)
    bench.dispatch(request("a", context=10, output=3))
    bench.dispatch(request("b", context=10, output=3))
    assert count_steps_until_started(bench, "b") == 3


def test_once_the_ten_steps_are_over_admission_is_tried_at_every_step() -> None:
    """a and b hold all the memory for 15 tokens; the step after b has ended takes c."""
    bench = slora(100, PACED)
    bench.dispatch(request("a", context=20, output=60), output=15)
    bench.dispatch(request("c", context=30, output=60))
    assert count_steps_until_started(bench, "c") == 15


def test_prompts_are_computed_while_decodes_wait() -> None:
    bench = slora(1000)
    bench.dispatch(request("a", context=7, output=20))
    bench.dispatch(request("b", context=8, output=20))
    bench.dispatch(request("c", context=9, output=20))
    for _ in range(3):
        bench.step()
    assert bench.steps() == ["a:7", "a:1", "b:8 c:9", "a:1 b:1 c:1"]


def test_decodes_wait_while_the_adapters_of_a_new_batch_are_loaded() -> None:
    x = adapter("x")
    bench = slora(1000)
    bench.bring_near(x)
    bench.dispatch(request("a", context=7, output=20))
    bench.dispatch(request("b", using=x, context=8, output=20))
    bench.step()
    assert bench.step() == [LoadAdapter(x)]
    bench.load_all()
    assert bench.steps()[-1] == "b:8"


def test_a_download_delays_only_who_wants_it() -> None:
    far = adapter("far")
    bench = slora(1000)
    bench.dispatch(request("a", context=7, output=20))
    bench.dispatch(request("b", using=far, context=8, output=20))
    bench.dispatch(request("c", context=9, output=20))
    for _ in range(3):
        bench.step()
    assert bench.of(LoadAdapter) == [LoadAdapter(far)]
    assert bench.steps() == ["a:7", "a:1", "c:9", "a:1 c:1"]
    bench.load_all()
    bench.step()
    assert bench.steps()[-1] == "b:8"


def test_the_next_batch_is_loaded_ahead_at_the_fifth_and_the_seventh_decode_step() -> None:
    x, y = adapter("x"), adapter("y")
    bench = slora(1000, PACED)
    bench.bring_near(x, y)
    bench.dispatch(request("a", context=7, output=50))
    bench.dispatch(request("b", using=x, context=8, output=20))
    loads = []
    for step in range(11):
        if step == 6:
            bench.dispatch(request("c", using=y, context=8, output=20))
        loads += [(step, one.adapter) for one in bench.step() if isinstance(one, LoadAdapter)]
        bench.load_all()
    assert loads == [(5, x), (7, y)]
    assert bench.steps()[-1] == "b:8 c:8"


def test_nothing_is_loaded_ahead_into_memory_that_is_not_free() -> None:
    x = adapter("x", blocks=40)
    bench = slora(60, PACED)
    bench.bring_near(x)
    bench.dispatch(request("a", context=20, output=30))
    bench.dispatch(request("b", using=x, context=5, output=5))
    for _ in range(12):
        bench.step()
    assert bench.of(LoadAdapter) == []


def test_decodes_wait_for_a_load_ahead_that_holds_their_memory_and_nobody_gives_way() -> None:
    x = adapter("x", blocks=36)
    bench = slora(60, PACED)
    bench.bring_near(x)
    bench.dispatch(request("a", context=16, output=40))
    bench.dispatch(request("b", using=x, context=5, output=5))
    while bench.engine.step is not None:
        bench.step()
    assert list(bench.engine.loading) == ["x"]
    bench.load_all()
    assert bench.of(EvictAdapter) == [EvictAdapter(x.digest, EvictionReason.KV)]
    bench.run()
    assert bench.of(PreemptRequest) == []
    assert list(bench.engine.left) == [attempt("a"), attempt("b")]


def test_an_adapter_goes_with_its_last_user() -> None:
    bench = slora(1000)
    bench.bring_near(adapter("x"))
    bench.dispatch(request("a", using=adapter("x"), context=5, output=5))
    bench.dispatch(request("b", using=adapter("x"), context=5, output=9))
    bench.run(steps=8)
    assert list(bench.engine.left) == [attempt("a")]
    assert bench.of(EvictAdapter) == []
    bench.run()
    assert bench.log[-2:] == [
        EndRequest(attempt("b")),
        EvictAdapter(adapter("x").digest, EvictionReason.ABANDONED),
    ]


def test_an_adapter_kept_for_the_next_batch_stays() -> None:
    x = adapter("x")
    bench = slora(1000, PACED)
    bench.bring_near(x)
    bench.dispatch(request("a", using=x, context=5, output=9))
    bench.load_all()
    bench.dispatch(request("base", context=5, output=80))
    bench.dispatch(request("b", using=x, context=5, output=9))
    bench.run(steps=30)
    assert [load.adapter for load in bench.of(LoadAdapter)] == [x]


def test_a_request_that_only_just_fits_the_pool_starts_once_it_is_alone() -> None:
    bench = slora(50)
    bench.dispatch(request("a", context=10, output=20))
    bench.dispatch(request("b", context=30, output=20))
    bench.run()
    assert list(bench.engine.left) == [attempt("a"), attempt("b")]


@pytest.mark.parametrize("stepping", ["target", "chunked"])
@pytest.mark.parametrize(("tokens", "fits"), [(59, False), (60, True)])
def test_where_chunks_share_steps_a_prompt_counts_with_all_it_will_hold(
    stepping: Literal["target", "chunked"], tokens: int, *, fits: bool
) -> None:
    """When b is looked at, a has one token: (10 + 1) + (20 - 2), and 20 + 10 for b, make 59.

    In lockstep the peak would be 9·2 + 11 + 21 = 50.
    """
    config = replace(SLORA, stepping=stepping, prefill_tokens_per_step=20, min_prefill_tokens=1)
    bench = slora(tokens, config)
    bench.dispatch(request("a", context=10, output=20))
    bench.dispatch(request("b", context=20, output=10))
    for _ in range(5):
        bench.step()
    assert started(bench) == (["a", "b"] if fits else ["a"])


@pytest.mark.parametrize(
    ("reserve", "count"), [(Reserve.PREDICTED, 6), (Reserve.QUANTILE, 3), (Reserve.MAX, 2)]
)
def test_a_promise_is_for_the_predicted_the_quantile_or_the_maximum(
    reserve: Reserve, count: int
) -> None:
    """Of 120 tokens, each is promised 10 and 10, 30 or 50."""
    bench = slora(120, ReplicaConfig(reserve=reserve))
    for name in "abcdefgh":
        new = request(name, context=10, output=10, output_q90=30, output_max=50)
        bench.dispatch(new, output=10)
    bench.step()
    assert len(started(bench)) == count


def test_an_aborted_request_frees_the_way_at_the_next_step() -> None:
    bench = slora(60)
    bench.dispatch(request("a", context=10, output=20))
    bench.dispatch(request("large", context=40, output=15))
    bench.dispatch(request("small", context=2, output=2))
    bench.step()
    bench.step()
    bench.handle(RequestAborted(attempt("large")))
    bench.step()
    assert started(bench) == ["a", "small"]
