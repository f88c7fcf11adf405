"""The driver and the performer around a real core, with links whose messages the test reads."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from calumma.scheduler.v1 import scheduler_pb2
from services.common import telemetry
from services.core import events
from services.core.config import ClusterConfig
from services.core.costs import StepCosts
from services.core.types import AdapterDigest, Attempt, Capacity, GatewayId, RequestId, WorkerId
from services.scheduler import metrics, wire
from services.scheduler.driver import Driver
from services.scheduler.journal import CoreRecipe, Journal, read_event, replay
from services.scheduler.links import Links
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.performer import Performer
from tests.support.scheduler_peers import work_item

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
TRACEPARENT = f"00-{TRACE_ID:032x}-b7ad6b7169203331-01"
WORKER = WorkerId("worker-1")


class Wiretap(Links[Any]):
    """Links that keep what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, Any]] = []

    def send(self, peer_id: str, message: Any) -> None:
        self.sent.append((peer_id, message))

    def kinds(self) -> list[str]:
        return [message.WhichOneof("message") for _, message in self.sent]


class Stage:
    """A driver that runs, and both ends of its performer."""

    def __init__(self, *, journal: Journal | None = None) -> None:
        self.gateways, self.workers = Wiretap(), Wiretap()
        self.failures = 0
        self.performer = Performer(
            self.gateways, self.workers, policy="fifo", metrics=SchedulerMetrics()
        )
        recipe = CoreRecipe("fifo", ClusterConfig(prefetch_depth=0, prefill_ahead_s=math.inf))
        self.driver = Driver(recipe, self.performer, journal=journal, on_failure=self._fail)

    def submit(self, item: scheduler_pb2.WorkItem) -> None:
        request = wire.to_request(item, now=time.monotonic())

        def admit() -> bool:
            self.performer.keep(request, item, now=request.arrived_s)
            return True

        self.driver.post(events.RequestSubmitted(request), admit=admit)

    def attach(self, *, pool_blocks: int = 10**6) -> None:
        capacity = Capacity(pool_blocks, 65536, 16, 1000, 10**6)
        self.driver.post(events.WorkerAttached(WORKER, capacity, (), (), draining=False))

    def _fail(self) -> None:
        self.failures += 1


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    return exporter


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> InMemoryMetricReader:
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    monkeypatch.setattr(telemetry, "meter", lambda: provider.get_meter("test"))
    return reader


@pytest.fixture
async def stage(spans: InMemorySpanExporter, reader: InMemoryMetricReader) -> AsyncIterator[Stage]:
    stage = Stage()
    task = asyncio.create_task(stage.driver.run())
    yield stage
    task.cancel()


async def test_the_payload_leaves_with_the_dispatch(stage: Stage) -> None:
    stage.submit(work_item("r.1"))
    await until(lambda: len(stage.performer) == 1)
    stage.attach()
    await until(lambda: stage.workers.kinds() == ["dispatch"])
    assert len(stage.performer) == 0


async def test_the_payload_of_a_cancelled_or_known_request_is_let_go(stage: Stage) -> None:
    stage.submit(work_item("r.1"))
    stage.driver.post(events.RequestCancelled(Attempt(RequestId("r.1")), "client_cancelled"))
    await until(lambda: not stage.driver.snapshot().queued)
    assert len(stage.performer) == 0
    stage.attach()
    stage.submit(work_item("r.2"))
    await until(lambda: stage.workers.kinds() == ["dispatch"])
    stage.submit(work_item("r.2"))  # at its worker already
    await until(lambda: stage.driver.is_idle() or len(stage.performer) == 0)
    assert len(stage.performer) == 0
    assert stage.workers.kinds() == ["dispatch"]


async def test_long_dispatches_are_split_over_messages(stage: Stage) -> None:
    for number in range(6):
        stage.submit(work_item(f"r.{number}", tokens=90_000))
    stage.attach()
    await until(lambda: len(stage.workers.sent) == 2)
    assert [len(message.dispatch.items) for _, message in stage.workers.sent] == [3, 3]


