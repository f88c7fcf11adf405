"""A worker between a scheduler and its gateways, over gRPC, with the simulated engine."""

import asyncio
import time

import grpc
import pytest

from calumma.common.v1 import common_pb2
from calumma.worker.v1 import worker_pb2
from services.common.errors import Reason, RpcError
from services.core.types import AdapterDigest
from services.worker.wire import work_from
from tests.support.worker_peers import (
    INFO,
    Bench,
    bench,
    expected_tokens,
    make_blob,
    quick_engine,
    work_item,
)

STOP = common_pb2.FINISH_REASON_STOP
LENGTH = common_pb2.FINISH_REASON_LENGTH
CANCELLED = common_pb2.FINISH_REASON_CANCELLED


async def test_a_dispatched_request_streams_its_tokens_in_order() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        item = work_item("one")
        await it.scheduler.dispatch(item)
        last = await gateway.ended("one")
        assert gateway.tokens["one"] == expected_tokens(item)
        assert last.finish_reason == LENGTH
        assert last.timings.queue_s == 0.25
        assert last.timings.prefill_s > 0
        assert last.timings.decode_s > 0
        assert last.timings.adapter_tier == common_pb2.ADAPTER_TIER_NONE
        assert not last.timings.HasField("adapter_load_s")
        finished = await it.scheduler.has_finished("one")
        assert finished.output_tokens == 20
        assert it.scheduler.started["one", 1] == 1
        assert it.scheduler.prefilled["one", 1] == 1
        assert [frame.sequence for frame in gateway.frames] == list(
            range(1, len(gateway.frames) + 1)
        )


async def test_one_frame_carries_the_step_of_all_requests_of_a_gateway() -> None:
    async with bench(engine=quick_engine(step_ms=10)) as it:
        gateway, other = await it.gateway(), await it.gateway("gateway-2")
        items = [work_item(f"r{i}") for i in range(8)]
        await it.scheduler.dispatch(*items, work_item("foreign", gateway_id="gateway-2"))
        await gateway.ended(*(item.request_id for item in items))
        await other.ended("foreign")
        for item in items:
            assert gateway.tokens[item.request_id] == expected_tokens(item)
        assert set(other.tokens) == {"foreign"}
        # 8 requests in about as many frames as one request takes, not 8 times as many.
        assert len(gateway.frames) <= 25
        assert max(len(frame.requests) for frame in gateway.frames) == 8


async def test_a_request_dispatched_before_its_gateways_stream_waits_for_it() -> None:
    async with bench() as it:
        item = work_item("early", max_tokens=5)
        await it.scheduler.dispatch(item)
        await it.scheduler.has_finished("early")
        gateway = await it.gateway()
        await gateway.ended("early")
        assert gateway.tokens["early"] == expected_tokens(item)


async def test_the_stop_token_ends_a_request_and_is_not_part_of_it() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        item = work_item("stopped")
        tokens = expected_tokens(item)
        item.stopping.stop_token_ids.append(tokens[6])
        await it.scheduler.dispatch(item)
        last = await gateway.ended("stopped")
        assert last.finish_reason == STOP
        assert gateway.tokens["stopped"] == tokens[: tokens.index(tokens[6])]


async def test_a_stop_token_before_min_tokens_does_not_end_a_request() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        item = work_item("patient")
        tokens = expected_tokens(item)
        item.stopping.stop_token_ids.append(tokens[2])
        item.stopping.min_tokens = 10
        await it.scheduler.dispatch(item)
        last = await gateway.ended("patient")
        assert last.finish_reason == LENGTH
        assert gateway.tokens["patient"] == tokens


async def test_the_end_of_the_context_ends_a_request_with_length() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        await it.scheduler.dispatch(work_item("long", tokens=500, max_tokens=400))
        last = await gateway.ended("long")
        assert last.finish_reason == LENGTH
        assert len(gateway.tokens["long"]) == 12


