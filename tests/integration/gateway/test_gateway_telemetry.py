"""What a request leaves behind: spans, metrics and one log line."""

from typing import Any

import pytest
import structlog
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from calumma.common.v1 import common_pb2
from services.common import telemetry
from services.common.errors import Reason, RpcError
from services.gateway.observation import ADAPTER_REQUESTS
from services.gateway.service import SERVICE
from tests.support.gateway_peers import (
    until,
)
from tests.support.gateway_suite import Suite

STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    return exporter


@pytest.fixture
def metric_reader(monkeypatch: pytest.MonkeyPatch) -> InMemoryMetricReader:
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    monkeypatch.setattr(telemetry, "meter", lambda: provider.get_meter("test"))
    return reader


async def test_a_request_leaves_a_trace_metrics_and_one_log_line(
    suite: Suite, spans: InMemorySpanExporter, metric_reader: InMemoryMetricReader
) -> None:
    ref = suite.store.publish("poet")
    await suite.start()
    with structlog.testing.capture_logs() as logs:
        reader = suite.stream("secret prompt", request_id="r7", adapter="poet")
        item = await suite.scheduler.next_item()
        suite.scheduler.place(item, suite.worker, queue="small", waited_for="memory")
        suite.worker.send(item, 0, "secret answer", finish=STOP)
        await reader.read_all()
        await until(lambda: any(line["event"] == "rpc" for line in logs))

    by_name: dict[str, Any] = {span.name: span for span in spans.get_finished_spans()}
    server = by_name[f"{SERVICE}/GenerateStream"]
    request = by_name[f"text_completion {suite.model.name}"]
    stream = by_name["stream"]
    assert request.parent.span_id == server.context.span_id
    assert stream.parent.span_id == request.context.span_id
    _, trace_id, span_id, _ = item.traceparent.split("-")
    assert trace_id == f"{server.context.trace_id:032x}"
    assert span_id == f"{request.context.span_id:016x}"
    assert request.attributes["gen_ai.usage.output_tokens"] == 13
    assert request.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert request.attributes["lora.adapter.digest"] == ref.digest
    assert request.attributes["calumma.queue"] == "small"
    assert request.attributes["calumma.waited_for"] == "memory"

    data: Any = metric_reader.get_metrics_data()
    metrics = {
        metric.name: metric.data.data_points
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    assert metrics[telemetry.REQUEST_DURATION][0].count == 1
    assert metrics[telemetry.TIME_TO_FIRST_TOKEN][0].count == 1
    assert metrics[telemetry.TIME_PER_OUTPUT_TOKEN][0].count == 1
    usage = {p.attributes["gen_ai.token.type"]: p.sum for p in metrics[telemetry.TOKEN_USAGE]}
    assert usage == {"input": 13, "output": 13}
    (popular,) = metrics.pop(ADAPTER_REQUESTS)
    assert (popular.value, dict(popular.attributes)) == (1, {"adapter": "poet", "tier": "unknown"})
    assert "poet" not in str(metrics)

    (line,) = (line for line in logs if line["event"] == "rpc" and "request_id" in line)
    assert line["request_id"] == "r7"
    assert (line["adapter"], line["adapter_digest"]) == ("poet", ref.digest)
    assert (line["prompt_tokens"], line["output_tokens"]) == (13, 13)
    assert (line["finish_reason"], line["code"]) == ("stop", "OK")
    assert 0 < line["ttft_s"] <= line["duration_s"]
    assert "secret" not in str(logs)


async def test_a_failed_request_is_an_error_in_trace_and_metrics(
    suite: Suite, spans: InMemorySpanExporter, metric_reader: InMemoryMetricReader
) -> None:
    await suite.start()
    reader = suite.stream("go")
    suite.scheduler.reject(await suite.scheduler.next_item(), RpcError(Reason.QUEUE_FULL, "full"))
    await reader.error()
    name = f"text_completion {suite.model.name}"
    await until(lambda: any(span.name == name for span in spans.get_finished_spans()))
    span: Any = next(span for span in spans.get_finished_spans() if span.name == name)
    assert span.attributes["error.type"] == "QUEUE_FULL"
    assert not span.status.is_ok
    data: Any = metric_reader.get_metrics_data()
    assert "QUEUE_FULL" in data.to_json()
