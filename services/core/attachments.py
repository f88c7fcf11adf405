"""Workers and gateways come, go and come back; what they say is reconciled with what is known.

State is soft: after a restart of the scheduler, gateways and workers announce what they hold and it
is adopted. Whoever is gone has a grace period; what cannot be settled when that is over is returned
to the gateway, which submits it again from the tokens that it has. Better a request run twice for a
moment (frames of the older attempt are dropped) than one lost.
"""

from services.core.decisions import Abort, Return
from services.core.events import (
    GatewayAttached,
    GatewayDetached,
    RunningRequest,
    WorkerAttached,
    WorkerDetached,
)
from services.core.types import Attempt, GatewayId, RequestId, WorkerId
from services.core.whereabouts import Claim, Gateway, Whereabouts
from services.core.workers import Placed, Worker

# --- workers ------------------------------------------------------------------------------------


def attach_worker(state: Whereabouts, event: WorkerAttached, *, now: float) -> None:
    """A worker is here, for the first time or again: what it announces is what it has."""
    worker = Worker(event, state.placement.fleet)
    worker.capacity = state.capacities.setdefault(event.capacity, event.capacity)
    before = state.workers.get(event.worker_id)
    state.worker_grace.cancel(event.worker_id)
    announced = {running.attempt for running in event.running}
    if before is not None:
        for attempt in list(before.placed):
            if attempt not in announced:
                state.give_back(before, attempt, now=now)
    state.workers[event.worker_id] = worker
    if before is not None:
        for attempt, placed in before.placed.items():
            _keep(state, worker, attempt, placed)
    for running in event.running:
        if running.attempt not in worker.placed:
            _take_over(state, worker, running, now=now)
    for claim in [c for c in state.claims.values() if c.worker_id == event.worker_id]:
        settle_claim(state, claim.attempt.request_id)


def detach_worker(state: Whereabouts, event: WorkerDetached, *, now: float) -> None:
    """A worker is gone, perhaps for a moment."""
    worker = state.workers.get(event.worker_id)
    if worker is not None and worker.is_attached:
        worker.is_attached = False
        worker.hint(())
        state.worker_grace.set(event.worker_id, at_s=now + state.config.worker_grace_s)


def lose_worker(state: Whereabouts, worker_id: WorkerId, *, now: float) -> None:
    """Its grace period is over: its requests go back to their gateways."""
    worker = state.workers[worker_id]
    for attempt in list(worker.placed):
        state.give_back(worker, attempt, now=now)
    del state.workers[worker_id]
    state.placement.forget_refusals()  # a request may have waited for this worker alone


def _keep(state: Whereabouts, worker: Worker, attempt: Attempt, placed: Placed) -> None:
    """Still there: what it was charged stands. An abort may have been lost on the way."""
    worker.keep(attempt, placed)
    if placed.abort_cause is not None:
        state.out.append(Abort(worker.worker_id, attempt, placed.abort_cause))


def _take_over(state: Whereabouts, worker: Worker, running: RunningRequest, *, now: float) -> None:
    """Adopt an announced request, or abort it when it is no longer wanted."""
    unwanted = _unwanted_cause(state, running.attempt)
    if unwanted is None:
        state.adopt(running, worker, now=now)
    else:
        worker.adopt(running)
        state.abort(worker, running.attempt, unwanted)
    claim = state.claims.get(running.attempt.request_id)
    if claim is not None and claim.attempt.number <= running.attempt.number:
        state.drop_claim(running.attempt.request_id)


def _unwanted_cause(state: Whereabouts, attempt: Attempt) -> str | None:
    live = state.live.get(attempt.request_id)
    claim = state.claims.get(attempt.request_id)
    latest = max((known.attempt.number for known in (live, claim) if known), default=0)
    if latest > attempt.number:
        return "superseded"
    if live is not None and live.attempt == attempt and live.worker_id is not None:
        return "duplicate"  # it runs at another worker
    is_cancelled = claim is not None and claim.attempt == attempt and claim.is_cancelled
    if is_cancelled or attempt in state.cancelled:
        return "cancelled"
    return None


# --- gateways -----------------------------------------------------------------------------------


def attach_gateway(state: Whereabouts, event: GatewayAttached, *, now: float) -> None:
    """A gateway is here; what it believes to be placed is checked against the workers."""
    gateway = state.gateways.setdefault(event.gateway_id, Gateway(is_attached=True))
    gateway.is_attached = True
    state.gateway_grace.cancel(event.gateway_id)
    for attempt, worker_id in event.placed:
        _check_placed(state, Claim(attempt, event.gateway_id, worker_id), now=now)


def detach_gateway(state: Whereabouts, event: GatewayDetached, *, now: float) -> None:
    """A gateway is gone, perhaps for a moment."""
    gateway = state.gateways.get(event.gateway_id)
    if gateway is not None and gateway.is_attached:
        gateway.is_attached = False
        state.gateway_grace.set(event.gateway_id, at_s=now + state.config.gateway_grace_s)


def lose_gateway(state: Whereabouts, gateway_id: GatewayId) -> None:
    """Its grace period is over: nobody waits for its requests."""
    for request_id in list(state.gateways[gateway_id].requests):
        state.stop(state.live[request_id], "gateway_lost")
    del state.gateways[gateway_id]
    for claim in state.claims.values():
        claim.is_cancelled |= claim.gateway_id == gateway_id


def settle_claim(state: Whereabouts, request_id: RequestId) -> None:
    """The worker has not come, or came without the request."""
    claim = state.claims[request_id]
    state.drop_claim(request_id)
    if not claim.is_cancelled:
        state.out.append(Return(claim.gateway_id, claim.attempt, claim.worker_id))


def _check_placed(state: Whereabouts, claim: Claim, *, now: float) -> None:
    request_id = claim.attempt.request_id
    live = state.live.get(request_id)
    if live is not None and live.attempt.number >= claim.attempt.number:
        return
    if live is not None:
        state.supersede(live)
    worker = state.workers.get(claim.worker_id)
    if worker is not None and worker.is_attached:
        state.out.append(Return(claim.gateway_id, claim.attempt, claim.worker_id))
        return
    state.claims[request_id] = claim
    state.claim_grace.set(request_id, at_s=now + state.config.worker_grace_s)