async def test_a_resubmitted_request_goes_on_at_its_position() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        item = work_item("again")
        tokens = expected_tokens(item)
        item.attempt = 2
        item.token_ids.extend(tokens[:7])
        gateway.tokens["again"] = tokens[:7]
        await it.scheduler.dispatch(item)
        await gateway.ended("again")
        assert gateway.tokens["again"] == tokens
        assert gateway.repeated == 0
        assert (await it.scheduler.has_finished("again", 2)).output_tokens == 20


async def test_a_resubmitted_request_with_nothing_left_to_generate_ends_at_once() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        item = work_item("done")
        tokens = expected_tokens(item)
        item.attempt = 2
        item.token_ids.extend(tokens)
        gateway.tokens["done"] = tokens[:]
        await it.scheduler.dispatch(item)
        assert (await gateway.ended("done")).finish_reason == LENGTH
        assert gateway.tokens["done"] == tokens
        await it.scheduler.has_finished("done", 2)


async def test_a_later_attempt_supersedes_the_running_one() -> None:
    async with bench(engine=quick_engine(step_ms=10)) as it:
        gateway = await it.gateway()
        item = work_item("twice", max_tokens=200)
        await it.scheduler.dispatch(item)
        await gateway.has_tokens("twice", 3)
        item.attempt = 2
        item.stopping.max_tokens = 10
        await it.scheduler.dispatch(item)
        finished = await it.scheduler.has_finished("twice", 1)
        assert finished.finish_reason == CANCELLED
        await it.scheduler.has_finished("twice", 2)
        assert len(it.scheduler.finished["twice", 1]) == 1


async def test_a_later_attempt_may_come_at_the_moment_when_the_adapter_is_there() -> None:
    async with bench() as it:
        gateway, driver = await it.gateway(), it.worker.driver
        item = work_item("twice", adapter=it.store.add(make_blob(1)))
        later = work_item("twice", adapter=item.adapter)
        later.attempt = 2
        loads = driver._loads
        loaded = loads._on_ended

        def loaded_and_dispatched(digest: AdapterDigest, error: RpcError | None) -> None:
            loaded(digest, error)
            work = work_from(later, INFO, caches_prefixes=True, now=time.monotonic())
            driver.dispatch(work)

        loads._on_ended = loaded_and_dispatched  # type: ignore[method-assign]
        await it.scheduler.dispatch(item)
        assert (await it.scheduler.has_finished("twice", 1)).finish_reason == CANCELLED
        assert (await it.scheduler.has_finished("twice", 2)).finish_reason == LENGTH
        await gateway.has_tokens("twice", 20)
        assert gateway.tokens["twice"] == expected_tokens(item)


async def test_the_same_dispatch_twice_runs_once() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        item = work_item("once")
        await it.scheduler.dispatch(item, item)
        await gateway.ended("once")
        await it.scheduler.has_finished("once")
        await it.scheduler.dispatch(item)  # after its end: told again that it is over
        await it.scheduler.until(lambda: len(it.scheduler.finished["once", 1]) == 2)
        assert gateway.tokens["once"] == expected_tokens(item)
        assert gateway.ending_frames["once"] == 1


async def test_logprobs_come_with_every_token_when_asked_for() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        item = work_item("probable", max_tokens=4)
        item.logprobs = 1
        await it.scheduler.dispatch(item)
        await gateway.ended("probable")
        parts = [part for frame in gateway.frames for part in frame.requests]
        chosen = [entry.chosen.token_id for part in parts for entry in part.logprobs]
        assert chosen == gateway.tokens["probable"]
        assert all(len(entry.top) == 1 for part in parts for entry in part.logprobs)


