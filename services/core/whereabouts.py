"""Where every request is: queued, at a worker, or claimed to be at a worker that is not here yet.

Owns the cluster machine's state and the few moves a request can make; each move keeps all indexes
in step and writes the decisions that announce it. `cluster` and `attachments` decide on moves.

A request is *live* in its latest attempt: queued or placed. An attempt that is aborted is live no
more, but stays in its worker's ledger, as `Placed.abort_cause` says, until that worker reports it
finished or is lost.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from services.core.config import ClusterConfig
from services.core.decisions import (
    Abort,
    ClusterDecision,
    Dispatch,
    Forget,
    Reject,
    RejectReason,
    Return,
)
from services.core.events import RunningRequest
from services.core.ledger import Need
from services.core.placement import Placement
from services.core.queues import QueuePolicy, Taken
from services.core.tenant_gate import Refusal, TenantGate
from services.core.timers import Timers
from services.core.types import Attempt, Capacity, GatewayId, Request, RequestId, WorkerId
from services.core.workers import Placed, Worker

_GATE: Final = "tenant"  # the queue of those that their tenant's quota holds


@dataclass(slots=True)
class Live:
    """The latest attempt of a request; at no worker while it is queued."""

    attempt: Attempt
    gateway_id: GatewayId
    worker_id: WorkerId | None


@dataclass(slots=True)
class Claim:
    """A gateway says that this attempt is at a worker that is not attached."""

    attempt: Attempt
    gateway_id: GatewayId
    worker_id: WorkerId
    is_cancelled: bool = False


@dataclass(slots=True)
class Gateway:
    """A gateway and its live requests, in order of arrival."""

    is_attached: bool
    requests: dict[RequestId, None] = field(default_factory=dict)


class Whereabouts:
    """The cluster machine's state. `out` collects decisions."""

    def __init__(self, config: ClusterConfig, policy: QueuePolicy) -> None:
        self.config = config
        self.policy = policy
        self.workers: dict[WorkerId, Worker] = {}
        self.capacities: dict[Capacity, Capacity] = {}  # one object for all that are equal
        self.gateways: dict[GatewayId, Gateway] = {}
        self.live: dict[RequestId, Live] = {}
        self.queued: OrderedDict[RequestId, tuple[Request, float]] = OrderedDict()
        self.placement = Placement(config)
        self.gate = TenantGate(config.tenants)
        self.passed: set[RequestId] = set()  # the gate, just now
        self.aborted: set[Attempt] = set()  # live no more, but still at a worker
        self.claims: dict[RequestId, Claim] = {}
        self.deadlines: Timers[RequestId] = Timers()
        self.worker_grace: Timers[WorkerId] = Timers()
        self.gateway_grace: Timers[GatewayId] = Timers()
        self.claim_grace: Timers[RequestId] = Timers()
        self.cancelled: Timers[Attempt] = Timers()  # unknown, perhaps at a worker that is away
        self.out: list[ClusterDecision] = []
        self.now = float("-inf")

    def knows(self, attempt: Attempt) -> bool:
        """True if the attempt is queued or at a worker, aborted or not."""
        live = self.live.get(attempt.request_id)
        return attempt in self.aborted or (live is not None and live.attempt == attempt)

    def expect_gateway(self, gateway_id: GatewayId, *, now: float) -> Gateway:
        """The gateway; one not seen before has the grace period to attach."""
        if gateway_id not in self.gateways:
            self.gateways[gateway_id] = Gateway(is_attached=False)
            self.gateway_grace.set(gateway_id, at_s=now + self.config.gateway_grace_s)
        return self.gateways[gateway_id]

    # --- the queue --------------------------------------------------------------------------

    def enqueue(self, request: Request, *, now: float) -> Refusal | None:
        """A request begins to wait, in the policy's queues or for its tenant's quota."""
        passed = self.gate.offer(request, now=now)
        if isinstance(passed, Refusal):
            return passed
        request_id = request.attempt.request_id
        self._add_live(Live(request.attempt, request.gateway_id, None), now=now)
        if isinstance(passed, Request):
            request = passed
            self.policy.push(request, now=now)
        self.queued[request_id] = (request, now)
        if request.deadline_s is not None:
            self.deadlines.set(request_id, at_s=request.deadline_s)
        return None

    def let_pass(self, *, now: float) -> None:
        """Requests that their tenants' quotas allow by now go to the policy's queues."""
        self.passed.clear()
        for request in self.gate.due(now=now):
            request_id = request.attempt.request_id
            self.queued[request_id] = (request, self.queued[request_id][1])
            self.passed.add(request_id)
            self.policy.push(request, now=now)

    def queue_of(self, request_id: RequestId) -> str:
        """Where a queued request waits."""
        return _GATE if request_id in self.gate else self.policy.queue_of(request_id)

    def reject_queued(
        self,
        request_id: RequestId,
        reason: RejectReason,
        retry_after_s: float | None = None,
        *,
        limit_tokens: int | None = None,
    ) -> None:
        """A waiting request will not run."""
        request = self._withdraw(request_id)
        self.out.append(
            Reject(request.gateway_id, request.attempt, reason, retry_after_s, limit_tokens)
        )

    def refuse_taken(self, request_id: RequestId, reason: RejectReason) -> None:
        """A request that its policy has just taken out will not run."""
        request, _ = self.queued.pop(request_id)
        self.gate.leave(request.attempt, None, now=self.now)
        self._forget_queued(request_id)
        self.out.append(Reject(request.gateway_id, request.attempt, reason, None))

    def dispatch(self, taken: Taken, worker: Worker, need: Need, *, now: float) -> None:
        """A request that its policy has just taken goes to a worker."""
        request = taken.request
        attempt = request.attempt
        _, since_s = self.queued.pop(attempt.request_id)
        self.placement.forget(attempt.request_id)
        if request.deadline_s is not None:
            self.deadlines.cancel(attempt.request_id)
        self.live[attempt.request_id].worker_id = worker.worker_id
        worker.place(request, need, now=now)
        queue_s, waited_for = max(0.0, now - since_s), taken.waited_for
        if waited_for == "nothing" and attempt.request_id in self.passed:
            waited_for = "tenant"
        self.out.append(Dispatch(worker.worker_id, attempt, queue_s, taken.queue, waited_for))

    # --- at a worker ------------------------------------------------------------------------

    def adopt(self, running: RunningRequest, worker: Worker, *, now: float) -> None:
        """Take over a request that a worker announced; nothing newer of it is known.

        If the same attempt waits here, a scheduler before this one dispatched it: it is dispatched
        again, which the worker ignores and its gateway learns from.
        """
        live = self.live.get(running.attempt.request_id)
        if live is not None and live.attempt == running.attempt:
            request_id = running.attempt.request_id
            _, since_s = self.queued[request_id]
            queue_s, queue = max(0.0, now - since_s), self.queue_of(request_id)
            self._withdraw(request_id, is_run=True)
            self.out.append(
                Dispatch(worker.worker_id, running.attempt, queue_s, queue, "no_worker")
            )
        elif live is not None:
            self.supersede(live)
        worker.adopt(running)
        self._add_live(Live(running.attempt, running.gateway_id, worker.worker_id), now=now)

    def abort(self, worker: Worker, attempt: Attempt, cause: str) -> None:
        """Stop an attempt; its memory is free when the worker says so."""
        live = self.live.get(attempt.request_id)
        if live is not None and live.attempt == attempt and live.worker_id == worker.worker_id:
            self._drop_live(live)
        worker.placed[attempt].abort_cause = cause
        self.aborted.add(attempt)
        if worker.is_attached:
            self.out.append(Abort(worker.worker_id, attempt, cause))

    def squash(self, attempt: Attempt) -> None:
        """Its policy wants the memory of a running request: stopped, and submitted again.

        One that nobody wants any more is being stopped already, which its policy is not told.
        """
        if attempt in self.aborted:
            return
        live = self.live[attempt.request_id]
        assert live.attempt == attempt
        assert live.worker_id is not None
        self.abort(self.workers[live.worker_id], attempt, "squashed")
        self.out.append(Return(live.gateway_id, attempt, live.worker_id))

    def finish(self, worker: Worker, attempt: Attempt, output_tokens: int, *, now: float) -> None:
        """A worker says that it is done with an attempt."""
        worker.measure(attempt, output_tokens, now=now)
        self._remove(worker, attempt, output_tokens, now=now)

    def give_back(self, worker: Worker, attempt: Attempt, *, now: float) -> None:
        """An attempt is lost with its worker: its gateway ought to submit it again."""
        is_wanted = attempt not in self.aborted
        gateway_id = self._remove(worker, attempt, 0, now=now).gateway_id
        if is_wanted:
            self.out.append(Return(gateway_id, attempt, worker.worker_id))

    def _remove(
        self, worker: Worker, attempt: Attempt, output_tokens: int, *, now: float
    ) -> Placed:
        placed = worker.remove(attempt)
        self.placement.forget_refusals()
        self.policy.release(attempt, now=now)
        self.gate.leave(attempt, output_tokens, now=now)
        if placed.abort_cause is not None:
            self.aborted.discard(attempt)
        else:
            self._drop_live(self.live[attempt.request_id])
        return placed

    # --- anywhere ---------------------------------------------------------------------------

    def stop(self, live: Live, cause: str) -> None:
        """Its gateway does not want it any more: forgotten if queued, aborted if placed."""
        if live.worker_id is None:
            self._withdraw(live.attempt.request_id)
            self.out.append(Forget(live.attempt))
        else:
            self.abort(self.workers[live.worker_id], live.attempt, cause)

    def supersede(self, live: Live) -> None:
        """A later attempt of the request takes its place."""
        self.stop(live, "superseded")

    def drop_claim(self, request_id: RequestId) -> None:
        """The claim is settled."""
        self.claims.pop(request_id, None)
        self.claim_grace.cancel(request_id)

    def check_integrity(self) -> None:
        """Assert that all indexes agree and that nothing leaks."""
        self.policy.check_integrity()
        for timers in (self.deadlines, self.worker_grace, self.gateway_grace, self.claim_grace):
            timers.check_integrity()
        self.cancelled.check_integrity()
        assert {i for i, live in self.live.items() if live.worker_id is None} == set(self.queued)
        assert self.placement.refused <= set(self.queued)
        self.gate.check_integrity()
        assert len(self.policy) + len(self.gate) == len(self.queued)
        placed, aborted = 0, set[Attempt]()
        for worker in self.workers.values():
            worker.check_integrity()
            assert worker.is_attached != (worker.worker_id in self.worker_grace)
            wanted = [a for a, entry in worker.placed.items() if entry.abort_cause is None]
            placed += len(wanted)
            aborted |= worker.placed.keys() - set(wanted)
            assert all(self.live[a.request_id].worker_id == worker.worker_id for a in wanted)
            assert all(self.live[a.request_id].attempt == a for a in wanted)
        assert placed + len(self.queued) == len(self.live)
        assert aborted == self.aborted
        indexed = [i for gateway in self.gateways.values() for i in gateway.requests]
        assert sorted(indexed) == sorted(self.live)
        for gateway_id, gateway in self.gateways.items():
            assert gateway.is_attached != (gateway_id in self.gateway_grace)
        assert all(request_id in self.claim_grace for request_id in self.claims)
        assert len(self.claim_grace) == len(self.claims)
        with_deadline = [i for i, (r, _) in self.queued.items() if r.deadline_s is not None]
        assert len(self.deadlines) == len(with_deadline)

    def _add_live(self, live: Live, *, now: float) -> None:
        request_id = live.attempt.request_id
        assert request_id not in self.live
        self.live[request_id] = live
        self.expect_gateway(live.gateway_id, now=now).requests[request_id] = None

    def _drop_live(self, live: Live) -> None:
        del self.live[live.attempt.request_id]
        del self.gateways[live.gateway_id].requests[live.attempt.request_id]

    def _withdraw(self, request_id: RequestId, *, is_run: bool = False) -> Request:
        """Out of the queue, without a dispatch; `is_run` if it turned out to be at a worker."""
        request, _ = self.queued.pop(request_id)
        if request_id in self.gate:
            self.gate.remove(request_id)
        else:
            self.policy.remove(request_id)
            if not is_run:
                self.gate.leave(request.attempt, None, now=self.now)
        self._forget_queued(request_id)
        return request

    def _forget_queued(self, request_id: RequestId) -> None:
        self.placement.forget(request_id)
        self.deadlines.cancel(request_id)
        self._drop_live(self.live[request_id])