async def test_an_abort_does_not_overtake_its_dispatch(stage: Stage) -> None:
    stage.attach()
    stage.submit(work_item("r.1"))
    stage.driver.post(events.RequestCancelled(Attempt(RequestId("r.1")), "client_cancelled"))
    stage.submit(work_item("r.2"))
    await until(lambda: len(stage.workers.sent) == 3)
    assert stage.workers.kinds() == ["dispatch", "abort", "dispatch"]


async def test_the_queue_span_joins_the_requests_trace(
    stage: Stage, spans: InMemorySpanExporter
) -> None:
    stage.submit(work_item("r.1", traceparent=TRACEPARENT))
    await asyncio.sleep(0.03)
    stage.attach()
    await until(lambda: len(spans.get_finished_spans()) == 1)
    (span,) = spans.get_finished_spans()
    assert span.name == "queue"
    assert span.context is not None
    assert span.context.trace_id == TRACE_ID
    assert span.attributes is not None
    assert span.attributes["calumma.policy"] == "fifo"
    assert span.attributes["calumma.worker_id"] == WORKER
    assert span.attributes["calumma.queue"] == "fifo"
    assert span.attributes["calumma.waited_for"] == "no_worker"
    assert span.attributes["sched.predicted_output_tokens"] == 32
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.end_time - span.start_time >= 0.03e9


async def test_the_span_of_a_rejected_request_has_failed(
    stage: Stage, spans: InMemorySpanExporter
) -> None:
    stage.submit(work_item("r.1", traceparent=TRACEPARENT, time_left_s=0.01))
    await until(lambda: len(spans.get_finished_spans()) == 1)
    (span,) = spans.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "DEADLINE_EXCEEDED"


async def test_what_happens_is_counted(stage: Stage, reader: InMemoryMetricReader) -> None:
    stage.submit(work_item("r.1", time_left_s=0.01))
    await until(lambda: stage.gateways.kinds() == ["rejected"])
    stage.attach()
    stage.submit(work_item("r.2"))
    await until(lambda: stage.gateways.kinds() == ["rejected", "placed"])
    points = points_of(reader)
    assert points[metrics.DISPATCHES].value == 1
    assert points[metrics.DISPATCHES].attributes == {
        "calumma.queue": "fifo",
        "calumma.waited_for": "nothing",
    }
    assert points[metrics.QUEUE_DURATION].count == 1
    assert points[metrics.REJECTIONS].value == 1
    assert points[metrics.REJECTIONS].attributes == {"calumma.reason": "DEADLINE_EXCEEDED"}


def test_the_gauges_show_what_they_were_told(reader: InMemoryMetricReader) -> None:
    SchedulerMetrics().observe({"level-0": 7}, workers=3)
    points = points_of(reader)
    assert points[metrics.QUEUE_LENGTH].value == 7
    assert points[metrics.QUEUE_LENGTH].attributes == {"calumma.queue": "level-0"}
    assert points[metrics.WORKERS].value == 3


def points_of(reader: InMemoryMetricReader) -> dict[str, Any]:
    """The one data point of each metric."""
    data = reader.get_metrics_data()
    assert data is not None
    scope = data.resource_metrics[0].scope_metrics[0]
    return {metric.name: metric.data.data_points[0] for metric in scope.metrics}