async def test_a_running_request_can_be_cancelled_within_a_step() -> None:
    async with bench(engine=quick_engine(step_ms=20)) as it:
        gateway = await it.gateway()
        await it.scheduler.dispatch(work_item("gone", max_tokens=400), work_item("stays"))
        await gateway.has_tokens("gone", 2)
        await it.scheduler.abort("gone")
        last = await gateway.ended("gone")
        assert last.finish_reason == CANCELLED
        got = len(gateway.tokens["gone"])
        await it.scheduler.has_finished("gone")
        async with asyncio.timeout(5):  # the engine's thread closes it with its next step
            while "gone#1" not in it.engine.closed:
                await asyncio.sleep(0.005)
        await gateway.ended("stays")
        assert len(gateway.tokens["gone"]) == got
        assert gateway.tokens["stays"] == expected_tokens(work_item("stays"))


async def test_a_request_can_be_cancelled_in_the_middle_of_its_prefill() -> None:
    async with bench(engine=quick_engine(step_ms=20), prefill_tokens_per_step=16) as it:
        gateway = await it.gateway()
        await it.scheduler.dispatch(work_item("prompt", tokens=480))
        await it.scheduler.until(lambda: it.scheduler.started["prompt", 1] == 1)
        await it.scheduler.abort("prompt")
        last = await gateway.ended("prompt")
        assert last.finish_reason == CANCELLED
        assert gateway.tokens["prompt"] == []
        assert not last.timings.HasField("prefill_s")


async def test_a_request_can_be_cancelled_while_its_adapter_loads() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        it.store.gate.clear()
        ref = it.store.add(make_blob(1))
        await it.scheduler.dispatch(work_item("loading", adapter=ref), work_item("base"))
        await gateway.ended("base")  # others go on meanwhile
        await it.scheduler.abort("loading")
        last = await gateway.ended("loading")
        assert last.finish_reason == CANCELLED
        assert last.timings.adapter_tier == common_pb2.ADAPTER_TIER_STORE
        it.store.gate.set()
        await it.scheduler.dispatch(work_item("later", adapter=ref))
        assert (await gateway.ended("later")).finish_reason == LENGTH
        assert len(it.store.offsets) == 1


@pytest.mark.parametrize(
    ("stage", "tokens"), [("adapter_load", 8), ("prefill", 480), ("decode", 8)]
)
async def test_a_deadline_ends_a_request_and_names_the_stage(stage: str, tokens: int) -> None:
    engine = quick_engine(step_ms=20)
    async with bench(engine=engine, stepping="chunked", prefill_tokens_per_step=16) as it:
        gateway = await it.gateway()
        adapter = None
        if stage == "adapter_load":
            it.store.gate.clear()
            adapter = it.store.add(make_blob(1))
        item = work_item("late", tokens=tokens, max_tokens=400, adapter=adapter, time_left_s=0.2)
        await it.scheduler.dispatch(item)
        last = await gateway.ended("late")
        assert last.error.reason == Reason.DEADLINE_EXCEEDED
        assert last.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert last.error.stage == stage
        await it.scheduler.has_finished("late")
        it.store.gate.set()


async def test_a_bad_work_item_fails_alone_with_its_field() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        items = {name: work_item(name) for name in ("empty", "vocabulary", "nan", "long", "digest")}
        del items["empty"].token_ids[:]
        items["vocabulary"].token_ids[3] = 5000
        items["nan"].sampling.temperature = float("nan")
        items["long"].token_ids.extend([9] * 600)
        items["long"].prompt_tokens = len(items["long"].token_ids)
        items["digest"].adapter.digest = "sha256:nonsense"
        await it.scheduler.dispatch(*items.values(), work_item("good"))
        await gateway.ended("good", *items)
        told = {name: (e.error.reason, e.error.field) for name, e in gateway.endings.items()}
        assert told == {
            "good": ("", ""),
            "empty": (Reason.PROMPT_EMPTY, "token_ids"),
            "vocabulary": (Reason.INVALID_FIELD, "token_ids"),
            "nan": (Reason.INVALID_FIELD, "sampling.temperature"),
            "long": (Reason.PROMPT_TOO_LONG, "token_ids"),
            "digest": (Reason.INVALID_FIELD, "adapter.digest"),
        }
        for name in items:
            await it.scheduler.has_finished(name)


