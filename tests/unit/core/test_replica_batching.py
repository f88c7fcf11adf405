"""How many prompt tokens share a step with decodes, and what the machine learns of its steps."""

from dataclasses import replace
from random import Random
from typing import Literal

import pytest

from services.core.config import ReplicaConfig
from services.core.costs import StepCosts
from services.core.decisions import RunStep
from services.core.types import Capacity
from tests.unit.core.core_world import adapter, attempt, request
from tests.unit.core.replica_bench import Bench

Stepping = Literal["target", "chunked", "whole"]

# Of these costs a step of one decode takes 50 + 1 ms; a prompt token 1 ms, and rank · 0.01 ms more.
COSTS = StepCosts(
    step_s=0.05,
    prefill_s=0.01,
    prefill_token_s=1e-3,
    prefill_rank_token_s=1e-5,
    decode_sequence_s=1e-3,
    decode_rank_s=0.0,
    cached_token_s=0.0,
)
STRICT = ReplicaConfig(tbt_target_s=0.1, slack_share=0.0, patience_s=1e6, min_prefill_tokens=5)
LIMITS = Capacity(10_000, 1000, 10, 64, 4000)


def target(config: ReplicaConfig = STRICT, costs: StepCosts = COSTS) -> Bench:
    """A worker that knows what its steps cost."""
    return Bench(limits=LIMITS, config=config, prior=costs)


def decoding(config: ReplicaConfig = STRICT, costs: StepCosts = COSTS) -> Bench:
    """One with a request "d" that has its first token since the time 0, about."""
    bench = target(config, costs)
    bench.dispatch(request("d", context=2, output=500))
    bench.step()
    return bench


def test_a_step_takes_the_prompt_tokens_that_keep_it_within_the_target() -> None:
    """100 ms less 50 + 10 for the step and 1 for the decode leave 39."""
    bench = decoding()
    bench.dispatch(request("p", context=100, output=5))
    for _ in range(4):
        bench.step(takes_s=0.1)
    assert bench.steps()[1:] == ["d:1", "d:1 p:39", "d:1 p:39", "d:1 p:22", "d:1 p:1"]


def test_tokens_of_a_high_rank_cost_more_so_fewer_are_taken() -> None:
    bench = decoding()
    bench.dispatch(request("p", using=adapter("x", rank=128), context=100, output=5))
    bench.load_all()
    bench.step(takes_s=0.1)
    assert bench.steps()[-1] == f"d:1 p:{int(39 / 2.28)}"


def test_a_chunk_reads_the_part_of_its_prompt_that_is_cached() -> None:
    """After 38 tokens, which at 0.1 ms each take 3.8 ms."""
    bench = decoding(costs=replace(COSTS, cached_token_s=1e-4))
    bench.dispatch(request("p", context=100, output=5))
    bench.step(takes_s=0.1)
    bench.step(takes_s=0.1)
    assert bench.steps()[-2:] == ["d:1 p:38", "d:1 p:34"]


def test_prompts_share_what_is_left_but_no_slivers() -> None:
    for second, expected in ((30, "d:1 p:20 q:19"), (4, "d:1 p:20 q:4"), (19, "d:1 p:20 q:19")):
        bench = decoding()
        bench.dispatch(request("p", context=20, output=5))
        bench.dispatch(request("q", context=second, output=5))
        bench.step(takes_s=0.1)
        assert bench.steps()[-1] == expected
    bench = decoding()
    bench.dispatch(request("p", context=37, output=5))
    bench.dispatch(request("q", context=30, output=5))
    bench.step(takes_s=0.1)
    assert bench.steps()[-1] == "d:1 p:37"


def test_prompts_go_on_where_decodes_take_all_the_time() -> None:
    bench = decoding(costs=replace(COSTS, decode_sequence_s=0.2))
    bench.dispatch(request("p", context=12, output=5))
    for _ in range(3):
        bench.step(takes_s=0.3)
    assert bench.steps()[-3:] == ["d:1 p:5", "d:1 p:5", "d:1 p:2"]


def test_while_nothing_decodes_a_step_is_as_long_as_may_be() -> None:
    """500 ms less 50 + 10."""
    bench = target()
    bench.dispatch(request("p", context=1000, output=5))
    assert bench.steps() == ["p:440"]


def test_no_step_has_more_prompt_tokens_than_its_limit() -> None:
    bench = target(replace(STRICT, step_tokens_limit=64), replace(COSTS, prefill_token_s=0.0))
    bench.dispatch(request("p", context=1000, output=5))
    bench.step()
    assert bench.steps() == ["p:64", "p:64"]


def test_a_step_may_use_a_share_of_the_time_that_decodes_are_ahead() -> None:
    """Ten tokens at 60 ms each are 400 ms ahead of the target, of which a quarter is used.

    That makes 39 + 100 tokens, but for the time that the clock of the bench adds to events.
    """
    bench = decoding(replace(STRICT, slack_share=0.25))
    for _ in range(9):
        bench.step(takes_s=0.06)
    bench.dispatch(request("p", context=500, output=5))
    bench.step(takes_s=0.06)
    assert bench.steps()[-1] == "d:1 p:138"


