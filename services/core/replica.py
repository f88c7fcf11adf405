"""ReplicaScheduler: what one worker does next, step by step.

The life of a request here. It waits until the ledger can promise its expected memory, in order of
arrival; then it is admitted, its adapter is loaded if absent (once for all that want it), and from
the step after that it computes its prompt in chunks and decodes. It leaves exactly once: by
EndRequest, FailRequest or ExpireRequest.

Rules:
- Admission is tried at every event and every step (S-LoRA: every tenth step), oldest first. A
  request that does not fit holds back the younger ones; one that only waits for its turn to load
  does not.
- One RunStep is outstanding at most. What is in it stays untouched until StepFinished; a request
  that must leave meanwhile leaves then.
- KV cache grows on demand. When blocks run out, idle adapters go, then wanted ones, then the
  youngest request is preempted and recomputes its known tokens later (`memory`, `batching`). Its
  adapter is then among the most urgent wanted ones, but not fixed: a fixed one could keep the
  oldest request from its memory for ever. Chameleon does not preempt; predictions fail, so we do.
- Of adapters that must be downloaded, `max_loads` are under way at once. One in host memory does
  not wait for them: a store that hangs holds back nobody who does not need it.
- Hints are loaded while nobody waits for memory, into blocks that are not promised and that no
  wanted adapter holds.
- Failed loads are not repeated here: whoever does the I/O knows what is worth a retry.
- The engine ends a request at its `max_output_tokens` and at `max_context_tokens`.
"""

from typing import assert_never

from services.core.batching import form_step
from services.core.cache import Urgency
from services.core.config import ReplicaConfig
from services.core.decisions import (
    EndRequest,
    ExpireRequest,
    FailRequest,
    PreemptRequest,
    ReplicaDecision,
    RunStep,
    StartRequest,
    StepWork,
)
from services.core.events import (
    AdapterLoaded,
    AdapterLoadFailed,
    AdaptersWanted,
    HostCacheChanged,
    LoadFailure,
    ReplicaEvent,
    RequestAborted,
    RequestDispatched,
    StepFinished,
)
from services.core.eviction import build_eviction
from services.core.ledger import can_ever_fit
from services.core.memory import (
    SPARE_ALL,
    SPARE_NONE,
    DeviceMemory,
    hint_urgency,
    waiting_urgency,
)
from services.core.roster import Roster
from services.core.sequence import Sequence
from services.core.snapshots import ReplicaSnapshot
from services.core.timers import Timers
from services.core.types import Adapter, AdapterDigest, Attempt, Capacity, Request, RequestId

__all__ = ["ReplicaConfig", "ReplicaScheduler", "ReplicaSnapshot"]


