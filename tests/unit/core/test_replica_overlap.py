"""Prompts are computed as far as the layers of their adapter have come."""

from dataclasses import replace
from typing import Literal

import pytest

from services.core.config import ReplicaConfig
from services.core.costs import StepCosts
from services.core.decisions import (
    EndRequest,
    ExpireRequest,
    FailRequest,
    LoadAdapter,
    PreemptRequest,
    RunStep,
    StartRequest,
    StepWork,
)
from services.core.events import LoadFailure, RequestAborted
from services.core.types import Capacity, RequestId, Reserve
from tests.unit.core.core_world import adapter, attempt, capacity, request, without_blocks
from tests.unit.core.replica_bench import Bench

LIMITS = replace(capacity(100, context=2000), num_layers=8)
CHUNKED = ReplicaConfig(stepping="chunked", prefill_tokens_per_step=100)
# A step takes 10 ms and a prompt token 1 ms.
COSTS = StepCosts(
    step_s=0.01,
    prefill_token_s=1e-3,
    prefill_rank_token_s=0.0,
    decode_sequence_s=0.0,
    decode_rank_s=0.0,
    cached_token_s=0.0,
)
X = adapter("x")


def bench(config: ReplicaConfig = CHUNKED, limits: Capacity = LIMITS) -> Bench:
    return Bench(limits=limits, config=config, prior=COSTS)


def decoding(config: ReplicaConfig = CHUNKED, limits: Capacity = LIMITS) -> Bench:
    """One with a request "d" that decodes."""
    made = bench(config, limits)
    made.dispatch(request("d", context=2, output=500))
    made.step()
    return made


def part(name: str, tokens: int, until_layer: int) -> StepWork:
    return StepWork(RequestId(name), tokens, samples=False, until_layer=until_layer)


def work(name: str, tokens: int = 1, *, samples: bool = True) -> StepWork:
    return StepWork(RequestId(name), tokens, samples)


def test_a_prompt_is_computed_as_far_as_its_adapters_layers_are_here() -> None:
    world = bench()
    assert world.dispatch(request("p", using=X, context=20)) == [LoadAdapter(X)]
    assert world.progress(X, 2) == [StartRequest(attempt("p")), RunStep((part("p", 20, 2),))]
    assert world.step() == []
    assert world.progress(X, 6) == [RunStep((part("p", 20, 6),))]
    assert world.step() == []
    assert world.handle(world.engine.finish_load(X.digest)) == [RunStep((work("p", 20),))]
    assert world.step() == [RunStep((work("p"),))]


def test_layers_that_come_during_a_step_are_used_by_the_next() -> None:
    world = bench()
    world.dispatch(request("p", using=X, context=20))
    world.progress(X, 2)
    world.progress(X, 4)
    assert world.step() == [RunStep((part("p", 20, 4),))]
    world.handle(world.engine.finish_load(X.digest))
    assert world.step() == [RunStep((work("p", 20),))]


def test_a_request_that_comes_during_the_load_uses_the_layers_that_are_here() -> None:
    world = bench()
    world.dispatch(request("p", using=X, context=20))
    world.progress(X, 4)
    world.step()
    assert world.dispatch(request("q", using=X, context=7))[-1] == RunStep((part("q", 7, 4),))


def test_only_the_first_chunk_of_a_long_prompt_is_computed_before_its_adapter_is_here() -> None:
    world = bench()
    world.dispatch(request("p", using=X, context=250))
    world.progress(X, 4)
    world.step()
    world.handle(world.engine.finish_load(X.digest))
    for _ in range(2):
        world.step()
    assert [one.work for one in world.of(RunStep)] == [
        (part("p", 100, 4),),
        (work("p", 100, samples=False),),
        (work("p", 100, samples=False),),
        (work("p", 50),),
    ]


def test_whoever_decodes_is_in_every_step_with_a_part() -> None:
    world = decoding()
    world.dispatch(request("p", using=X, context=20))
    world.progress(X, 4)
    assert world.step() == [StartRequest(attempt("p")), RunStep((work("d"), part("p", 20, 4)))]
    assert world.step() == [RunStep((work("d"),))]


def test_beside_decodes_a_part_waits_for_a_share_of_the_layers() -> None:
    world = decoding()
    world.dispatch(request("p", using=X, context=20))
    world.progress(X, 1)
    assert world.step() == [RunStep((work("d"),))]
    world.progress(X, 2)
    assert world.step()[-1] == RunStep((work("d"), part("p", 20, 2)))


