"""Token streams that break, lag, move and stay away."""

import asyncio

import grpc

from calumma.common.v1 import common_pb2
from calumma.worker.v1 import worker_pb2
from services.common.errors import Reason, RpcError
from tests.support.worker_peers import bench, expected_tokens, quick_engine, work_item

LENGTH = common_pb2.FINISH_REASON_LENGTH


async def test_a_broken_stream_resumes_without_gap_or_duplicate() -> None:
    async with bench(engine=quick_engine(step_ms=4)) as it:
        gateway = await it.gateway()
        item = work_item("one", max_tokens=120)
        await it.scheduler.dispatch(item)
        for seen in (5, 30, 60):
            await gateway.has_tokens("one", seen)
            await gateway.break_stream()
            await asyncio.sleep(0.02)  # tokens that nobody reads
            await gateway.open([("one", len(gateway.tokens["one"]))])
        await gateway.ended("one")
        assert gateway.tokens["one"] == expected_tokens(item)
        assert gateway.repeated == 0
        assert gateway.ending_frames["one"] == 1


async def test_a_request_that_ended_while_the_stream_was_down_is_sent_again() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        item = work_item("one")
        await it.scheduler.dispatch(item)
        await gateway.has_tokens("one", 1)
        await gateway.break_stream()
        await it.scheduler.has_finished("one")
        await gateway.open([("one", len(gateway.tokens["one"]))])
        last = await gateway.ended("one")
        assert last.finish_reason == LENGTH
        assert gateway.tokens["one"] == expected_tokens(item)


async def test_an_unnamed_request_is_sent_again_from_its_start() -> None:
    async with bench(engine=quick_engine(step_ms=4)) as it:
        gateway = await it.gateway()
        item = work_item("one", max_tokens=60)
        await it.scheduler.dispatch(item)
        await gateway.has_tokens("one", 3)
        await gateway.break_stream()
        await gateway.open()
        await gateway.ended("one")
        assert gateway.repeated >= 3
        assert gateway.tokens["one"] == expected_tokens(item)


async def test_an_unknown_request_is_reported_lost() -> None:
    async with bench() as it:
        gateway = await it.gateway(opens=False)
        await gateway.open([("never-heard-of", 3)])
        last = await gateway.ended("never-heard-of")
        assert last.error.reason == Reason.WORKER_LOST


async def test_a_newer_stream_of_a_gateway_replaces_the_older() -> None:
    async with bench(engine=quick_engine(step_ms=4)) as it:
        older, newer = await it.gateway(), await it.gateway()
        await older.until(lambda: older.error is not None)
        assert older.error is not None
        assert older.error.code() is grpc.StatusCode.ABORTED
        await it.scheduler.dispatch(work_item("one"))
        await newer.ended("one")
        assert not older.frames


async def test_a_slow_reader_gets_fewer_and_larger_frames_and_slows_nobody() -> None:
    async with bench(engine=quick_engine(step_ms=1), max_message_bytes=2**20) as it:
        slow = await it.gateway(opens=False)
        quick = await it.gateway("gateway-2")
        await slow.open(reads=False)
        names = [f"slow-{i}" for i in range(30)]
        items = [work_item(name, max_tokens=500) for name in names]
        for item in items:
            item.logprobs = 1  # bulk, so that flow control stops the stream
        await it.scheduler.dispatch(*items)
        await it.scheduler.dispatch(work_item("other", gateway_id="gateway-2"))
        await quick.ended("other")
        for name in names:
            await it.scheduler.has_finished(name)
        slow.read()
        await slow.ended(*names)
        for item in items:
            assert slow.tokens[item.request_id] == expected_tokens(item)[:500]
        assert len(slow.frames) < 400
        assert max(len(part.token_ids) for frame in slow.frames for part in frame.requests) > 50
        assert slow.repeated == 0


async def test_a_gateway_that_stays_away_has_its_requests_ended() -> None:
    async with bench(engine=quick_engine(step_ms=4), gateway_away_s=0.2) as it:
        gateway, other = await it.gateway(), await it.gateway("gateway-2")
        stays = work_item("stays", gateway_id="gateway-2", max_tokens=120)
        await it.scheduler.dispatch(work_item("left", max_tokens=400), stays)
        await gateway.has_tokens("left", 1)
        await gateway.break_stream()
        finished = await it.scheduler.has_finished("left")
        assert finished.output_tokens < 400
        await gateway.open([("left", len(gateway.tokens["left"]))])
        last = await gateway.ended("left")
        assert last.error.reason == Reason.WORKER_LOST  # so that it submits again
        await other.ended("stays")
        assert other.tokens["stays"] == expected_tokens(stays)


async def test_a_gateway_that_comes_back_in_time_loses_nothing() -> None:
    async with bench(engine=quick_engine(step_ms=4), gateway_away_s=0.3) as it:
        gateway = await it.gateway()
        item = work_item("kept", max_tokens=150)
        await it.scheduler.dispatch(item)
        for _ in range(3):
            await gateway.until(lambda: bool(gateway.tokens["kept"]))
            await gateway.break_stream()
            await asyncio.sleep(0.1)
            await gateway.open([("kept", len(gateway.tokens["kept"]))])
        assert (await gateway.ended("kept")).finish_reason == LENGTH
        assert gateway.tokens["kept"] == expected_tokens(item)


async def test_a_reader_that_stalls_and_breaks_is_noticed() -> None:
    async with bench(engine=quick_engine(step_ms=4), gateway_away_s=0.2) as it:
        gateway = await it.gateway(opens=False)
        await gateway.open(reads=False)
        items = [work_item(f"r{i}", max_tokens=500) for i in range(30)]
        for item in items:
            item.logprobs = 1
        await it.scheduler.dispatch(*items)
        await asyncio.sleep(0.5)  # by now its stream is full
        await gateway.break_stream()
        for item in items:
            finished = await it.scheduler.has_finished(item.request_id)
            assert finished.output_tokens < 500


async def test_a_stream_without_a_gateway_id_is_refused() -> None:
    async with bench() as it:
        gateway = await it.gateway(opens=False)
        call = gateway.stub.StreamTokens(worker_pb2.StreamTokensRequest())
        try:
            async for _ in call:
                raise AssertionError
        except grpc.aio.AioRpcError as error:
            refusal = RpcError.from_rpc(error)
            assert refusal is not None
            assert refusal.context.field == "gateway_id"
