"""Attaching, losing the scheduler, draining, and the process as a whole."""

import asyncio
import os
import signal
import sys
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    HistogramDataPoint,
    InMemoryMetricReader,
    MetricsData,
    NumberDataPoint,
)

from calumma.common.v1 import common_pb2
from calumma.worker.v1 import worker_pb2
from services.common.clients import open_channel
from services.common.errors import Reason
from tests.support.worker_peers import (
    SchedulerPeer,
    bench,
    expected_tokens,
    make_blob,
    quick_engine,
    work_item,
)

SERVICE = "calumma.worker.v1.WorkerService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_the_hello_says_what_the_worker_can_hold() -> None:
    async with bench(worker_id="worker-7") as it:
        (hello,) = it.scheduler.hellos
        assert hello.worker_id == "worker-7"
        assert hello.address == it.worker.address
        assert hello.base_model_digest == "sha256:" + "0" * 64
        capacity = hello.capacity
        assert (capacity.pool_blocks, capacity.block_tokens, capacity.block_bytes) == (4096, 8, 512)
        assert (capacity.max_requests, capacity.max_context_tokens) == (32, 512)
        assert hello.status.free_blocks == 4096
        assert not hello.running


async def test_status_comes_when_it_changes_and_not_more_often_than_every_50_ms() -> None:
    async with bench(engine=quick_engine(step_ms=5)) as it:
        gateway = await it.gateway()
        await asyncio.sleep(0.15)
        assert len(it.scheduler.statuses) == 0  # nothing has changed
        loop = asyncio.get_running_loop()
        begin_s = loop.time()
        ref = it.store.add(make_blob(1))
        await it.scheduler.dispatch(work_item("one", max_tokens=80, adapter=ref))
        await gateway.ended("one")
        await it.scheduler.until(
            lambda: (
                bool(it.scheduler.statuses)
                and it.scheduler.statuses[-1].running_requests == 0
                and bool(it.scheduler.statuses[-1].resident)
            )
        )
        elapsed_s = loop.time() - begin_s
        assert any(status.running_requests == 1 for status in it.scheduler.statuses)
        assert len(it.scheduler.statuses) <= elapsed_s / 0.05 + 2
        last = it.scheduler.statuses[-1]
        assert last.free_blocks == 4096  # the idle adapter can be evicted
        assert last.resident[0].users == 0
        assert last.step_s > 0


async def test_a_worker_is_serving_without_a_scheduler() -> None:
    async with bench(attach=False) as it:
        assert await _health(it.worker.address, SERVICE) == SERVING
        assert await _health(it.worker.address, "") == SERVING


async def test_a_scheduler_restart_does_not_disturb_running_requests() -> None:
    async with bench(engine=quick_engine(step_ms=10)) as it:
        gateway = await it.gateway()
        ref = it.store.add(make_blob(1))
        long, short = work_item("long", max_tokens=120, adapter=ref), work_item("short")
        await it.scheduler.dispatch(long, short)
        await gateway.has_tokens("long", 3)
        await it.scheduler.close()
        await gateway.ended("short")  # its report has nobody to go to
        await it.scheduler.listen()
        await it.scheduler.attached(2)
        (running,) = it.scheduler.hellos[1].running
        assert running.attempt.request_id == "long"
        assert running.gateway_id == "gateway-1"
        assert running.adapter_digest == ref.digest
        assert running.generated_tokens > 3
        assert running.context_tokens == 8 + running.generated_tokens
        await gateway.ended("long")
        await it.scheduler.has_finished("long")
        assert gateway.tokens["long"] == expected_tokens(long)
        assert not it.scheduler.finished["short", 1]
        await it.scheduler.dispatch(work_item("after"))
        await gateway.ended("after")


async def test_a_drained_worker_finishes_what_runs_and_sends_the_rest_elsewhere() -> None:
    async with bench(engine=quick_engine(step_ms=4)) as it:
        gateway = await it.gateway()
        item = work_item("running", max_tokens=100)
        await it.scheduler.dispatch(item)
        await gateway.has_tokens("running", 1)
        draining = asyncio.ensure_future(gateway.stub.Drain(worker_pb2.DrainRequest(), timeout=10))
        await it.scheduler.until(lambda: any(status.draining for status in it.scheduler.statuses))
        assert await _health(it.worker.address, SERVICE) == NOT_SERVING
        assert await _health(it.worker.address, "") == SERVING
        await it.scheduler.dispatch(work_item("refused"))
        last = await gateway.ended("refused")
        assert last.error.reason == Reason.WORKER_LOST
        assert (await draining).aborted_requests == 0
        assert gateway.tokens["running"] == expected_tokens(item)