def test_the_tightest_decode_decides_how_much_may_be_used() -> None:
    bench = decoding(replace(STRICT, slack_share=0.25))
    for _ in range(9):
        bench.step(takes_s=0.06)
    bench.dispatch(request("e", context=1, output=500))
    bench.step(takes_s=0.06)
    bench.dispatch(request("p", context=500, output=5))
    bench.step(takes_s=0.06)
    assert bench.steps()[-1] == "d:1 e:1 p:38"


@pytest.mark.parametrize(("waited_s", "tokens"), [(2.0, 39), (3.0, 239), (4.0, 439), (9.0, 439)])
def test_steps_grow_when_the_first_prompt_has_waited_long(waited_s: float, tokens: int) -> None:
    """From 100 ms at 2 s to 500 ms at 4 s."""
    bench = decoding(replace(STRICT, patience_s=2.0))
    bench.step(takes_s=10.0 - bench.now)
    bench.dispatch(request("p", context=600, output=5, arrived_s=10.0 - waited_s))
    bench.step()
    assert bench.steps()[-1] == f"d:1 p:{tokens}"


def test_no_step_is_predicted_beyond_the_target_where_decodes_leave_room() -> None:
    random = Random(5)
    bench = target(replace(STRICT, min_prefill_tokens=1))
    for index in range(60):
        using = adapter(f"x{index % 4}", rank=8 * 2 ** (index % 4))
        context = random.randint(1, 300)
        bench.dispatch(request(f"r{index}", using=using, context=context, output=20))
        bench.load_all()
        for _ in range(random.randint(1, 6)):
            if bench.engine.step is None:
                break
            shape = bench.shape()
            limit_s = 0.1 if shape.decode_sequences else 0.5
            assert COSTS.step_time_s(shape) <= limit_s + 1e-9
            bench.step(takes_s=COSTS.step_time_s(shape))
    bench.run(costs=COSTS)
    assert len(bench.engine.left) == 60


@pytest.mark.parametrize("stepping", ["target", "chunked", "whole"])
@pytest.mark.parametrize("admission", ["promise", "slora"])
def test_every_prompt_ends_however_many_requests_decode(
    stepping: Stepping, admission: Literal["promise", "slora"]
) -> None:
    costs = replace(COSTS, decode_sequence_s=0.05)  # three decodes alone are over the target
    config = ReplicaConfig(
        stepping=stepping, admission=admission, admission_every_steps=3, tbt_target_s=0.1
    )
    bench = Bench(blocks=60, config=config, prior=costs)
    for index in range(40):
        using = adapter(f"x{index % 5}") if index % 3 else None
        new = request(f"r{index}", using=using, context=1 + 37 * index % 200, output=30)
        bench.dispatch(new, output=1 + 7 * index % 30)
        bench.run(steps=2, costs=costs)
    bench.run(costs=costs)
    assert set(bench.engine.left) == {attempt(f"r{index}") for index in range(40)}


def test_steps_of_the_same_decodes_are_the_same_decision() -> None:
    bench = decoding()
    bench.step()
    bench.step()
    first, second = bench.of(RunStep)[-2:]
    assert first is second


def test_the_machine_learns_what_its_steps_cost() -> None:
    truth = StepCosts(step_s=0.2, prefill_token_s=2e-3, decode_sequence_s=5e-3, decode_rank_s=1e-5)
    bench = Bench(limits=LIMITS, config=replace(STRICT, tbt_target_s=0.4))
    random = Random(2)
    for index in range(80):
        using = adapter(f"x{index % 5}", rank=8 * 2 ** (index % 5))
        new = request(f"r{index}", using=using, context=random.randint(1, 400), output=40)
        bench.dispatch(new, output=random.randint(1, 40))
        bench.run(steps=4, costs=truth)
    bench.run(costs=truth)
    costs = bench.machine.costs
    assert costs is not None
    assert costs.step_s == pytest.approx(truth.step_s, rel=0.05)
    assert costs.prefill_token_s == pytest.approx(truth.prefill_token_s, rel=0.05)
    assert costs.decode_sequence_s == pytest.approx(truth.decode_sequence_s, rel=0.05)


def test_costs_are_told_only_once_they_have_been_measured() -> None:
    bench = decoding()
    assert bench.machine.costs is None


def test_the_machine_learns_what_a_load_from_host_memory_costs_and_ignores_downloads() -> None:
    bench = decoding(replace(STRICT, max_loads=2))
    near, far = adapter("near", blocks=4), adapter("far", blocks=4)
    bench.bring_near(near)
    bench.dispatch(request("a", using=near))
    bench.dispatch(request("b", using=far))
    bench.now += 0.5
    bench.handle(bench.engine.finish_load(near.digest))
    bench.now += 60.0
    bench.handle(bench.engine.finish_load(far.digest))
    for _ in range(16):
        bench.step(takes_s=0.05)
    costs = bench.machine.costs
    assert costs is not None
    assert costs.load_byte_s == pytest.approx(0.5 / near.size_bytes, rel=1e-4)