async def test_a_numerical_failure_ends_only_its_request() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        it.engine.poisoned.add("ill")
        await it.scheduler.dispatch(work_item("ill"), work_item("well"))
        last = await gateway.ended("well", "ill")
        assert last.error.reason == Reason.NUMERICAL_FAILURE
        assert gateway.tokens["well"] == expected_tokens(work_item("well"))


async def test_an_engine_exception_fails_its_step_and_the_worker_goes_on() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        await it.scheduler.dispatch(work_item("unlucky", max_tokens=300))
        await gateway.has_tokens("unlucky", 2)
        it.engine.raises = 1
        last = await gateway.ended("unlucky")
        assert last.error.reason == Reason.INTERNAL
        assert last.error.stage == "decode"
        await it.scheduler.dispatch(work_item("next"))
        await gateway.ended("next")
        assert gateway.tokens["next"] == expected_tokens(work_item("next"))
        assert not it.failures


async def test_an_engine_that_always_raises_ends_the_worker() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        it.engine.raises = 1000
        for number in range(5):
            await it.scheduler.dispatch(work_item(f"r{number}"))
            await gateway.ended(f"r{number}")
        assert gateway.endings["r4"].error.reason == Reason.WORKER_LOST
        await asyncio.sleep(0)
        assert it.failures == ["worker failed"]
        assert it.worker.has_failed


async def test_preemption_under_a_tiny_pool_keeps_every_output() -> None:
    engine = quick_engine(step_ms=1, pool_blocks=24)
    async with bench(engine=engine) as it:
        gateway = await it.gateway()
        items = [work_item(f"r{i}", tokens=16, max_tokens=60) for i in range(10)]
        for item in items:
            item.predicted_output_tokens = 1  # so that far too many are admitted
        await it.scheduler.dispatch(*items)
        await gateway.ended(*(item.request_id for item in items))
        for item in items:
            assert gateway.tokens[item.request_id] == expected_tokens(item)
            assert it.scheduler.started[item.request_id, 1] == 1
        opened = len(it.engine.closed)
        assert opened > len(items) + 1, "nothing was preempted"
        assert set(gateway.ending_frames.values()) == {1}


async def test_a_request_that_can_never_fit_is_told_so() -> None:
    async with bench(engine=quick_engine(pool_blocks=8)) as it:
        gateway = await it.gateway()
        await it.scheduler.dispatch(work_item("huge", tokens=200), work_item("small"))
        last = await gateway.ended("small", "huge")
        assert last.error.reason == Reason.REQUEST_TOO_LARGE


async def test_the_state_says_what_runs_here() -> None:
    async with bench(engine=quick_engine(step_ms=10)) as it:
        gateway = await it.gateway()
        ref = it.store.add(make_blob(3, rank=8))
        await it.scheduler.dispatch(work_item("one", adapter=ref, max_tokens=60))
        await gateway.until(lambda: len(gateway.tokens["one"]) > 2)
        state = await _state(it)
        assert state.engine == "simulated quick"
        assert state.pool_blocks == 4096
        assert state.running_requests == 1
        assert state.steps > 2
        assert state.output_tokens > 2
        (adapter,) = state.adapters
        assert (adapter.digest, adapter.rank, adapter.users) == (ref.digest, 8, 1)
        assert adapter.tier == common_pb2.ADAPTER_TIER_DEVICE
        await gateway.ended("one")


async def _state(it: Bench) -> worker_pb2.GetStateResponse:
    stub = it.gateways[0].stub
    state: worker_pb2.GetStateResponse = await stub.GetState(
        worker_pb2.GetStateRequest(), timeout=5
    )
    return state