async def test_a_drain_ends_what_is_left_when_its_grace_is_over() -> None:
    async with bench(engine=quick_engine(step_ms=10)) as it:
        gateway = await it.gateway()
        it.store.gate.clear()
        ref = it.store.add(make_blob(1))
        await it.scheduler.dispatch(
            work_item("slow", max_tokens=400), work_item("loading", adapter=ref)
        )
        await gateway.has_tokens("slow", 1)
        grace = duration_pb2.Duration(nanos=100_000_000)
        response = await gateway.stub.Drain(worker_pb2.DrainRequest(grace=grace), timeout=10)
        assert response.aborted_requests == 2
        await gateway.ended("slow", "loading")
        for last in gateway.endings.values():
            assert last.error.reason == Reason.WORKER_LOST
        it.store.gate.set()


async def test_a_drain_with_a_negative_grace_is_refused() -> None:
    async with bench() as it:
        gateway = await it.gateway()
        request = worker_pb2.DrainRequest(grace=duration_pb2.Duration(seconds=-1))
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await gateway.stub.Drain(request, timeout=5)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await it.scheduler.dispatch(work_item("still"))
        await gateway.ended("still")


async def test_a_stop_sends_the_last_frames_and_reports() -> None:
    async with bench(engine=quick_engine(step_ms=4)) as it:
        gateway = await it.gateway()
        item = work_item("last", max_tokens=60)
        await it.scheduler.dispatch(item)
        await gateway.has_tokens("last", 1)
        await it.worker.stop(5.0)
        await gateway.ended("last")
        assert gateway.tokens["last"] == expected_tokens(item)
        finished = await it.scheduler.has_finished("last")
        assert finished.finish_reason == common_pb2.FINISH_REASON_LENGTH


async def test_the_metrics_say_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    meter = MeterProvider(metric_readers=[reader]).get_meter("test")
    monkeypatch.setattr("services.common.telemetry.meter", lambda: meter)
    async with bench() as it:
        gateway = await it.gateway()
        ref = it.store.add(make_blob(1))
        await it.scheduler.dispatch(work_item("one", adapter=ref))
        await gateway.ended("one")
        await it.scheduler.has_finished("one")
        points = {
            (metric.name, *(point.attributes or {}).values()): point
            for resource in _read(reader).resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        }
    assert _value(points["calumma.worker.output_tokens",]) == 20
    assert _value(points["calumma.worker.requests", "running"]) == 0
    assert _value(points["calumma.worker.pool.blocks", "kv"]) == 0
    assert _value(points["calumma.worker.pool.blocks", "adapter"]) > 0
    steps, loads = points["calumma.worker.step.duration",], points[LOADS, "store"]
    assert isinstance(steps, HistogramDataPoint)
    assert steps.count == 20
    assert steps.explicit_bounds[0] == 0.001
    assert isinstance(loads, HistogramDataPoint)
    assert loads.count == 1


def _read(reader: InMemoryMetricReader) -> MetricsData:
    data = reader.get_metrics_data()
    assert data is not None
    return data


def _value(point: object) -> float:
    assert isinstance(point, NumberDataPoint)
    return point.value


LOADS = "calumma.worker.adapter.load.duration"


async def test_a_process_drains_on_sigterm_and_exits_0() -> None:
    scheduler = await SchedulerPeer().listen()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.worker",
        "--listen=127.0.0.1:0",
        f"--scheduler={scheduler.address}",
        "--engine=simulated",
        "--profile=cpu-smollm2",
        "--log-format=json",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        await scheduler.attached()
        await scheduler.dispatch(work_item("one", max_tokens=20))
        await scheduler.until(lambda: scheduler.started["one", 1] == 1)
        process.send_signal(signal.SIGTERM)
        output, _ = await asyncio.wait_for(process.communicate(), 15)
        assert process.returncode == 0, output
        assert b"Traceback" not in output
        assert (await scheduler.has_finished("one")).output_tokens == 20
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await scheduler.close()


async def test_a_process_whose_engine_always_fails_exits_1() -> None:
    scheduler = await SchedulerPeer().listen()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _FAILING,
        "--listen=127.0.0.1:0",
        f"--scheduler={scheduler.address}",
        "--engine=simulated",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        await scheduler.attached()
        for number in range(5):
            await scheduler.dispatch(work_item(f"r{number}"))
            if number < 4:
                await scheduler.has_finished(f"r{number}")
        output, _ = await asyncio.wait_for(process.communicate(), 15)
        assert process.returncode == 1, output
        assert output.count(b"engine_failed") == 1
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await scheduler.close()


_FAILING = """
from services.worker import __main__, service
from tests.support.worker_peers import FaultyEngine, quick_engine

class Failing(FaultyEngine):
    def step(self, items):
        if items[0].sequence_id != "warm-up":
            raise ArithmeticError("on purpose")
        return super().step(items)

service.build_engine = lambda settings: Failing(quick_engine())
__main__.main()
"""


async def test_a_process_without_its_model_says_so_and_exits_2() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.worker",
        "--model=nobody/nothing",
        "--engine=simulated",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 15)
    assert process.returncode == 2
    assert b"calumma model pull" in output
    assert b"Traceback" not in output


async def _health(address: str, service: str) -> int:
    async with open_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        return int((await stub.Check(request, timeout=5)).status)
