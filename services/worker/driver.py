"""The one task that owns the core: events in, decisions performed in order, tokens out.

Latency rules:
  - Whatever came during a step is handled before the step's end, so that it can be in the next one.
  - The next step is decided and handed to the engine's thread first; streaming, spans and reports
    of the step that ended follow while the next one computes.
  - The event loop waits for nothing but its inbox and the core's next deadline.
"""

import asyncio
import time
import traceback
from collections import deque
from collections.abc import Iterable
from typing import Final, assert_never

import structlog

from services.common.errors import Reason, RpcError
from services.core.costs import StepCosts
from services.core.decisions import (
    EndRequest,
    EvictAdapter,
    ExpireRequest,
    FailRequest,
    LoadAdapter,
    PreemptRequest,
    ReplicaDecision,
    RunStep,
    StartRequest,
)
from services.core.events import (
    AdapterDropped,
    AdapterLoadFailed,
    AdaptersWanted,
    PinsChanged,
    ReplicaEvent,
    RequestAborted,
    RequestDispatched,
    StepFinished,
)
from services.core.replica import ReplicaScheduler, ReplicaSnapshot
from services.core.types import Adapter, AdapterDigest, Attempt, GatewayId, Pin, RequestId
from services.worker.drops import Drops
from services.worker.engine import SampledToken, SequenceFailure, StepItem
from services.worker.engine_thread import EngineThread, StepEnded
from services.worker.failures import failure_error, worker_lost
from services.worker.loads import Loads
from services.worker.measures import Measures
from services.worker.outputs import Finish
from services.worker.requests import LiveRequest, Work
from services.worker.residency import Residency
from services.worker.roster import Roster

ENGINE_ERRORS_MAX: Final = 5  # in a row
SHOW_S: Final = 0.25  # between two updates of the gauges
_log = structlog.get_logger("driver")


class EngineFailedError(Exception):
    """The engine raises at every step, or is lost; this process is of no use."""


