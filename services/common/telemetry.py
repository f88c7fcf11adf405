"""Traces and metrics: OpenTelemetry, exported over OTLP when the environment names an endpoint.

Owns the set-up of both providers, the names and buckets of the metrics that clients rely on
(OpenTelemetry GenAI and RPC conventions), and the few helpers for spans whose start and end are
known only afterwards. W3C `traceparent` is the form in which a trace crosses processes.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

Attributes = Mapping[str, AttributeValue]

SCOPE: Final = "calumma"
REQUEST_DURATION: Final = "gen_ai.server.request.duration"
TIME_TO_FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"
TIME_PER_OUTPUT_TOKEN: Final = "gen_ai.server.time_per_output_token"
TOKEN_USAGE: Final = "gen_ai.client.token.usage"
RPC_DURATION: Final = "rpc.server.call.duration"

# Bucket bounds as the semantic conventions give them.
_BUCKETS: Final[dict[str, Sequence[float]]] = {
    REQUEST_DURATION: [0.01 * 2**i for i in range(14)],
    TIME_TO_FIRST_TOKEN: [
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
    ],
    TIME_PER_OUTPUT_TOKEN: [
        0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5,
    ],
    TOKEN_USAGE: [4.0**i for i in range(14)],
    RPC_DURATION: [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10],
}  # fmt: skip

_propagator = TraceContextTextMapPropagator()


def setup_telemetry(service: str, *, instance: str) -> Callable[[], None]:
    """Install the providers of this process. Returns the function that flushes and ends them.

    Without `OTEL_EXPORTER_OTLP_ENDPOINT` (or its per-signal forms) nothing is exported; spans still
    exist, so that logs carry trace ids. `OTEL_SDK_DISABLED=true` switches all of it off.
    """
    resource = Resource.create(
        {"service.name": f"calumma-{service}", "service.instance.id": instance}
    )
    tracing = TracerProvider(resource=resource)
    if _exports("TRACES"):
        tracing.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    readers = [PeriodicExportingMetricReader(OTLPMetricExporter())] if _exports("METRICS") else []
    views = [
        View(instrument_name=name, aggregation=ExplicitBucketHistogramAggregation(bounds))
        for name, bounds in _BUCKETS.items()
    ]
    metering = MeterProvider(resource=resource, metric_readers=readers, views=views)
    trace.set_tracer_provider(tracing)
    metrics.set_meter_provider(metering)

    def shutdown() -> None:
        tracing.shutdown()
        metering.shutdown()

    return shutdown


def tracer() -> trace.Tracer:
    """The tracer of this suite."""
    return trace.get_tracer(SCOPE)


def meter() -> metrics.Meter:
    """The meter of this suite."""
    return metrics.get_meter(SCOPE)


def traceparent(span: Span | None = None) -> str:
    """W3C form of `span` (default: the current one). Empty when there is none."""
    carrier: dict[str, str] = {}
    context = trace.set_span_in_context(span) if span is not None else None
    _propagator.inject(carrier, context=context)
    return carrier.get("traceparent", "")


def context_from(traceparent_header: str) -> Context:
    """The context of a remote span. Malformed or empty: a new trace."""
    return _propagator.extract({"traceparent": traceparent_header}, context=Context())


def call_metadata() -> tuple[tuple[str, str], ...]:
    """What an outgoing call carries so that its server's span joins the trace."""
    header = traceparent()
    return (("traceparent", header),) if header else ()


def record_span(
    name: str,
    *,
    parent: Context,
    start_s: float,
    end_s: float,
    attributes: Attributes | None = None,
    error: str | None = None,
) -> None:
    """Record a span after the fact. Times are `time.monotonic()` seconds of this process."""
    offset_ns = time.time_ns() - time.monotonic_ns()
    span = tracer().start_span(
        name,
        context=parent,
        kind=SpanKind.INTERNAL,
        attributes=attributes,
        start_time=int(start_s * 1e9) + offset_ns,
    )
    if error is not None:
        span.set_status(Status(StatusCode.ERROR, error))
    span.end(int(end_s * 1e9) + offset_ns)


def _exports(signal: str) -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    return any(os.environ.get(name) for name in names)
