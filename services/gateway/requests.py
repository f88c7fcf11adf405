"""One request, from its admission to its last token: attempts, positions, text and how it ended.

No I/O and no clock, so that every order of events can be tested. Its rules:

- Output positions count over all attempts. A token is taken at its position once: a frame that
  repeats known positions adds only what is new, a frame that leaves a gap makes the attempt lost.
- Only the current attempt's frames count, and only from the worker that has it.
- Text is made when tokens arrive, not when the client reads, so a stop string ends the request
  however slow its client is. What the client has not read is kept once and is at most max_tokens.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from services.common.errors import Reason, RpcError
from services.core.types import Attempt, RequestId
from services.gateway.predictor import Prediction
from services.gateway.text import IncrementalDetokenizer, StopStrings
from services.gateway.tokenizer import ModelTokenizer
from services.gateway.types import (
    AdapterRef,
    Finish,
    GenerateSpec,
    Piece,
    PositionLogprobs,
    Timings,
    TokenRun,
)

# A worker that ends this many seconds before the deadline or later has ended because of it.
_DEADLINE_TOLERANCE_S: Final = 0.5
_MOVABLE: Final = (Reason.WORKER_LOST, Reason.DRAINING)


class Effect(Enum):
    """What the caller must do after an event."""

    NOTHING = "nothing"
    CHANGED = "changed"  # there is something for the client
    STOPPED = "stopped"  # ended here, and its worker does not know yet
    LOST = "lost"  # this attempt brings no more tokens: submit again


@dataclass(frozen=True, slots=True)
class Admitted:
    """What does not change while a request lives. Times are monotonic seconds."""

    client_id: str
    wire_id: str
    spec: GenerateSpec
    prompt_token_ids: tuple[int, ...]
    adapter: AdapterRef | None
    seed: int
    max_tokens: int
    prediction: Prediction
    received_s: float
    deadline_s: float
    tenant: str
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the scheduler sent an attempt, from which of its queues, and what kept it there."""

    worker_id: str
    queue_s: float
    queue: str = ""
    waited_for: str = ""


