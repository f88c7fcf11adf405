"""ClusterScheduler: which request goes to which worker, and when.

The life of a request here. It is submitted and queued by the policy; once some worker can start it
at once it is dispatched and charged to that worker's ledger; when the worker reports it finished,
its memory and quota are free again. It leaves exactly once: dispatched and finished, rejected,
forgotten (cancelled or superseded while queued) or returned to its gateway (its worker is lost).

Rules:
- Waiting happens here, not at the workers: only what fits a worker's ledger is dispatched, and
  every event is followed by dispatches until the policy has none to give.
- A running request may be squashed for another's sake: it is stopped, and its gateway submits it
  again with the tokens that it has.
- A later attempt supersedes an earlier one; known attempts are ignored.
- A cancelled attempt that nobody knows is remembered for a worker's grace period: a scheduler that
  has restarted may hear of it from the gateway before it hears from the worker that runs it.
- A request that no known worker could ever run is rejected, at submission or when workers change.
- Hints name the adapters of queued requests that their likely worker does not use yet (S-LoRA
  prefetches for its next batch), and are sent only when they change.

Expected of the shell: events of one stream in order, and no WorkerDetached or GatewayDetached for a
stream that a newer one has replaced.
"""

from itertools import islice
from typing import assert_never

from services.core.attachments import (
    attach_gateway,
    attach_worker,
    detach_gateway,
    detach_worker,
    lose_gateway,
    lose_worker,
    settle_claim,
)
from services.core.config import ClusterConfig
from services.core.decisions import ClusterDecision, Forget, Prefetch, Reject, RejectReason
from services.core.events import (
    ClusterEvent,
    GatewayAttached,
    GatewayDetached,
    PeerEvent,
    RequestCancelled,
    RequestFinished,
    RequestPrefilled,
    RequestStarted,
    RequestSubmitted,
    WorkerAttached,
    WorkerDetached,
    WorkerReported,
)
from services.core.ledger import can_ever_fit, context_limit_tokens
from services.core.queues import PoolSize, QueuePolicy, Refused, Squashed, Taken, wait_cause
from services.core.snapshots import ClusterSnapshot, QueuedSnapshot, WaitCause
from services.core.timers import earliest
from services.core.types import Attempt, Capacity, Request
from services.core.whereabouts import Whereabouts
from services.core.workers import Worker

__all__ = ["ClusterConfig", "ClusterScheduler", "ClusterSnapshot"]

_QUEUED_SHOWN = 100
_TENANTS_SHOWN = 100
_HINT_SCAN = 4  # queued requests looked at per adapter that may be hinted,
_HINT_SCAN_MAX = 1024  # and altogether


