"""ReplicaScheduler: what one worker does next, step by step.

The life of a request here. It waits until memory can be promised to it, in order of arrival; then
it is admitted (`admission`), its adapter is loaded if absent (once for all that want it), and from
the step after that it computes its prompt and decodes (`batching`). It leaves exactly once: by
EndRequest, FailRequest or ExpireRequest.

Rules:
- One RunStep is outstanding at most. What is in it stays untouched until StepFinished; a request
  that must leave meanwhile leaves then.
- KV cache grows on demand. When blocks run out, idle adapters and prefixes go, then wanted
  adapters, then the youngest request is preempted and recomputes its known tokens later (`memory`,
  `batching`). Its adapter is then among the most urgent wanted ones, but not fixed: a fixed one
  could keep the oldest request from its memory for ever. Chameleon does not preempt; predictions
  fail, so we do.
  Where the maximum is reserved, nobody is ever preempted.
- Of adapters that must be downloaded, `max_loads` are under way at once. One in host memory does
  not wait for them: a store that hangs holds back nobody who does not need it.
- Pinned and hinted adapters are loaded while nobody waits for memory (`prefetch`).
- Without `keeps_idle_adapters`, adapters go when a request has left them without a user.
- While an adapter is coming, the prompts that wait for it are computed as far as its layers are
  here (`layerwise`). If its load then fails, whoever is in the outstanding step fails after it.
- Failed loads are not repeated here: whoever does the I/O knows what is worth a retry.
- The engine ends a request at its `max_output_tokens` and at `max_context_tokens`.
- What steps and loads cost is learned from the time between a decision and its answer (`costfit`).
"""

from dataclasses import replace
from typing import assert_never

from services.core.admission import Admission
from services.core.batching import Batching, Step
from services.core.cache import Urgency
from services.core.config import ReplicaConfig
from services.core.costfit import CostFit
from services.core.costs import StepCosts
from services.core.decisions import (
    EndRequest,
    ExpireRequest,
    FailRequest,
    ReplicaDecision,
    StepWork,
)
from services.core.events import (
    AdapterDropped,
    AdapterLoaded,
    AdapterLoadFailed,
    AdapterProgressed,
    AdaptersWanted,
    HostCacheChanged,
    LoadFailure,
    PinsChanged,
    ReplicaEvent,
    RequestAborted,
    RequestDispatched,
    RunningRequest,
    StepFinished,
)
from services.core.eviction import build_eviction
from services.core.ledger import can_ever_fit
from services.core.memory import DeviceMemory
from services.core.prefetch import LoadsAhead
from services.core.roster import Roster
from services.core.sequence import Sequence
from services.core.snapshots import ReplicaSnapshot
from services.core.timers import Timers
from services.core.types import AdapterDigest, Attempt, Capacity, Request

__all__ = ["ReplicaConfig", "ReplicaScheduler", "ReplicaSnapshot"]


