"""The requests at this worker: what each needs, when it is complete, where its time went.

Stop rules are those of token ids; stop texts are the gateway's. The stop token is not part of the
output. Spans are recorded when a stage has ended: "adapter_load", "prefill", "decode", children of
the request's span at its gateway.
"""

from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode

from services.common import telemetry
from services.common.errors import RpcError
from services.core.prefix_keys import block_keys
from services.core.types import AdapterDigest, Attempt, Request
from services.worker.engine import SampledToken, Sampling, SequenceSpec
from services.worker.outputs import Ending, Finish, Output, Tier, Timings, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Prefix:
    """How the blocks of a request are named, see `services.core.prefix_keys`."""

    root: bytes
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Work:
    """A checked work item: sizes for the core, tokens and sampling for the engine."""

    request: Request
    token_ids: tuple[int, ...]
    prompt_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    min_tokens: int
    traceparent: str
    queue_s: float
    prefix: Prefix | None = None  # None: it shares nothing

    @property
    def attempt(self) -> Attempt:
        return self.request.attempt

    @property
    def digest(self) -> AdapterDigest | None:
        adapter = self.request.adapter
        return adapter.digest if adapter is not None else None


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request from its receipt until the core lets it go. Times of the monotonic clock."""

    work: Work
    tier: Tier
    received_s: float
    output: Output = field(init=False)
    is_open: bool = False  # in the engine
    is_announced: bool = False  # the scheduler was told that it runs
    adapter_ready_s: float | None = None
    cached_tokens: int | None = None  # of its context, when its prefill began
    prefill_start_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    load_span: Span | None = None

    def __post_init__(self) -> None:
        request = self.work.request
        self.output = Output(request.attempt, request.gateway_id, request.prior_output_tokens)
        if self.tier in {Tier.NONE, Tier.DEVICE}:
            self.adapter_ready_s = self.received_s

    @property
    def sequence_id(self) -> str:
        """Its name in the engine, unique over attempts."""
        attempt = self.work.attempt
        return f"{attempt.request_id}#{attempt.number}"

    @property
    def stage(self) -> str:
        """Where it is: "adapter_load", "prefill" or "decode"."""
        if self.adapter_ready_s is None:
            return "adapter_load"
        return "prefill" if self.first_token_s is None else "decode"

    @property
    def awaits_adapter(self) -> bool:
        return self.adapter_ready_s is None and self.output.ending is None

    def spec(self, blocks: tuple[int, ...] = (), *, computed_tokens: int = 0) -> SequenceSpec:
        """The sequence to open, with all tokens known by now, of which the first are computed."""
        work = self.work
        return SequenceSpec(
            sequence_id=self.sequence_id,
            token_ids=(*work.token_ids, *self.output.token_ids),
            prompt_tokens=work.prompt_tokens,
            adapter_digest=work.digest,
            sampling=work.sampling,
            max_tokens=work.request.max_output_tokens,
            blocks=blocks,
            computed_tokens=computed_tokens,
        )

    def accept(self, token: SampledToken, *, now: float) -> Finish | None:
        """Take the next token. Returns why the request is complete, or None."""
        if self.first_token_s is None:
            self.first_token_s = now
        self.last_token_s = now
        output = self.output
        may_stop = output.end_position >= self.work.min_tokens
        if may_stop and token.token_id in self.work.stop_ids:
            return Finish.STOP
        output.token_ids.append(token.token_id)
        if token.logprob is not None and self.work.sampling.logprobs is not None:
            output.logprobs.append(TokenLogprobs(token.token_id, token.logprob, token.top))
        is_full = output.end_position >= self.work.request.max_output_tokens
        return Finish.LENGTH if is_full else None

    def more_keys(self) -> tuple[bytes, ...]:
        """Of the full blocks of prompt and output, behind those that the core knows already."""
        prefix, known = self.work.prefix, self.work.request.prefix_keys
        if prefix is None:
            return ()
        block_tokens = prefix.block_tokens
        token_ids = (*self.work.token_ids, *self.output.token_ids)[len(known) * block_tokens :]
        before = known[-1] if known else prefix.root
        return block_keys(before, token_ids, block_tokens=block_tokens)

    def end(self, finish: Finish, *, error: RpcError | None = None) -> None:
        """Fix its ending. Once."""
        self.output.end(Ending(finish, self.timings(), error))
        if self.load_span is not None:
            self.load_span.end()
            self.load_span = None

    def timings(self) -> Timings:
        """Seconds of the stages that have ended."""
        is_base = self.tier is Tier.NONE
        return Timings(
            queue_s=self.work.queue_s,
            adapter_load_s=None if is_base else _between(self.received_s, self.adapter_ready_s),
            prefill_s=_between(self.prefill_start_s, self.first_token_s),
            decode_s=_between(self.first_token_s, self.last_token_s),
            tier=self.tier,
            cached_tokens=self.cached_tokens,
        )

    # --- spans ------------------------------------------------------------------------------

    def open_load_span(self, *, offset_ns: int) -> Context | None:
        """Begin "adapter_load" so that the download can run inside it. None without a trace."""
        parent = self._parent
        if parent is None:
            return None
        self.load_span = telemetry.tracer().start_span(
            "adapter_load",
            context=parent,
            start_time=int(self.received_s * 1e9) + offset_ns,
            attributes=self._adapter_attributes(),
        )
        return trace.set_span_in_context(self.load_span, parent)

    def end_load(self, *, now: float, error: str | None) -> None:
        """Its adapter came, or will not."""
        if error is None:
            self.adapter_ready_s = now
        if self.load_span is not None:
            if error is not None:
                self.load_span.set_status(Status(StatusCode.ERROR, error))
            self.load_span.end()
            self.load_span = None
        elif (parent := self._parent) is not None:
            telemetry.record_span(
                "adapter_load",
                parent=parent,
                start_s=self.received_s,
                end_s=now,
                attributes=self._adapter_attributes(),
                error=error,
            )

    def record_stages(self) -> None:
        """Record "prefill" and "decode" once it has ended."""
        parent, ending = self._parent, self.output.ending
        if parent is None or self.prefill_start_s is None:
            return
        if self.first_token_s is None or self.last_token_s is None:
            return
        error = ending.error if ending is not None else None
        attributes = self._adapter_attributes()
        telemetry.record_span(
            "prefill",
            parent=parent,
            start_s=self.prefill_start_s,
            end_s=self.first_token_s,
            attributes={**attributes, "gen_ai.usage.input_tokens": len(self.work.token_ids)},
        )
        telemetry.record_span(
            "decode",
            parent=parent,
            start_s=self.first_token_s,
            end_s=self.last_token_s,
            attributes={
                **attributes,
                "gen_ai.usage.output_tokens": len(self.output.token_ids),
            },
            error=error.reason if error is not None else None,
        )

    @property
    def _parent(self) -> Context | None:
        header = self.work.traceparent
        return telemetry.context_from(header) if header else None

    def _adapter_attributes(self) -> dict[str, str | int]:
        adapter = self.work.request.adapter
        if adapter is None:
            return {"lora.adapter.cache_tier": self.tier}
        return {
            "lora.adapter.digest": adapter.digest,
            "lora.adapter.rank": adapter.rank,
            "lora.adapter.cache_tier": self.tier,
        }


def _between(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s