def test_where_nothing_else_runs_whatever_is_new_is_used() -> None:
    world = bench()
    world.dispatch(request("p", using=X, context=20))
    assert world.progress(X, 1)[-1] == RunStep((part("p", 20, 1),))


def test_a_part_waits_for_a_load_that_ends_before_a_step_would() -> None:
    """Four layers came in 4 ms, so four more come within a step's 10 ms."""
    world = bench()
    world.dispatch(request("p", using=X, context=20))
    assert world.progress(X, 4, after_s=0.004) == []
    assert world.handle(world.engine.finish_load(X.digest))[-1] == RunStep((work("p", 20),))


def test_a_load_that_is_late_is_not_waited_for() -> None:
    world = bench()
    began_s = world.now
    world.dispatch(request("p", using=X, context=20))
    world.progress(X, 4, after_s=0.004)
    due_s = world.machine.next_deadline()
    assert due_s == pytest.approx(began_s + 0.008, abs=1e-4)
    assert due_s is not None
    assert without_blocks(world.machine.tick(now=due_s))[-1] == RunStep((part("p", 20, 4),))
    assert world.machine.next_deadline() is None


def test_a_part_waits_while_there_are_prompts_that_have_all_they_need() -> None:
    world = decoding()
    world.dispatch(request("p", using=X, context=80))
    world.dispatch(request("q", context=150))
    world.progress(X, 4)
    assert world.step()[-1] == RunStep((work("d"), work("q", 100, samples=False)))
    assert world.step() == [RunStep((work("d"), work("q", 50)))]
    assert world.step()[-1] == RunStep((work("d"), work("q"), part("p", 80, 4)))


def test_parts_share_a_step_in_order_of_arrival() -> None:
    world = decoding()
    world.dispatch(request("p", using=X, context=80))
    world.dispatch(request("q", using=X, context=300))
    world.progress(X, 4)
    assert world.step()[-1] == RunStep((work("d"), part("p", 80, 4), part("q", 60, 4)))


def test_a_part_takes_its_share_of_the_steps_time() -> None:
    """Of 100 ms 90 are left; half of the layers of 61 tokens take 30.5, so q gets 59 tokens."""
    config = ReplicaConfig(tbt_target_s=0.1, slack_share=0.0, patience_s=1e6)
    world = decoding(config)
    world.dispatch(request("p", using=X, context=61))
    world.dispatch(request("q", using=X, context=300))
    world.progress(X, 4)
    assert world.step()[-1] == RunStep((work("d"), part("p", 61, 4), part("q", 59, 4)))


def test_a_chunk_sized_for_an_idle_worker_goes_on_by_the_layers_there_is_time_for() -> None:
    """It has 480 tokens, 60 ms a layer; beside a decode 90 ms are left for it."""
    config = ReplicaConfig(tbt_target_s=0.1, slack_share=0.0, patience_s=1e6, step_limit_s=0.49)
    world = bench(config, replace(LIMITS, pool_blocks=1000))
    world.dispatch(request("p", using=X, context=800))
    world.progress(X, 4)
    world.dispatch(request("d", context=1, output=500))
    world.step()
    world.handle(world.engine.finish_load(X.digest))
    for _ in range(5):
        world.step(takes_s=0.1)
    assert [one.work[-1] for one in world.of(RunStep)[:6]] == [
        part("p", 480, 4),
        work("d"),
        part("p", 480, 5),
        part("p", 480, 6),
        part("p", 480, 7),
        work("p", 480, samples=False),
    ]


def test_a_prompt_of_one_token_is_a_decode_once_its_adapter_is_here() -> None:
    world = bench()
    world.dispatch(request("p", using=X, context=1))
    assert world.progress(X, 4)[-1] == RunStep((part("p", 1, 4),))
    world.step()
    assert world.handle(world.engine.finish_load(X.digest)) == [RunStep((work("p"),))]
    assert world.step() == [RunStep((work("p"),))]


def test_its_blocks_are_held_from_the_first_part_on_and_only_once() -> None:
    world = bench()
    world.dispatch(request("p", using=X, context=95))
    world.progress(X, 2)
    assert world.machine.snapshot().kv_blocks == 10
    world.step()
    world.progress(X, 4)
    world.step()
    world.handle(world.engine.finish_load(X.digest))
    assert world.machine.snapshot().kv_blocks == 10