class Driver:
    """Runs the replica. Its methods belong to the event loop."""

    def __init__(
        self,
        core: ReplicaScheduler,
        *,
        engine: EngineThread,
        residency: Residency,
        roster: Roster,
        measures: Measures,
        requests_max: int,
    ) -> None:
        self._core = core
        self._engine = engine
        self._residency = residency
        self._roster = roster
        self._measures = measures
        self._requests_max = requests_max
        self.is_accepting = True
        self._inbox: deque[ReplicaEvent] = deque()
        self._wake = asyncio.Event()
        engine.watch(self._wake.set)
        self._idle = asyncio.Event()
        self._open: dict[RequestId, LiveRequest] = {}  # in the engine: one attempt of a request
        self._step: dict[str, LiveRequest] = {}  # by sequence id
        self._step_ended: StepEnded | None = None
        self._engine_errors = 0
        self._loads = Loads(residency, roster, post=self._post)
        self._next_show_s = 0.0
        self._drops = Drops(residency, roster)

    # --- what comes in ----------------------------------------------------------------------

    def dispatch(self, work: Work) -> None:
        """Take a request. A known attempt, or an earlier one, is ignored."""
        attempt = work.attempt
        earlier = self._roster.latest(attempt.request_id)
        if self._roster.is_known(attempt) or (earlier and earlier.work.attempt > attempt):
            return
        if (error := self._refusal()) is not None:
            self._roster.refuse(attempt, work.request.gateway_id, error)
            return
        if earlier is not None:
            self._roster.end(earlier, Finish.CANCELLED)  # it departs when the core takes this one
        live = LiveRequest(work, self._residency.tier(work.digest), time.monotonic())
        self._roster.add(live)
        self._measures.record_arrival(live.tier)
        if live.output.end_position >= work.request.max_output_tokens:
            self._roster.end(live, Finish.LENGTH)
            self._roster.depart(live)
        else:
            self._inbox.append(RequestDispatched(work.request))
        self._wake.set()

    def refuse(self, attempt: Attempt, gateway_id: GatewayId, error: RpcError) -> None:
        """Fail a request that could not even be read."""
        if not self._roster.is_known(attempt):
            self._roster.refuse(attempt, gateway_id, error)

    def abort(self, attempt: Attempt) -> None:
        """End a request wherever it is. Unknown ones are ignored."""
        live = self._roster.find(attempt)
        if live is not None and live.output.ending is None:
            self._abort(live, Finish.CANCELLED)

    def abandon(self, message: str, *, gateway_id: GatewayId | None = None) -> int:
        """End all requests, or one gateway's, so that they are submitted again. How many?"""
        running = self._roster.unended(gateway_id)
        for live in running:
            self._abort(live, Finish.ERROR, error=worker_lost(message))
        self._roster.tell_gateways()
        return len(running)

    def prefetch(self, adapters: tuple[Adapter, ...]) -> None:
        """Adapters that queued requests will need; a newer hint replaces an older one."""
        self._inbox = deque(event for event in self._inbox if not _is_hint(event))
        self._post(AdaptersWanted(adapters))

    def set_pins(self, pins: tuple[Pin, ...]) -> None:
        """All that is pinned from now on."""
        self._post(PinsChanged(pins))

    def drop_adapter(self, digest: AdapterDigest) -> None:
        """Let it go, from device and host memory, once no request here needs it."""
        self._drops.add(digest)
        self._post(AdapterDropped(digest))

    # --- what others may know ---------------------------------------------------------------

    def snapshot(self) -> ReplicaSnapshot:
        """What this worker holds now."""
        return self._core.snapshot()

    @property
    def leaked_blocks(self) -> int:
        """Blocks of the memory pool that nothing accounts for: 0, but for a bug."""
        return self._core.leaked_blocks

    @property
    def costs(self) -> StepCosts | None:
        """What steps cost here, by those that were measured; None before that."""
        return self._core.costs

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request is here. False when the time was over first."""
        try:
            async with asyncio.timeout(timeout_s):
                while len(self._roster):
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _post(self, event: ReplicaEvent) -> None:
        self._inbox.append(event)
        self._wake.set()

    # --- the loop ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled. Raises EngineFailedError."""
        while True:
            await self._wait()
            if self._engine.lost is not None:
                raise EngineFailedError(f"the engine is lost: {self._engine.lost}")
            while self._inbox:
                self._handle(self._inbox.popleft())
            if self._step_ended is not None:
                self._finish_step(self._step_ended)
            deadline_s = self._core.next_deadline()
            if deadline_s is not None and deadline_s <= time.monotonic():
                self._perform(self._core.tick(now=time.monotonic()))
            self._drops.settle()
            self._loads.settle(self._open.values())
            self._engine.flush()
            self._tell()

    async def _wait(self) -> None:
        deadline_s = self._core.next_deadline()
        timer = None
        if deadline_s is not None:
            delay_s = max(0.0, deadline_s - time.monotonic()) + 0.001  # never early: no busy loop
            timer = asyncio.get_running_loop().call_later(delay_s, self._wake.set)
        await self._wake.wait()
        self._wake.clear()
        if timer is not None:
            timer.cancel()

    def _handle(self, event: ReplicaEvent) -> None:
        self._perform(self._core.handle(event, now=time.monotonic()))
        if isinstance(event, AdapterLoadFailed):
            self._loads.note_told(event)

    def _perform(self, decisions: Iterable[ReplicaDecision]) -> None:
        for decision in decisions:
            match decision:
                case RunStep():
                    self._run_step(decision)
                case StartRequest(attempt):
                    self._start(self._live(attempt), decision)
                case PreemptRequest(attempt):
                    self._close(self._live(attempt))
                case EndRequest(attempt):
                    self._depart(self._live(attempt))
                case FailRequest(attempt):
                    self._fail(self._live(attempt), decision)
                case ExpireRequest(attempt):
                    self._expire(self._live(attempt))
                case LoadAdapter(adapter, blocks):
                    self._loads.begin(adapter, blocks)
                case EvictAdapter(digest, reason):
                    self._residency.evict(digest)
                    self._measures.record_eviction(reason)
                case _:
                    assert_never(decision)

    # --- steps ------------------------------------------------------------------------------

    def _run_step(self, step: RunStep) -> None:
        items: list[StepItem] = []
        new = dict(step.new_blocks)
        for work in step.work:
            live = self._open[work.request_id]  # a later attempt may be here, unknown to the core
            self._step[live.sequence_id] = live
            new_blocks = new.get(work.request_id, ())
            items.append(StepItem(live.sequence_id, work.tokens, work.until_layer, new_blocks))
            if work.until_layer is None and not live.is_announced:
                self._roster.start(live)  # its adapter is here, as the scheduler takes it
        self._engine.run_step(items, self._on_step_ended)

    def _on_step_ended(self, ended: StepEnded) -> None:
        self._step_ended = ended
        self._wake.set()

    def _finish_step(self, ended: StepEnded) -> None:
        step, self._step, self._step_ended = self._step, {}, None
        for live in step.values():
            if live.prefill_start_s is None:
                live.prefill_start_s = ended.start_s
        if ended.error is not None:
            self._fail_step(step.values(), ended.error)
            return
        self._engine_errors = 0
        sampled: list[RequestId] = []
        complete: list[RequestId] = []
        more_keys: list[tuple[RequestId, tuple[bytes, ...]]] = []
        for sequence_id in ended.unopened:
            live = step[sequence_id]
            self._roster.end(live, Finish.ERROR, error=_engine_error(live))
            complete.append(live.work.attempt.request_id)
        for result in ended.results:
            live = step[result.sequence_id]
            request_id = live.work.attempt.request_id
            if isinstance(result, SampledToken):
                sampled.append(request_id)
            if live.output.ending is not None or self._take(live, result, ended.end_s):
                complete.append(request_id)
                if keys := live.more_keys():
                    more_keys.append((request_id, keys))
        self._measures.record_step(ended.end_s - ended.start_s, tokens=len(sampled))
        self._handle(StepFinished(tuple(sampled), tuple(complete), tuple(more_keys)))

    def _take(self, live: LiveRequest, result: SampledToken | SequenceFailure, now: float) -> bool:
        """Note a result of the step. True if the request is complete."""
        match result:
            case SampledToken():
                self._roster.touch(live)
                if live.first_token_s is None:
                    self._roster.prefill(live)
                finish = live.accept(result, now=now)
                if finish is None:
                    return False
                self._roster.end(live, finish)
            case SequenceFailure(message=message):
                error = RpcError(Reason.NUMERICAL_FAILURE, message, stage=live.stage)
                self._roster.end(live, Finish.ERROR, error=error)
            case _:
                assert_never(result)
        return True

    def _fail_step(self, step: Iterable[LiveRequest], raised: Exception) -> None:
        """The engine raised: the step's requests are lost, the others are not."""
        self._engine_errors += 1
        if self._engine_errors == 1:  # its repetitions say no more
            text = "".join(traceback.format_exception(raised))
            _log.error("engine_failed", error=repr(raised), traceback=text)
        if self._engine_errors >= ENGINE_ERRORS_MAX:
            message = f"the engine failed at {ENGINE_ERRORS_MAX} steps in a row"
            raise EngineFailedError(message) from raised
        complete: list[RequestId] = []
        for live in step:
            complete.append(live.work.attempt.request_id)
            self._roster.end(live, Finish.ERROR, error=_engine_error(live))
        self._handle(StepFinished((), tuple(complete)))

    # --- requests ---------------------------------------------------------------------------

    def _refusal(self) -> RpcError | None:
        """Why nothing new can be taken."""
        if not self.is_accepting:
            return worker_lost("the worker is draining")
        if len(self._roster) >= self._requests_max:
            message = f"the worker has {self._requests_max} requests already"
            return RpcError(Reason.QUEUE_FULL, message, stage="queue", retry_after_s=1.0)
        return None

    def _abort(self, live: LiveRequest, finish: Finish, *, error: RpcError | None = None) -> None:
        self._roster.end(live, finish, error=error)
        self._post(RequestAborted(live.work.attempt))

    def _start(self, live: LiveRequest, start: StartRequest) -> None:
        assert not live.is_open
        live.is_open = True
        self._open[live.work.attempt.request_id] = live
        if live.first_token_s is None:  # else it goes on after a preemption
            live.cached_tokens = start.computed_tokens
        spec = live.spec(start.blocks, computed_tokens=start.computed_tokens)
        self._engine.open_sequence(spec)

    def _close(self, live: LiveRequest) -> None:
        if live.is_open:
            live.is_open = False
            del self._open[live.work.attempt.request_id]
            self._engine.close_sequence(live.sequence_id)

    def _depart(self, live: LiveRequest) -> None:
        self._close(live)
        self._roster.depart(live)

    def _fail(self, live: LiveRequest, decision: FailRequest) -> None:
        told = self._loads.error_of(live.work.digest)
        error = told or failure_error(decision.failure, decision.message)
        self._roster.end(live, Finish.ERROR, error=error)
        self._depart(live)

    def _expire(self, live: LiveRequest) -> None:
        error = RpcError(Reason.DEADLINE_EXCEEDED, "the deadline has passed", stage=live.stage)
        self._roster.end(live, Finish.ERROR, error=error)
        self._depart(live)

    def _live(self, attempt: Attempt) -> LiveRequest:
        live = self._roster.find(attempt)
        assert live is not None
        return live

    # --- after the decisions ----------------------------------------------------------------

    def _tell(self) -> None:
        self._roster.tell_gateways()
        self._roster.tell_scheduler()
        now = time.monotonic()
        is_idle = not len(self._roster)
        if is_idle:
            self._idle.set()
        if is_idle or now >= self._next_show_s:
            self._next_show_s = now + SHOW_S
            leaked_blocks = self._core.leaked_blocks
            self._measures.show(self._core.snapshot(), leaked_blocks=leaked_blocks)


def _engine_error(live: LiveRequest) -> RpcError:
    return RpcError(Reason.INTERNAL, "the engine failed at this request", stage=live.stage)


def _is_hint(event: ReplicaEvent) -> bool:
    return isinstance(event, AdaptersWanted)
