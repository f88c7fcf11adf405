"""One request, one trace: what four processes export over real OTLP for a cold adapter."""

import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from bench.suite import Suite
from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.common.base_model import DEFAULT_MODEL, linear_shapes, load_config
from tests.support.otlp import OtlpReceiver, ReceivedSpan
from tests.support.peft_folders import write_peft_folder

pytestmark = pytest.mark.model
STAGES = {"queue", "adapter_load", "prefill", "decode", "stream"}
DOWNLOAD = "calumma.adapter_store.v1.AdapterStoreService/Download"
GENERATE = "calumma.gateway.v1.InferenceService/Generate"


@pytest.fixture
def cold_adapter(suite: Suite, model_folder: Path, tmp_path: Path) -> str:
    """An adapter that no worker has seen."""
    config = load_config(model_folder)
    write_peft_folder(
        tmp_path / "cold",
        shapes=linear_shapes(config),
        num_layers=config.num_layers,
        rank=8,
        alpha=8,
        target_modules=["q_proj", "v_proj"],
        base_model=DEFAULT_MODEL,
    )
    address = str(suite.endpoints["adapter_store"])
    publish = ["adapters", "publish", str(tmp_path / "cold"), "--name", "cold"]
    subprocess.run(
        [sys.executable, "-m", "services.cli", "--adapter-store", address, *publish],
        check=True,
        capture_output=True,
    )
    return "cold"


def test_a_cold_request_is_one_tree_of_spans_over_four_services(
    cold_adapter: str, otlp: OtlpReceiver, channel: grpc.Channel
) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    stub = gateway_pb2_grpc.InferenceServiceStub(channel)

    response = stub.Generate(
        gateway_pb2.GenerateRequest(
            prompt="Hello",
            adapter=cold_adapter,
            stopping=common_pb2.StopConditions(max_tokens=4, ignore_eos=True),
        ),
        timeout=60,
        metadata=(("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"),),
    )

    expected = {*STAGES, DOWNLOAD, GENERATE}
    otlp.wait_for(lambda o: {s.name for s in _of(o, trace_id)} >= expected, timeout_s=15)
    spans = _of(otlp, trace_id)
    by_name = {span.name: span for span in spans}
    assert {span.service for span in spans} == {
        "calumma-gateway",
        "calumma-scheduler",
        "calumma-worker",
        "calumma-adapter_store",
    }
    root = by_name[GENERATE]
    assert root.parent_id == "b7ad6b7169203331"
    generation = next(span for span in spans if span.name.startswith("text_completion "))
    assert generation.parent_id == root.span_id
    assert generation.attributes["gen_ai.usage.output_tokens"] == 4
    for stage in STAGES:
        assert by_name[stage].parent_id == generation.span_id, stage
        assert root.start_ns <= by_name[stage].start_ns <= by_name[stage].end_ns, stage
    download = by_name[DOWNLOAD]
    assert _ancestors(download, spans) >= {by_name["adapter_load"].span_id}
    assert by_name["adapter_load"].attributes["lora.adapter.digest"] == response.adapter.digest
    assert by_name["adapter_load"].attributes["lora.adapter.cache_tier"] == "store"
    order = [by_name[name].start_ns for name in ("queue", "adapter_load", "prefill", "decode")]
    assert order == sorted(order)
    timings = response.completion.timings
    assert timings.adapter_tier == common_pb2.ADAPTER_TIER_STORE
    assert timings.HasField("queue_s")
    assert timings.HasField("prefill_s")


def test_the_standard_metrics_are_exported(
    suite: Suite, otlp: OtlpReceiver, channel: grpc.Channel
) -> None:
    stub = gateway_pb2_grpc.InferenceServiceStub(channel)
    stopping = common_pb2.StopConditions(max_tokens=3, ignore_eos=True)
    stub.Generate(gateway_pb2.GenerateRequest(prompt="Hi", stopping=stopping), timeout=60)
    expected = {
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
        "gen_ai.client.token.usage",
        "rpc.server.call.duration",
        "calumma.scheduler.queue.length",
        "calumma.worker.pool.blocks",
        "calumma.worker.step.duration",
    }

    otlp.wait_for(lambda o: expected <= o.metric_names, timeout_s=15)

    assert expected <= otlp.metric_names


def test_each_rpc_leaves_one_canonical_log_line_without_text(
    suite: Suite, channel: grpc.Channel
) -> None:
    stub = gateway_pb2_grpc.InferenceServiceStub(channel)
    secret = "the quick brown secret"
    stopping = common_pb2.StopConditions(max_tokens=3)
    before = len(suite.events)
    stub.Generate(
        gateway_pb2.GenerateRequest(prompt=secret, request_id="log-line-1", stopping=stopping),
        timeout=60,
    )

    suite.wait_for(lambda e: e.get("request_id") == "log-line-1", 10, after=before)

    lines = [
        event
        for event in suite.events[before:]
        if event.get("event") == "rpc" and event.get("request_id") == "log-line-1"
    ]
    assert len(lines) == 1
    assert lines[0]["code"] == "OK"
    assert lines[0]["output_tokens"] == 3
    assert not [event for event in suite.events if secret in str(event)]


def _of(otlp: OtlpReceiver, trace_id: str) -> list[ReceivedSpan]:
    return [span for span in otlp.spans if span.trace_id == trace_id]


def _ancestors(span: ReceivedSpan, spans: list[ReceivedSpan]) -> set[str]:
    parents = {s.span_id: s.parent_id for s in spans}
    found, current = set(), span.parent_id
    while current in parents:
        found.add(current)
        current = parents[current]
    return found