class ClusterScheduler:
    """Admission, queues and placement over all workers of one base model."""

    def __init__(self, config: ClusterConfig, policy: QueuePolicy) -> None:
        self._config = config
        self._policy = policy
        self._state = Whereabouts(config, policy)
        self._placement = self._state.placement
        self._open: list[Worker] = []
        self._capacities: list[Capacity] = []  # distinct ones of all workers that there are
        self._knows_capacities = True
        self._no_worker_since_s: float | None = None
        self._has_hinted = False
        self._hints_due_s: float | None = None
        self._hints_planned_s = float("-inf")

    def handle(self, event: ClusterEvent, *, now: float) -> list[ClusterDecision]:
        """Take in what happened; return what to do, in order."""
        state = self._state
        state.now = now
        match event:
            case RequestSubmitted(request):
                self._submit(request, now=now)
            case RequestFinished():
                self._finish(event, now=now)
            case RequestPrefilled():
                if not self._end_prefill(event):
                    return []
            case RequestStarted(worker_id, attempt):
                if (worker := state.workers.get(worker_id)) is not None:
                    worker.start(attempt)
                return []  # nobody can go for that
            case WorkerReported():
                self._report(event)
            case RequestCancelled(attempt, cause):
                self._cancel(attempt, cause, now=now)
            case _:
                self._handle_peer(event, now=now)
        return self.tick(now=now)

    def _handle_peer(self, event: PeerEvent, *, now: float) -> None:
        state = self._state
        match event:
            case GatewayAttached():
                attach_gateway(state, event, now=now)
            case GatewayDetached():
                detach_gateway(state, event, now=now)
            case WorkerAttached():
                attach_worker(state, event, now=now)
                self._count_workers()
                self._knows_capacities = False
            case WorkerDetached():
                detach_worker(state, event, now=now)
                self._count_workers()
            case _:
                assert_never(event)

    def tick(self, *, now: float) -> list[ClusterDecision]:
        """Do what is due and what has become possible."""
        self._state.now = now
        self._expire(now)
        self._reject_hopeless()
        self._state.let_pass(now=now)
        is_back = bool(self._open) and self._no_worker_since_s is not None
        self._reject_without_worker(now)
        self._dispatch(now, has_waited_for_worker=is_back)
        self._hint(now)
        decisions, self._state.out = self._state.out, []
        return decisions

    def next_deadline(self) -> float | None:
        """When `tick` must be called if nothing happens before."""
        state = self._state
        return earliest(
            state.deadlines.next_s(),
            state.worker_grace.next_s(),
            state.gateway_grace.next_s(),
            state.claim_grace.next_s(),
            state.cancelled.next_s(),
            self._next_without_worker_s(),
            self._policy.next_deadline(now=state.now),
            state.gate.next_deadline(),
            self._hints_due_s,
        )

    def snapshot(self, *, now: float) -> ClusterSnapshot:
        """The present state, for reports."""
        state = self._state
        oldest = islice(state.queued.items(), _QUEUED_SHOWN)
        return ClusterSnapshot(
            policy=self._policy.name,
            queues=self._policy.queues(now=now),
            workers=tuple(worker.snapshot() for worker in state.workers.values()),
            queued=tuple(
                QueuedSnapshot(
                    request_id=request_id,
                    queue=state.queue_of(request_id),
                    waited_s=max(0.0, now - since_s),
                    waits_for=self._waits_for(request, now=now),
                )
                for request_id, (request, since_s) in oldest
            ),
            gateways=sum(gateway.is_attached for gateway in state.gateways.values()),
            tenants=tuple(islice(state.gate.snapshots(now=now), _TENANTS_SHOWN)),
        )

    def check_integrity(self) -> None:
        """Assert all that must hold between events."""
        self._state.check_integrity()
        self._placement.fleet.check_integrity()
        assert self._open == [w for w in self._state.workers.values() if w.is_open]

    # --- events -----------------------------------------------------------------------------

    def _submit(self, request: Request, *, now: float) -> None:
        state, attempt = self._state, request.attempt
        live = state.live.get(attempt.request_id)
        claim = state.claims.get(attempt.request_id)
        if live is not None and live.attempt == attempt and live.worker_id is None:
            return
        known = [entry.attempt.number for entry in (live, claim) if entry is not None]
        if state.knows(attempt) or max(known, default=0) > attempt.number:
            state.out.append(Forget(attempt))  # only the shell's second copy of it
            return
        if live is not None:
            state.supersede(live)
        if claim is not None and claim.attempt == attempt:
            state.drop_claim(attempt.request_id)
        elif claim is not None:
            claim.is_cancelled = True
        self._admit(request, now=now)

    def _admit(self, request: Request, *, now: float) -> None:
        state = self._state
        limit_tokens: int | None = None
        if not self._can_ever_run(request):
            reason, retry_after_s = RejectReason.TOO_LARGE, None
            limit_tokens = self._limit_tokens(request)
        elif len(state.queued) >= self._config.queue_limit:
            reason, retry_after_s = RejectReason.QUEUE_FULL, self._config.retry_after_s
        else:
            refusal = state.enqueue(request, now=now)
            if refusal is None:
                return
            reason = RejectReason.TENANT_QUOTA
            retry_after_s = refusal.retry_after_s or self._config.retry_after_s
        state.out.append(
            Reject(request.gateway_id, request.attempt, reason, retry_after_s, limit_tokens)
        )

    def _cancel(self, attempt: Attempt, cause: str, *, now: float) -> None:
        state = self._state
        live = state.live.get(attempt.request_id)
        claim = state.claims.get(attempt.request_id)
        if live is not None and live.attempt == attempt:
            state.stop(live, cause)
        elif claim is not None and claim.attempt == attempt:
            claim.is_cancelled = True
        elif not state.knows(attempt):  # a worker that is not here yet may bring it
            state.cancelled.set(attempt, at_s=now + self._config.worker_grace_s)

    def _report(self, event: WorkerReported) -> None:
        worker = self._state.workers.get(event.worker_id)
        if worker is not None:
            worker.report(event.resident, is_draining=event.draining, costs=event.costs)
            if event.costs is not None:
                self._policy.learn(event.costs)
            if worker.is_open != (worker in self._open):
                self._count_workers()

    def _end_prefill(self, event: RequestPrefilled) -> bool:
        """True if its worker takes requests again."""
        worker = self._state.workers.get(event.worker_id)
        if worker is None:
            return False
        had_enough = self._placement.has_enough(worker)
        worker.end_prefill(event.attempt)
        if not had_enough or self._placement.has_enough(worker):
            return False
        self._placement.forget_refusals()  # of those who were refused by the others alone
        return True

    def _finish(self, event: RequestFinished, *, now: float) -> None:
        worker = self._state.workers.get(event.worker_id)
        if worker is not None and event.attempt in worker.placed:
            self._state.finish(worker, event.attempt, event.output_tokens, now=now)

    def _count_workers(self) -> None:
        """The set of workers that take requests may have changed."""
        self._open = [w for w in self._state.workers.values() if w.is_open]
        self._placement.open_to(self._open)
        kv_tokens = sum(w.capacity.pool_blocks * w.capacity.block_tokens for w in self._open)
        kv_bytes = sum(w.capacity.pool_blocks * w.capacity.block_bytes for w in self._open)
        self._policy.resize(
            PoolSize(
                kv_tokens=kv_tokens,
                token_bytes=kv_bytes / kv_tokens if kv_tokens else 1.0,
                workers=len(self._open),
                max_requests=sum(w.capacity.max_requests for w in self._open),
            )
        )

    # --- time -------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        state = self._state
        for request_id in state.deadlines.pop_due(now):
            state.reject_queued(request_id, RejectReason.DEADLINE)
        for worker_id in state.worker_grace.pop_due(now):
            lose_worker(state, worker_id, now=now)
            self._knows_capacities = False
        for gateway_id in state.gateway_grace.pop_due(now):
            lose_gateway(state, gateway_id)
        for request_id in state.claim_grace.pop_due(now):
            settle_claim(state, request_id)
        state.cancelled.pop_due(now)

    def _reject_hopeless(self) -> None:
        """Workers have come or gone: who fits none of those that there are now will never run."""
        if self._knows_capacities:
            return
        self._knows_capacities = True
        capacities = list(dict.fromkeys(w.capacity for w in self._state.workers.values()))
        if capacities == self._capacities:
            return
        self._capacities = capacities
        for request_id, (request, _) in list(self._state.queued.items()):
            if not self._can_ever_run(request):
                limit_tokens = self._limit_tokens(request)
                self._state.reject_queued(
                    request_id, RejectReason.TOO_LARGE, limit_tokens=limit_tokens
                )

    def _reject_without_worker(self, now: float) -> None:
        if self._open:
            self._no_worker_since_s = None
            return
        if self._no_worker_since_s is None:
            self._no_worker_since_s = now
        while (due_s := self._next_without_worker_s()) is not None and due_s <= now:
            request_id = next(iter(self._state.queued))
            retry_after_s = self._config.retry_after_s
            self._state.reject_queued(request_id, RejectReason.NO_WORKER, retry_after_s)

    def _next_without_worker_s(self) -> float | None:
        oldest = next(iter(self._state.queued.values()), None)
        if oldest is None or self._no_worker_since_s is None:
            return None
        return max(oldest[1], self._no_worker_since_s) + self._config.no_worker_wait_s

    # --- dispatch ---------------------------------------------------------------------------

    def _dispatch(self, now: float, *, has_waited_for_worker: bool) -> None:
        """Without a worker too: policies refuse who can't end in time any more."""
        state, placement = self._state, self._placement
        placement.begin(now=now)
        while (outcome := self._policy.take(placement, now=now)) is not None:
            match outcome:
                case Taken():
                    assert placement.chosen is not None
                    if has_waited_for_worker:
                        outcome = outcome._replace(waited_for="no_worker")
                    worker, need = placement.chosen
                    state.dispatch(outcome, worker, need, now=now)
                case Squashed(attempt):
                    state.squash(attempt)
                case Refused(request_id, reason):
                    state.refuse_taken(request_id, reason)
                case _:
                    assert_never(outcome)

    def _can_ever_run(self, request: Request) -> bool:
        """False if every worker there is, present or in its grace period, is too small."""
        capacities = self._capacities
        return not capacities or any(can_ever_fit(request, one) for one in capacities)

    def _limit_tokens(self, request: Request) -> int:
        """Of context with its adapter, at the worker that could hold most."""
        return max(context_limit_tokens(request.adapter, one) for one in self._capacities)

    def _waits_for(self, request: Request, *, now: float) -> WaitCause:
        if request.attempt.request_id in self._state.gate:
            return "tenant"
        if not self._open:
            return "no_worker"
        held_by = self._policy.held_by(request.attempt.request_id, now=now)
        return held_by or wait_cause(self._placement.choose(request))

    # --- hints ------------------------------------------------------------------------------

    def _hint(self, now: float) -> None:
        """Look at the queue again, not more often than the interval allows."""
        depth = self._config.prefetch_depth
        if depth == 0 or not (self._state.queued or self._has_hinted):
            self._hints_due_s = None
            return
        due_s = self._hints_planned_s + self._config.prefetch_interval_s
        if now < due_s:
            self._hints_due_s = due_s
            return
        self._hints_planned_s, self._hints_due_s = now, None
        if not self._open:
            return
        upcoming = islice(
            self._policy.upcoming(), min(_HINT_SCAN * depth * len(self._open), _HINT_SCAN_MAX)
        )
        hints = self._placement.plan_hints(upcoming)
        self._has_hinted = any(hints.values())
        for worker in self._open:
            adapters = hints[worker.worker_id]
            if adapters != tuple(worker.hinted.values()):
                worker.hint(adapters)
                self._state.out.append(Prefetch(worker.worker_id, adapters))