async def test_a_failing_core_is_replaced_by_a_fresh_one(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.submit(work_item("r.1"))
    await until(lambda: len(stage.performer) == 1)
    with monkeypatch.context() as patch:
        broken = partial(_break, "the core has a bug")
        patch.setattr("services.core.cluster.ClusterScheduler.handle", broken)
        stage.attach()
        await until(lambda: stage.failures == 1)
    assert len(stage.performer) == 0
    assert not stage.driver.snapshot().queued
    stage.attach()
    stage.submit(work_item("r.1"))
    await until(lambda: stage.workers.kinds() == ["dispatch"])


def _break(message: str, *_: object, **__: object) -> None:
    raise AssertionError(message)


async def test_events_of_unknown_peers_change_nothing(stage: Stage) -> None:
    nobody = WorkerId("nobody")
    stage.driver.post(events.WorkerDetached(nobody))
    stage.driver.post(events.GatewayDetached(GatewayId("nobody")))
    stage.driver.post(events.RequestStarted(nobody, Attempt(RequestId("r.1"))))
    stage.driver.post(events.RequestFinished(nobody, Attempt(RequestId("r.1")), 1))
    stage.driver.post(events.WorkerReported(nobody, (), draining=True))
    stage.driver.post(events.RequestCancelled(Attempt(RequestId("r.1")), "deadline"))
    stage.attach()
    stage.submit(work_item("r.2"))
    await until(lambda: stage.workers.kinds() == ["dispatch"])
    assert stage.failures == 0


async def test_a_full_inbox_holds_its_writers_back(stage: Stage) -> None:
    driver = Driver(
        CoreRecipe("fifo", ClusterConfig()),
        stage.performer,
        journal=None,
        on_failure=lambda: None,
        inbox_events_max=2,
    )
    for number in range(2):
        driver.post(events.GatewayDetached(GatewayId(f"gateway-{number}")))
    waiting = asyncio.create_task(driver.room())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    running = asyncio.create_task(driver.run())
    await asyncio.wait_for(waiting, 5)
    running.cancel()


async def test_recorded_runs_decide_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for _ in range(2):  # a second run is appended to the first
        journal = Journal(path, size_bytes_max=2**20)
        stage = Stage(journal=journal)
        task = asyncio.create_task(stage.driver.run())
        stage.attach()
        stage.submit(work_item("r.1", adapter=2, time_left_s=9))
        stage.submit(work_item("r.2", tokens=10**7))
        await until(lambda stage=stage: len(stage.gateways.sent) == 2)  # type: ignore[misc]
        task.cancel()
        journal.close()
    steps = list(replay(path))
    kinds = [type(decision).__name__ for step in steps for decision in step.decisions]
    assert kinds == ["Dispatch", "Reject"] * 2
    assert all(step.recorded is not None and step.is_same for step in steps)


async def test_another_decision_than_the_recorded_one_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    journal = Journal(path, size_bytes_max=2**20)
    stage = Stage(journal=journal)
    task = asyncio.create_task(stage.driver.run())
    stage.attach()
    stage.submit(work_item("r.1"))
    await until(lambda: "dispatch" in stage.workers.kinds())
    task.cancel()
    journal.close()
    path.write_text(path.read_text().replace('["Dispatch",', '["Elsewhere",'))
    assert [step.is_same for step in replay(path)].count(False) == 1


def test_every_event_survives_the_journal(tmp_path: Path) -> None:
    attempt = Attempt(RequestId("r.1"), 2)
    resident = (events.ResidentAdapter(AdapterDigest("sha256:1"), 3, 1),)
    running = events.RunningRequest(attempt, GatewayId("g"), None, 10, 5)
    told: list[events.ClusterEvent] = [
        events.RequestSubmitted(wire.to_request(work_item("r.1", adapter=1), now=0.1 + 0.2)),
        events.RequestCancelled(attempt, "deadline"),
        events.GatewayAttached(GatewayId("g"), ((attempt, WORKER),)),
        events.GatewayDetached(GatewayId("g")),
        events.WorkerAttached(
            WORKER, Capacity(1, 2, 3, 4, 5), (running,), resident, draining=False
        ),
        events.WorkerReported(WORKER, resident, draining=True, costs=StepCosts(step_s=0.01)),
        events.WorkerReported(WORKER, resident, draining=False),
        events.WorkerDetached(WORKER),
        events.RequestStarted(WORKER, attempt),
        events.RequestPrefilled(WORKER, attempt),
        events.RequestFinished(WORKER, attempt, 7),
    ]
    path = tmp_path / "events.jsonl"
    journal = Journal(path, size_bytes_max=2**20)
    for event in told:
        journal.append(1.5, event)
    journal.append(2.5, None)
    journal.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [read_event(line) for line in lines] == [*told, None]


def test_a_journal_ends_at_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    journal = Journal(path, size_bytes_max=200)
    for _ in range(100):
        journal.append(1.0, events.WorkerDetached(WORKER))
    journal.close()
    assert 200 <= path.stat().st_size < 400
    with pytest.raises(ValueError, match="does not begin with a run"):
        list(replay(path))
