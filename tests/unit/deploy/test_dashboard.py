"""The dashboard asks for metrics and labels that services export, as Prometheus names them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import Gauge, Histogram, InMemoryMetricReader, Metric
from opentelemetry.trace import INVALID_SPAN

from services.common import interceptors, telemetry
from services.core.snapshots import ReplicaSnapshot
from services.gateway.observation import Instruments
from services.scheduler.metrics import SchedulerMetrics
from services.worker.measures import LoadStages, Measures
from services.worker.outputs import Tier

GRAFANA = Path(__file__).parents[3] / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "calumma.json").read_text())
TARGETS: list[dict[str, str]] = [
    target for panel in DASHBOARD["panels"] for target in panel["targets"]
]
OF_THE_RESOURCE = {"service_instance_id", "service_name"}  # copied to each metric by the collector


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[str]]]:
    """Labels of each exported series: every instrument of the suite, used once."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(telemetry, "meter", lambda: provider.get_meter("test"))
    measures, scheduler = Measures(), SchedulerMetrics()
    gateway, interceptor = Instruments("model"), interceptors.ServerInterceptor()
    measures.record_step(0.1, tokens=1)
    measures.record_load(LoadStages(0.1, 0.2, 0.3), Tier.STORE, 1)
    measures.show(ReplicaSnapshot(1, 1, 1, 0, 0, 0, ()))
    scheduler.observe({"0": 1}, workers=1)
    scheduler.queue_duration.record(0.1)
    for histogram in (gateway._duration, gateway._first, gateway._per_token, gateway._usage):
        histogram.record(0.1, {"gen_ai.request.model": "model"})
    interceptor._end(interceptors._Call("/service/Method", INVALID_SPAN, "peer"), {})
    data = reader.get_metrics_data()
    assert data is not None
    yield {
        name: {
            key.replace(".", "_")
            for point in metric.data.data_points
            for key in point.attributes or ()
        }
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for name in _series(metric)
    }
    provider.shutdown()


def _series(metric: Metric) -> list[str]:
    """The names under which the collector's Prometheus exporter shows a metric."""
    name = metric.name.replace(".", "_") + {"s": "_seconds"}.get(metric.unit or "", "")
    match metric.data:
        case Histogram():
            return [f"{name}_bucket", f"{name}_count", f"{name}_sum"]
        case Gauge():
            return [name]
        case _:
            return [f"{name}_total"]


def _shown(expression: str) -> str:
    """The one metric of an expression; labels of the same form stand in lists."""
    (name,) = re.findall(
        r"\b(?:calumma|gen_ai|rpc)_\w+(?=\[|\)|$)", re.sub(r"by \(.*?\)", "", expression)
    )
    return str(name)


@pytest.mark.parametrize("expression", [target["expr"] for target in TARGETS])
def test_a_panel_shows_a_metric_that_is_exported(
    expression: str, exported: dict[str, set[str]]
) -> None:
    assert _shown(expression) in exported


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target["legendFormat"])
def test_a_panel_groups_by_labels_that_the_metric_has(
    target: dict[str, str], exported: dict[str, set[str]]
) -> None:
    grouped = {
        label.strip()
        for labels in re.findall(r"by \(([^)]*)\)", target["expr"])
        for label in labels.split(",")
    }
    legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    assert grouped | legend <= exported[_shown(target["expr"])] | OF_THE_RESOURCE | {"le"}


def test_the_dashboard_reads_from_a_data_source_that_is_provisioned() -> None:
    provisioned = (GRAFANA / "provisioning" / "datasources" / "prometheus.yaml").read_text()
    for panel in DASHBOARD["panels"]:
        assert f"uid: {panel['datasource']['uid']}," in provisioned
