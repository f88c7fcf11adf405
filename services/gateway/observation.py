"""What one request leaves behind: a GenAI span with a "stream" span, metrics, the log annotations.

Metrics carry the base model only, so that adapters, of which there are thousands, can't multiply
series; one counter names the few adapters that most requests are for. Spans and the canonical log
line name the adapter. Never a prompt or a completion.
"""

import time
from collections.abc import Iterable
from typing import Final

from opentelemetry import metrics, trace
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from services.common import telemetry
from services.common.errors import Reason, RpcError
from services.common.interceptors import annotate
from services.gateway import wire
from services.gateway.popularity import PopularAdapters
from services.gateway.requests import OwnedRequest, Placement
from services.gateway.types import AdapterRef, ChatPrompt, GenerateSpec

PROVIDER: Final = "calumma"
ADAPTER_REQUESTS: Final = "calumma.gateway.adapter.requests"


class Instruments:
    """The GenAI metrics of this gateway."""

    def __init__(self, model: str) -> None:
        meter = telemetry.meter()
        self.model = model
        self._duration = meter.create_histogram(
            telemetry.REQUEST_DURATION, unit="s", description="From receipt to the last token"
        )
        self._first = meter.create_histogram(
            telemetry.TIME_TO_FIRST_TOKEN, unit="s", description="From receipt to the first token"
        )
        self._per_token = meter.create_histogram(
            telemetry.TIME_PER_OUTPUT_TOKEN, unit="s", description="Between tokens after the first"
        )
        self._usage = meter.create_histogram(
            telemetry.TOKEN_USAGE, unit="{token}", description="Tokens of a request"
        )
        self._adapters = PopularAdapters()
        meter.create_observable_counter(
            ADAPTER_REQUESTS,
            callbacks=[self._observe_adapters],
            unit="{request}",
            description="Admitted requests by adapter, the less popular ones together, and by the "
            "tier in which their adapter was",
        )

    def record(
        self,
        operation: str,
        request: OwnedRequest | None,
        *,
        duration_s: float,
        error_type: str | None,
    ) -> None:
        """One request has ended. `request` is None when it was not admitted."""
        labels: dict[str, AttributeValue] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": self.model,
            "gen_ai.response.model": self.model,
        }
        failed = labels if error_type is None else {**labels, "error.type": error_type}
        self._duration.record(duration_s, failed)
        if request is None:
            return
        if (adapter := request.admitted.adapter) is not None:
            self._adapters.add(adapter.name, wire.tier_name(request.stages.adapter_tier))
        self._usage.record(
            len(request.admitted.prompt_token_ids), {**labels, "gen_ai.token.type": "input"}
        )
        self._usage.record(len(request.output), {**labels, "gen_ai.token.type": "output"})
        if request.time_to_first_token_s is None:
            return
        self._first.record(request.time_to_first_token_s, labels)
        if len(request.output) > 1 and error_type is None:
            rest_s = duration_s - request.time_to_first_token_s
            self._per_token.record(rest_s / (len(request.output) - 1), labels)

    def _observe_adapters(self, _: metrics.CallbackOptions) -> Iterable[metrics.Observation]:
        for (adapter, tier), count in self._adapters.counts().items():
            yield metrics.Observation(count, {"adapter": adapter, "tier": tier})


class Observation:
    """One request, from its receipt to its end."""

    def __init__(
        self, spec: GenerateSpec, *, client_id: str, instruments: Instruments, streaming: bool
    ) -> None:
        self._started_s = time.monotonic()
        self._instruments = instruments
        self._operation = "chat" if isinstance(spec.prompt, ChatPrompt) else "text_completion"
        self._span = telemetry.tracer().start_span(
            f"{self._operation} {instruments.model}",
            kind=SpanKind.INTERNAL,
            attributes={
                "gen_ai.operation.name": self._operation,
                "gen_ai.provider.name": PROVIDER,
                "gen_ai.request.model": instruments.model,
                "gen_ai.response.id": client_id,
                **_request_attributes(spec, streaming=streaming),
            },
        )
        annotate(request_id=client_id, adapter=str(spec.adapter) if spec.adapter else "")

    @property
    def traceparent(self) -> str:
        """The context in which the other services record this request's stages."""
        return telemetry.traceparent(self._span)

    def end(self, request: OwnedRequest | None, failure: BaseException | None) -> None:
        """Record everything. `failure` is what ended the call, if it did not end well."""
        ended_s = time.monotonic()
        error_type = _error_type(failure)
        if request is not None:
            self._describe(request)
            if request.first_token_s is not None:
                telemetry.record_span(
                    "stream",
                    parent=trace.set_span_in_context(self._span),
                    start_s=request.first_token_s,
                    end_s=ended_s,
                    attributes={"gen_ai.usage.output_tokens": len(request.output)},
                    error=error_type,
                )
        if error_type is not None:
            self._span.set_attribute("error.type", error_type)
            self._span.set_status(Status(StatusCode.ERROR, error_type))
        self._span.end()
        self._instruments.record(
            self._operation,
            request,
            duration_s=ended_s - self._started_s,
            error_type=error_type,
        )

    def _describe(self, request: OwnedRequest) -> None:
        admitted = request.admitted
        ttft_s = request.time_to_first_token_s
        finish = request.finish.value if request.finish is not None else ""
        annotate(
            prompt_tokens=len(admitted.prompt_token_ids),
            output_tokens=len(request.output),
            predicted_output_tokens=admitted.prediction.tokens,
            finish_reason=finish,
            worker_id=request.worker_id or "",
            resubmissions=request.number - 1,
            **({} if ttft_s is None else {"ttft_s": round(ttft_s, 6)}),
            **({} if admitted.adapter is None else {"adapter_digest": admitted.adapter.digest}),
        )
        self._span.set_attributes(
            {
                "gen_ai.response.model": self._instruments.model,
                "gen_ai.response.finish_reasons": [finish] if finish else [],
                "gen_ai.usage.input_tokens": len(admitted.prompt_token_ids),
                "gen_ai.usage.output_tokens": len(request.output),
                "sched.predicted_output_tokens": admitted.prediction.tokens,
                **({} if ttft_s is None else {"gen_ai.response.time_to_first_chunk": ttft_s}),
                "sched.output_tokens_q90": admitted.prediction.q90_tokens,
                **_placement_attributes(request.placement),
                **_adapter_attributes(admitted.adapter),
            }
        )


def _request_attributes(spec: GenerateSpec, *, streaming: bool) -> dict[str, AttributeValue]:
    sampling = spec.sampling
    attributes: dict[str, AttributeValue] = {
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.stream": streaming,
    }
    if spec.stopping.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = spec.stopping.max_tokens
    if sampling.seed is not None and sampling.seed < 2**63:  # what an attribute can hold
        attributes["gen_ai.request.seed"] = sampling.seed
    return attributes


def _placement_attributes(placement: Placement | None) -> dict[str, AttributeValue]:
    if placement is None:
        return {}
    return {"calumma.queue": placement.queue, "calumma.waited_for": placement.waited_for}


def _adapter_attributes(adapter: AdapterRef | None) -> dict[str, AttributeValue]:
    if adapter is None:
        return {}
    return {
        "lora.adapter.id": adapter.name,
        "lora.adapter.version": adapter.version,
        "lora.adapter.digest": adapter.digest,
        "lora.adapter.rank": adapter.rank,
    }


def _error_type(failure: BaseException | None) -> str | None:
    match failure:
        case None:
            return None
        case RpcError():
            return failure.reason
        case Exception():
            return Reason.INTERNAL
        case _:  # the call was cancelled
            return Reason.CANCELLED