def test_a_load_that_fails_between_two_parts_fails_the_request_and_frees_its_blocks() -> None:
    world = bench()
    world.dispatch(request("p", using=X, context=20))
    world.progress(X, 4)
    world.step()
    [failure] = world.handle(world.engine.fail_load(X.digest))
    assert failure == FailRequest(attempt("p"), LoadFailure.UNAVAILABLE, "store down")
    assert world.machine.snapshot().free_blocks == 100


def test_a_load_that_fails_during_a_part_fails_the_request_after_the_step() -> None:
    world = bench()
    world.dispatch(request("p", using=X, context=20))
    world.progress(X, 4)
    assert world.handle(world.engine.fail_load(X.digest)) == []
    assert world.dispatch(request("q", using=X, context=20)) == []
    assert [type(decision) for decision in world.step()] == [FailRequest, FailRequest]
    assert world.machine.snapshot().free_blocks == 100
    assert world.dispatch(request("r", using=X, context=20)) == [LoadAdapter(X)]


def test_a_request_aborted_between_two_parts_leaves_at_once() -> None:
    world = bench()
    world.dispatch(request("p", using=X, context=20))
    world.progress(X, 4)
    world.step()
    assert world.handle(RequestAborted(attempt("p"))) == [EndRequest(attempt("p"))]
    assert world.machine.snapshot().kv_blocks == 0


def test_a_request_aborted_during_a_part_leaves_after_the_step() -> None:
    world = bench()
    world.dispatch(request("p", using=X, context=20))
    world.progress(X, 4)
    assert world.handle(RequestAborted(attempt("p"))) == []
    assert world.step() == [EndRequest(attempt("p"))]


def test_a_deadline_ends_a_request_between_two_parts() -> None:
    world = bench()
    world.dispatch(request("p", using=X, context=20, deadline_s=5.0))
    world.progress(X, 4)
    world.step()
    assert world.machine.tick(now=5.0) == [ExpireRequest(attempt("p"))]
    assert world.machine.snapshot().kv_blocks == 0


def test_a_request_preempted_between_two_parts_starts_again_from_the_first_layer() -> None:
    """The older request generates more than was predicted, and nothing else can go."""
    config = replace(CHUNKED, reserve=Reserve.PREDICTED)
    world = bench(config, replace(LIMITS, pool_blocks=8))
    world.dispatch(request("d", context=10, output=10, output_max=70), output=60)
    world.step()
    world.dispatch(request("p", using=X, context=30, output=10))
    world.progress(X, 4)
    while not world.of(PreemptRequest):
        world.step()
    world.handle(world.engine.finish_load(X.digest))
    world.run()
    parts = [one for step in world.of(RunStep) for one in step.work if one.request_id == "p"]
    assert parts[:2] == [part("p", 30, 4), work("p", 30)]
    assert set(world.engine.left) == {attempt("d"), attempt("p")}


@pytest.mark.parametrize(("stepping", "num_layers"), [("whole", 8), ("target", 0), ("chunked", 0)])
def test_without_layers_or_with_whole_prompts_a_request_waits_for_all_of_its_adapter(
    stepping: Literal["target", "chunked", "whole"], num_layers: int
) -> None:
    config = replace(CHUNKED, stepping=stepping)
    world = bench(config, replace(LIMITS, num_layers=num_layers))
    world.dispatch(request("p", using=X, context=20))
    assert world.progress(X, 4) == []
    assert world.handle(world.engine.finish_load(X.digest))[-1] == RunStep((work("p", 20),))


def test_the_last_layers_come_with_the_end_of_the_load() -> None:
    world = bench()
    world.dispatch(request("p", using=X, context=20))
    assert world.progress(X, 8) == []


def test_reports_of_fewer_layers_and_of_unknown_loads_change_nothing() -> None:
    world = bench()
    world.dispatch(request("p", using=X, context=20))
    world.progress(X, 4)
    world.step()
    assert world.progress(X, 2) == []
    assert world.progress(adapter("ghost"), 2) == []


def test_nothing_is_learned_from_a_step_that_passes_part_of_the_layers_only() -> None:
    world = bench()
    for index in range(20):
        one = adapter(f"x{index}")
        world.dispatch(request(f"p{index}", using=one, context=20))
        world.progress(one, 4)
        world.step(takes_s=0.1)
        world.handle(RequestAborted(attempt(f"p{index}")))
        world.handle(world.engine.finish_load(one.digest))
    assert world.machine.costs is None