class ReplicaScheduler:
    """Step batches, memory pool and adapter cache of one worker.

    `prior` is what steps are believed to cost until some have been measured.
    """

    def __init__(
        self, config: ReplicaConfig, capacity: Capacity, *, prior: StepCosts | None = None
    ) -> None:
        self._config = config
        self._capacity = capacity
        self._roster = Roster()
        self._memory = DeviceMemory(
            capacity,
            build_eviction(config.eviction, dict(config.eviction_options)),
            wanted=self._urgency_of,
            cool_down_s=config.cool_down_s,
        )
        self._ahead = LoadsAhead(config, self._memory, self._roster)
        self._admission = Admission(config, self._memory, self._roster)
        self._batching = Batching(config, self._memory, self._roster)
        self._fit = CostFit(prior or StepCosts())
        self._step: Step | None = None
        self._failures: list[AdapterLoadFailed] = []  # of adapters that the step uses
        self._deadlines: Timers[Attempt] = Timers()
        self._out: list[ReplicaDecision] = []

    def handle(  # noqa: C901 - one case each
        self, event: ReplicaEvent, *, now: float
    ) -> list[ReplicaDecision]:
        """Take in what happened; return what to do, in order."""
        match event:
            case RequestDispatched(request):
                self._on_dispatched(request, now=now)
            case RequestAborted(attempt):
                self._leave(attempt, EndRequest(attempt), now=now)
            case AdapterProgressed(digest, layers):
                self._on_progressed(digest, layers, now=now)
            case AdapterLoaded(digest):
                self._on_loaded(digest, now=now)
            case AdapterLoadFailed():
                self._on_load_failed(event, now=now)
            case AdaptersWanted(adapters):
                self._ahead.set_hints(adapters)
            case PinsChanged(pins):
                self._ahead.set_pins(pins)
            case AdapterDropped(digest):
                self._drop_prefixes(digest, now=now)
                self._ahead.drop(digest)
            case HostCacheChanged(digests):
                self._memory.set_near(digests)
                self._admission.reconsider()
            case StepFinished():
                self._on_step_finished(event, now=now)
            case _:
                assert_never(event)
        return self.tick(now=now)

    def tick(self, *, now: float) -> list[ReplicaDecision]:
        """Do what is due and what has become possible."""
        for attempt in self._deadlines.pop_due(now):
            self._leave(attempt, ExpireRequest(attempt), now=now)
        is_stepping = self._step is not None
        self._out.extend(self._admission.admit(is_stepping=is_stepping, now=now))
        self._out.extend(self._ahead.load(now=now))
        if not is_stepping:
            decisions, self._step = self._batching.form(self._fit.costs, now=now)
            self._out.extend(decisions)
        decisions, self._out = self._out, []
        return decisions

    def next_deadline(self) -> float | None:
        """When `tick` must be called if nothing happens before."""
        step_s = self._batching.next_s if self._step is None else None
        due_s = (self._deadlines.next_s(), self._ahead.next_s, step_s)
        return min((at_s for at_s in due_s if at_s is not None), default=None)

    @property
    def costs(self) -> StepCosts | None:
        """What steps and loads cost here; None until enough of them have been measured."""
        return self._fit.costs if self._fit.is_measured else None

    @property
    def leaked_blocks(self) -> int:
        """Blocks of the pool that are neither free nor accounted for. Always 0, but for a bug."""
        return self._memory.leaked_blocks(self._roster.admitted)

    def snapshot(self) -> ReplicaSnapshot:
        """The present state, for reports."""
        memory = self._memory
        running = sum(sequence.is_started for sequence in self._roster.admitted)
        return ReplicaSnapshot(
            kv_blocks=memory.pool.kv_blocks - memory.prefixes.idle_blocks,
            adapter_blocks=memory.pool.adapter_blocks,
            free_blocks=memory.pool.free_blocks,
            evictable_blocks=memory.evictable_blocks,
            running=running,
            loading=len(self._roster) - running,
            resident=memory.cache.resident(self._ahead.pin_reasons),
            cache=memory.cache.counts,
            prefix_blocks=memory.prefixes.idle_blocks,
            prefix=memory.prefixes.counts,
        )

    def announcements(self) -> tuple[RunningRequest, ...]:
        """All that is here, as a worker that attaches announces it."""
        return tuple(sequence.announcement() for sequence in self._roster.all())

    def check_integrity(self) -> None:
        """Assert all that must hold between events."""
        self._memory.check_integrity(self._roster.admitted)
        self._deadlines.check_integrity()
        self._roster.check_integrity()
        assert len(self._memory.ledger) == len(self._roster.admitted)
        for sequence in self._roster.admitted:
            assert sequence.attempt in self._memory.ledger
            assert sequence.held_tokens == len(sequence.blocks) * self._capacity.block_tokens
            assert sequence.told_blocks <= len(sequence.blocks)
            assert sequence.computed_tokens + sequence.chunk_tokens <= sequence.held_tokens
            assert sequence.passed_layers <= self._capacity.num_layers
        if self._step is None and self._memory.cache.loading == 0:
            assert not len(self._roster), "idle with work to do"

    # --- events -----------------------------------------------------------------------------

    def _on_dispatched(self, request: Request, *, now: float) -> None:
        attempt = request.attempt
        earlier = self._roster.latest(attempt.request_id)
        if earlier is not None and earlier.attempt.number >= attempt.number:
            return
        if self._roster.get(attempt) is not None:  # older than one that has left, still in a step
            return
        if earlier is not None:
            self._leave(earlier.attempt, EndRequest(earlier.attempt), now=now)
        if not can_ever_fit(request, self._capacity):
            message = f"request needs more than this worker's {self._capacity.pool_blocks} blocks"
            self._out.append(FailRequest(attempt, LoadFailure.TOO_LARGE, message))
            return
        if request.prefix_keys and not self._config.prefix_cache:
            request = replace(request, prefix_keys=())
        self._ahead.note_request(request.adapter, now=now)
        self._roster.add(request)
        self._admission.reconsider()
        if request.deadline_s is not None:
            self._deadlines.set(attempt, at_s=request.deadline_s)

    def _on_progressed(self, digest: AdapterDigest, layers: int, *, now: float) -> None:
        """The last layers are told of by AdapterLoaded, so `layers` that are all say nothing."""
        cache = self._memory.cache
        if digest not in cache or cache.is_loaded(digest):
            return
        if 0 < layers < self._capacity.num_layers and self._config.stepping != "whole":
            self._roster.progress(digest, cache.progress(digest, layers, now=now))

    def _on_loaded(self, digest: AdapterDigest, *, now: float) -> None:
        cache = self._memory.cache
        if digest not in cache or cache.is_loaded(digest):
            return
        entry = cache.end_load(digest, now=now)
        if entry.near_load_s is not None:
            size_bytes = entry.adapter.size_bytes
            self._fit.learn_load(size_bytes, began_s=entry.near_load_s, ended_s=now)
            cache.learn_load_byte_s(self._fit.costs.load_byte_s)
        self._roster.end_load(digest)
        self._admission.reconsider()

    def _on_load_failed(self, event: AdapterLoadFailed, *, now: float) -> None:
        cache = self._memory.cache
        if event.digest not in cache or cache.is_loaded(event.digest):
            return
        if self._step is not None and self._step.uses(event.digest):
            self._failures.append(event)
            return
        for sequence in self._roster.all():
            if sequence.digest == event.digest:
                failure = FailRequest(sequence.attempt, event.failure, event.message)
                self._remove(sequence, failure, now=now)
        self._ahead.note_failed(event.digest, now=now)
        self._memory.drop(event.digest)
        self._admission.reconsider()

    def _on_step_finished(self, event: StepFinished, *, now: float) -> None:
        assert self._step is not None, "no step is outstanding"
        step, self._step = self._step, None
        sampled, ended = frozenset(event.sampled), frozenset(event.ended)
        if event.ended:
            self._take_keys(step, event, now=now)
        for sequence in step.decodes:
            sequence.finish_step(1, has_sampled=sequence.request_id in sampled, now=now)
        for sequence, work in step.chunks:
            has_sampled = sequence.request_id in sampled
            self._finish_chunk(sequence, work, has_sampled=has_sampled, now=now)
        if ended <= sampled and step.is_whole:  # nobody failed
            self._fit.learn_step(step.shape, now - step.began_s)
            self._memory.prefill_token_s = self._fit.costs.prefill_token_s
        for sequence, samples in step.due():
            if sequence.request_id in ended:
                self._leave(sequence.attempt, EndRequest(sequence.attempt), now=now)
            elif sequence.leave_as is not None:
                self._leave(sequence.attempt, sequence.leave_as, now=now)
            else:
                assert samples == (sequence.request_id in sampled), "a due token is missing"
        failures, self._failures = self._failures, []
        for failure in failures:
            self._on_load_failed(failure, now=now)
        loads = self._admission.finish_step(has_decodes=bool(step.decodes), now=now)
        self._out.extend(loads)

    def _finish_chunk(
        self, sequence: Sequence, work: StepWork, *, has_sampled: bool, now: float
    ) -> None:
        if work.until_layer is not None:
            sequence.finish_part(work.until_layer)
            return
        sequence.finish_step(work.tokens, has_sampled=has_sampled, now=now)
        if sequence.keys:
            self._memory.list_prefix(sequence, now=now)
        if sequence.uncomputed_tokens <= 1:
            self._roster.end_prompt(sequence)
            self._admission.reconsider()

    def _take_keys(self, step: Step, event: StepFinished, *, now: float) -> None:
        """The whole of a request that ended well can be found again, of one that failed nothing."""
        ended, more_keys = frozenset(event.ended), dict(event.more_keys)
        failed = ended.difference(event.sampled)
        if not failed and not (more_keys and self._config.prefix_cache):
            return
        for sequence, _ in step.due():
            if sequence.request_id in failed:
                sequence.keys = ()
                self._drop_prefixes(sequence.digest, now=now)
            elif self._config.prefix_cache:
                sequence.keys += more_keys.get(sequence.request_id, ())

    def _drop_prefixes(self, digest: AdapterDigest | None, *, now: float) -> None:
        """What was computed with it is not used again; who was to begin with it waits again."""
        self._memory.drop_prefixes(digest)
        for sequence in [*self._roster.admitted]:
            if not sequence.is_started and sequence.cached and sequence.digest == digest:
                self._memory.release(sequence, now=now)
                self._roster.put_back(sequence)
                self._admission.reconsider()

    def _leave(self, attempt: Attempt, decision: EndRequest | ExpireRequest, *, now: float) -> None:
        sequence = self._roster.get(attempt)
        if sequence is None:
            return
        if self._step is not None and self._step.has(sequence):
            sequence.leave_as = sequence.leave_as or decision
            return
        self._remove(sequence, decision, now=now)

    def _remove(
        self, sequence: Sequence, decision: EndRequest | ExpireRequest | FailRequest, *, now: float
    ) -> None:
        self._out.append(decision)
        self._roster.remove(sequence)
        self._admission.reconsider()
        self._deadlines.cancel(sequence.attempt)
        if sequence.is_admitted:
            self._memory.release(sequence, now=now)
            if not self._config.keeps_idle_adapters:
                self._out.extend(self._memory.drop_abandoned(self._ahead.pin_reasons))

    def _urgency_of(self, digest: AdapterDigest) -> Urgency | None:
        return self._ahead.urgency_of(digest)