class ReplicaScheduler:
    """Step batches, memory pool and adapter cache of one worker."""

    def __init__(self, config: ReplicaConfig, capacity: Capacity) -> None:
        self._config = config
        self._capacity = capacity
        self._memory = DeviceMemory(
            capacity, build_eviction(config.eviction), wanted=self._wanted_adapters
        )
        self._roster = Roster()
        self._step: dict[RequestId, tuple[Sequence, StepWork]] | None = None
        self._hints: tuple[Adapter, ...] = ()
        self._near: frozenset[AdapterDigest] = frozenset()  # in host memory
        self._deadlines: Timers[Attempt] = Timers()
        self._out: list[ReplicaDecision] = []

    def handle(self, event: ReplicaEvent, *, now: float) -> list[ReplicaDecision]:
        """Take in what happened; return what to do, in order."""
        match event:
            case RequestDispatched(request):
                self._on_dispatched(request, now=now)
            case RequestAborted(attempt):
                self._leave(attempt, EndRequest(attempt), now=now)
            case AdapterLoaded(digest):
                if digest in self._memory.cache and not self._memory.cache.is_loaded(digest):
                    self._memory.cache.end_load(digest)
            case AdapterLoadFailed():
                self._on_load_failed(event, now=now)
            case AdaptersWanted(adapters):
                self._hints = adapters[: self._config.max_hints]
            case HostCacheChanged(digests):
                self._near = digests
            case StepFinished():
                self._on_step_finished(event, now=now)
            case _:
                assert_never(event)
        return self.tick(now=now)

    def tick(self, *, now: float) -> list[ReplicaDecision]:
        """Do what is due and what has become possible."""
        for attempt in self._deadlines.pop_due(now):
            self._leave(attempt, ExpireRequest(attempt), now=now)
        self._admit(now)
        self._load_hints(now)
        self._begin_step(now)
        decisions, self._out = self._out, []
        return decisions

    def next_deadline(self) -> float | None:
        """When `tick` must be called if nothing happens before."""
        return self._deadlines.next_s()

    def snapshot(self) -> ReplicaSnapshot:
        """The present state, for reports."""
        memory = self._memory
        running = sum(sequence.is_started for sequence in self._roster.admitted)
        return ReplicaSnapshot(
            kv_blocks=memory.pool.kv_blocks,
            adapter_blocks=memory.pool.adapter_blocks,
            free_blocks=memory.pool.free_blocks,
            evictable_blocks=memory.cache.evictable_blocks,
            running=running,
            loading=len(self._roster) - running,
            resident=memory.cache.resident(),
            requests=tuple(sequence.announcement() for sequence in self._roster.all()),
        )

    def check_integrity(self) -> None:
        """Assert all that must hold between events."""
        self._memory.check_integrity()
        self._deadlines.check_integrity()
        self._roster.check_integrity()
        assert len(self._memory.ledger) == len(self._roster.admitted)
        for sequence in self._roster.admitted:
            assert sequence.attempt in self._memory.ledger
            held_tokens = self._memory.pool.kv_of(sequence.attempt) * self._capacity.block_tokens
            assert sequence.computed_tokens <= held_tokens
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
        self._roster.add(request)
        if request.deadline_s is not None:
            self._deadlines.set(attempt, at_s=request.deadline_s)

    def _on_load_failed(self, event: AdapterLoadFailed, *, now: float) -> None:
        cache = self._memory.cache
        if event.digest not in cache or cache.is_loaded(event.digest):
            return
        for sequence in self._roster.all():
            if sequence.digest == event.digest:
                self._remove(sequence, now=now)
                failure = FailRequest(sequence.attempt, event.failure, event.message)
                self._out.append(failure)
        self._hints = tuple(hint for hint in self._hints if hint.digest != event.digest)
        self._memory.drop(event.digest)

    def _on_step_finished(self, event: StepFinished, *, now: float) -> None:
        assert self._step is not None, "no step is outstanding"
        step, self._step = self._step, None
        sampled, ended = frozenset(event.sampled), frozenset(event.ended)
        for request_id, (sequence, work) in step.items():
            sequence.finish_step(work.tokens, has_sampled=request_id in sampled)
            if request_id in ended:
                self._leave(sequence.attempt, EndRequest(sequence.attempt), now=now)
            elif sequence.leave_as is not None:
                self._leave(sequence.attempt, sequence.leave_as, now=now)
            else:
                assert work.samples == (request_id in sampled), "a due token is missing"

    def _leave(self, attempt: Attempt, decision: EndRequest | ExpireRequest, *, now: float) -> None:
        sequence = self._roster.get(attempt)
        if sequence is None:
            return
        if self._is_in_step(sequence):
            sequence.leave_as = sequence.leave_as or decision
            return
        self._remove(sequence, now=now)
        self._out.append(decision)

    def _remove(self, sequence: Sequence, *, now: float) -> None:
        self._roster.remove(sequence)
        self._deadlines.cancel(sequence.attempt)
        if sequence.is_admitted:
            self._memory.release(sequence, now=now)

    def _is_in_step(self, sequence: Sequence) -> bool:
        entry = (self._step or {}).get(sequence.attempt.request_id)
        return entry is not None and entry[0] is sequence

    # --- admission and loads ----------------------------------------------------------------

    def _admit(self, now: float) -> None:
        cache = self._memory.cache
        for sequence in list(self._roster.waiting):
            adapter = sequence.request.adapter
            if adapter is not None and self._awaits_download(adapter.digest):
                continue
            if not self._memory.can_promise(sequence):
                break
            if adapter is not None and adapter.digest not in cache:
                urgency = waiting_urgency(sequence.order)
                decisions = self._memory.load(adapter, spare=urgency, now=now)
                if decisions is None:
                    break
                self._out.extend(decisions)
            self._memory.promise(sequence, now=now)
            self._roster.admit(sequence)

    def _awaits_download(self, digest: AdapterDigest) -> bool:
        """True if it must be downloaded, and as many downloads as may be are under way."""
        cache = self._memory.cache
        if digest in cache or digest in self._near:
            return False
        return cache.downloads(self._near) >= self._config.max_loads

    def _load_hints(self, now: float) -> None:
        cache = self._memory.cache
        loads = min(self._config.max_hint_loads, self._config.max_loads)
        for adapter in self._hints:
            if self._roster.waiting or cache.loading >= loads:
                return
            if adapter.digest in cache:
                continue
            if self._capacity.adapter_blocks(adapter) > self._memory.unpromised_blocks(self._hints):
                return
            decisions = self._memory.load(adapter, spare=SPARE_ALL, now=now)
            if decisions is None:
                return
            self._out.extend(decisions)

    def _wanted_adapters(self) -> dict[AdapterDigest, Urgency]:
        wanted: dict[AdapterDigest, Urgency] = {}
        for sequence in self._roster.waiting:
            if sequence.digest is not None:
                wanted.setdefault(sequence.digest, waiting_urgency(sequence.order))
        for index, hint in enumerate(self._hints):
            wanted.setdefault(hint.digest, hint_urgency(index))
        return wanted

    # --- steps ------------------------------------------------------------------------------

    def _begin_step(self, now: float) -> None:
        if self._step is not None:
            return
        cache = self._memory.cache
        runnable = [
            sequence
            for sequence in self._roster.admitted
            if sequence.digest is None or cache.is_loaded(sequence.digest)
        ]

        def grant(sequence: Sequence, tokens: int, *, preempts: bool) -> int:
            return self._grant(sequence, tokens, preempts=preempts, now=now)

        budget_tokens = self._config.prefill_tokens_per_step
        batch = form_step(runnable, prefill_tokens=budget_tokens, grant=grant)
        if not batch:
            return
        self._step = {}
        for sequence, tokens in batch:
            if not sequence.is_started:
                sequence.is_started = True
                self._out.append(StartRequest(sequence.attempt))
            request_id = sequence.attempt.request_id
            work = StepWork(request_id, tokens, samples=tokens == sequence.uncomputed_tokens)
            self._step[request_id] = (sequence, work)
        self._out.append(RunStep(tuple(work for _, work in self._step.values())))

    def _grant(self, sequence: Sequence, tokens: int, *, preempts: bool, now: float) -> int:
        """Make KV blocks for the sequence's next tokens; return for how many there are."""
        memory = self._memory
        if not preempts:
            tokens = min(tokens, memory.obtainable_tokens(sequence))
        if tokens <= 0:
            return 0
        while True:
            missing_blocks = memory.missing_blocks(sequence, tokens)
            evictions = memory.make_room(missing_blocks, spare=SPARE_NONE, now=now)
            if evictions is not None:
                self._out.extend(evictions)
                memory.grow(sequence, tokens)
                return tokens
            victim = self._roster.admitted[-1]
            if len(self._roster.admitted) == 1:
                assert memory.cache.loading, "a request that fits alone must go on"
                return 0
            self._preempt(victim, now=now)
            if victim is sequence:
                return 0

    def _preempt(self, sequence: Sequence, *, now: float) -> None:
        self._memory.release(sequence, now=now)
        if sequence.is_started:
            self._out.append(PreemptRequest(sequence.attempt))
        self._roster.put_back(sequence)