class OwnedRequest:
    """A request that the gateway has promised to finish."""

    def __init__(self, admitted: Admitted, tokenizer: ModelTokenizer) -> None:
        self.admitted = admitted
        self.number = 1
        self.worker_id: str | None = None
        self.output: list[int] = []
        self.finish: Finish | None = None
        self.error: RpcError | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.placement: Placement | None = None
        self._submitted_s: float | None = None
        self._stages = Timings()
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stops = StopStrings(admitted.spec.stopping.stop)
        self._unread_text: list[str] = []
        self._unread_logprobs: list[PositionLogprobs] = []
        self._read_tokens = 0

    @property
    def attempt(self) -> Attempt:
        """The submission that counts now."""
        return Attempt(RequestId(self.admitted.wire_id), self.number)

    @property
    def is_ended(self) -> bool:
        return self.finish is not None or self.error is not None

    @property
    def has_begun(self) -> bool:
        """Placed at a worker, or further."""
        return self.worker_id is not None or bool(self.output)

    @property
    def stage(self) -> str:
        """Where it is, in the words of errors."""
        if self.output:
            return "decode"
        return "queue" if self.worker_id is None else "prefill"

    @property
    def time_to_first_token_s(self) -> float | None:
        first_s = self.first_token_s
        return None if first_s is None else first_s - self.admitted.received_s

    @property
    def stages(self) -> Timings:
        """What the stages took; decoding as seen from here when the worker has not said."""
        if self.first_token_s is None or self.last_token_s is None:
            return self._stages
        return Timings(decode_s=self.last_token_s - self.first_token_s).updated(self._stages)

    def waited_s(self, now_s: float) -> float:
        """Seconds since it was first submitted; that is now if it never was."""
        if self._submitted_s is None:
            self._submitted_s = now_s
        return now_s - self._submitted_s

    def place(self, attempt: Attempt, placement: Placement) -> Effect:
        """The scheduler gave it to a worker."""
        if attempt != self.attempt or self.is_ended:
            return Effect.NOTHING
        self.worker_id = placement.worker_id
        self.placement = placement
        self._stages = self._stages.updated(Timings(queue_s=placement.queue_s))
        return Effect.CHANGED

    def accept(self, run: TokenRun, worker_id: str, now_s: float) -> Effect:
        """A worker's frame has something of it."""
        if run.attempt != self.number or self.is_ended:
            return Effect.NOTHING
        if self.worker_id not in {None, worker_id}:
            return Effect.NOTHING
        if run.error is not None:
            return self._accept_error(run.error)
        known = len(self.output) - run.first_position
        if known < 0:
            return Effect.LOST
        self.worker_id = worker_id
        self._stages = self._stages.updated(run.timings)
        for index in range(known, len(run.token_ids)):
            if not self._append(run, index, now_s):
                return Effect.CHANGED if run.finish is not None else Effect.STOPPED
        return Effect.CHANGED if run.finish is None else self._accept_finish(run.finish, now_s)

    def begin_attempt(self) -> None:
        """Leave the worker behind; frames of the attempt until now no longer count."""
        self.number += 1
        self.worker_id = None

    def complete(self, finish: Finish) -> None:
        """End well: what was held back is text now."""
        text = self._stops.push(self._detokenizer.flush(), may_stop=self._may_stop())
        self._unread_text.append(text)
        self._unread_text.append(self._stops.flush())
        self.finish = Finish.STOP if self._stops.is_hit else finish

    def fail(self, error: RpcError) -> None:
        """End with an error. What the client has not read yet is still read first."""
        self.error = error

    def take(self) -> Piece:
        """Everything that the client has not read."""
        piece = Piece(
            "".join(self._unread_text),
            tuple(self.output[self._read_tokens :]),
            tuple(self._unread_logprobs),
        )
        self._read_tokens = len(self.output)
        self._unread_text.clear()
        self._unread_logprobs.clear()
        return piece

    def _accept_error(self, error: RpcError) -> Effect:
        if error.reason in _MOVABLE:
            return Effect.LOST
        self.fail(self._named(error))
        return Effect.CHANGED

    def _named(self, error: RpcError) -> RpcError:
        """A worker knows an adapter by its digest; its client is told the name, too."""
        adapter, context = self.admitted.adapter, error.context
        if adapter is None or context.stage != "adapter_load":
            return error
        return RpcError(
            error.reason,
            error.message,
            field="adapter",
            stage=context.stage,
            resource=("adapter", f"{adapter.name}@{adapter.version}"),
            retry_after_s=context.retry_after_s,
        )

    def _accept_finish(self, finish: Finish, now_s: float) -> Effect:
        match finish:
            case Finish.STOP | Finish.LENGTH:
                self.complete(finish)
            case Finish.CANCELLED:
                if now_s < self.admitted.deadline_s - _DEADLINE_TOLERANCE_S:
                    return Effect.LOST
                self.fail(deadline_error(self.stage))
            case Finish.ERROR:
                self.fail(RpcError(Reason.INTERNAL, "the worker gave no reason", stage=self.stage))
        return Effect.CHANGED

    def _append(self, run: TokenRun, index: int, now_s: float) -> bool:
        """Take one token. False when the request has ended with it, or before it."""
        if len(self.output) >= self.admitted.max_tokens:
            self.complete(Finish.LENGTH)
            return False
        self.output.append(run.token_ids[index])
        if index < len(run.logprobs):
            self._unread_logprobs.append(run.logprobs[index])
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.last_token_s = now_s
        text = self._detokenizer.push(run.token_ids[index])
        self._unread_text.append(self._stops.push(text, may_stop=self._may_stop()))
        if self._stops.is_hit:
            self.finish = Finish.STOP
        return not self._stops.is_hit

    def _may_stop(self) -> bool:
        return len(self.output) >= self.admitted.spec.stopping.min_tokens


def deadline_error(stage: str) -> RpcError:
    """The error of a request whose time is over."""
    return RpcError(Reason.DEADLINE_EXCEEDED, f"the deadline passed in stage {stage}", stage=stage)
