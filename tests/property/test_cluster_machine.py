"""Any order of submits, cancels, losses, finishes, squashes and returns, under every policy."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any, assert_never, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from services.core import decisions as do
from services.core import events as on
from services.core.cluster import ClusterConfig, ClusterScheduler
from services.core.costs import StepCosts
from services.core.ledger import Fit, need_of
from services.core.placement import Placement
from services.core.policies import POLICY_NAMES, build_policy
from services.core.queues import Outcome, QueuePolicy, Squashed, Taken
from services.core.tenants import TenantLimits, Tenants
from services.core.types import (
    Adapter,
    Attempt,
    Capacity,
    GatewayId,
    Request,
    RequestId,
    Reserve,
    WorkerId,
)
from tests.unit.core.core_world import adapter, capacity, request

ADAPTERS = [adapter(f"a{index}", blocks=1 + 2 * index) for index in range(5)]
GATEWAYS = [GatewayId("g0"), GatewayId("g1")]
WORKERS = [WorkerId("w0"), WorkerId("w1"), WorkerId("w2")]
CONFIG = ClusterConfig(queue_limit=12, prefill_ahead_s=0.004)
QUOTAS = TenantLimits(tokens_per_s=40.0, burst_tokens=200.0, max_running=4, max_queued=3)

seldom = st.sampled_from([False, False, False, True])
capacities = st.builds(
    capacity,
    st.integers(12, 40),
    requests=st.integers(2, 6),
    context=st.sampled_from([150, 200]),
)
costs = st.builds(
    StepCosts,
    step_s=st.sampled_from([0.0, 0.01, 0.1]),
    prefill_token_s=st.sampled_from([0.0, 2e-4, 2e-3]),
    batch=st.sampled_from([0.5, 16.0]),
)


@dataclass(frozen=True)
class Submission:
    """What a gateway asks for."""

    name: int
    gateway: GatewayId
    using: Adapter | None
    context: int
    output: int
    priority: int
    patience_s: float | None


submissions = st.builds(
    Submission,
    name=st.integers(0, 19),
    gateway=st.sampled_from(GATEWAYS),
    using=st.sampled_from([None, None, None, *ADAPTERS]),
    context=st.integers(1, 60) | st.integers(60, 120),
    output=st.integers(1, 60),
    priority=st.sampled_from([0, 0, 0, 1, 2]),
    patience_s=st.none() | st.floats(0.0, 20.0),
)


@dataclass
class FakeWorker:
    """A worker process: it has what was dispatched to it until it says that it finished."""

    limits: Capacity
    is_attached: bool = False
    is_draining: bool = False
    has: dict[Attempt, Request] = field(default_factory=dict)
    told_to_stop: set[Attempt] = field(default_factory=set)


class Unforgetful:
    """A placer that asks the workers anew each time."""

    version = -1

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self.free_tokens = placement.free_tokens
        self.is_near = placement.is_near
        self.free_in_s = placement.free_in_s

    def __call__(self, request: Request) -> Fit:
        return self._placement.choose(request)


class Watched:
    """A policy that can be made to squash, and looked into."""

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self.victims: list[Attempt] = []
        self.running: dict[Attempt, None] = {}
        self._place: Placement | None = None

    def __len__(self) -> int:
        return len(self.policy)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def take(self, place: Placement, *, now: float) -> Outcome:
        self._place = place
        if self.victims:
            return Squashed(self.victims.pop())
        outcome = self.policy.take(place, now=now)
        if isinstance(outcome, Taken):
            self.running[outcome.request.attempt] = None
        elif isinstance(outcome, Squashed):
            assert outcome.attempt in self.running
            del self.running[outcome.attempt]
        return outcome

    def release(self, attempt: Attempt, *, now: float) -> None:
        self.running.pop(attempt, None)
        self.victims = [one for one in self.victims if one != attempt]
        self.policy.release(attempt, now=now)

    def squash(self, attempt: Attempt) -> None:
        del self.running[attempt]
        self.victims.append(attempt)

    def wants_nothing_more(self, *, now: float) -> bool:
        """True if no memory of a refusal, by policy or placer, keeps a request from going."""
        if self._place is None:
            return True
        policy = copy.deepcopy(self.policy)
        return policy.take(Unforgetful(self._place), now=now) is None


class ClusterMachine(RuleBasedStateMachine):
    """Keeps what gateways and workers believe, and compares."""

    policy_name: str
    config = CONFIG

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.numbers: dict[RequestId, int] = {}
        self.requests: dict[Attempt, Request] = {}
        self.left_queue: dict[Attempt, do.ClusterDecision] = {}
        self.returned: set[Attempt] = set()

    @initialize(limits=st.tuples(capacities, capacities, capacities))
    def build(self, limits: tuple[Capacity, ...]) -> None:
        self.workers = {
            worker_id: FakeWorker(limit) for worker_id, limit in zip(WORKERS, limits, strict=True)
        }
        self.start_cores()
        for worker_id, worker in list(self.workers.items())[:2]:
            worker.is_attached = True
            self.handle(on.WorkerAttached(worker_id, worker.limits, (), (), draining=False))

    def start_cores(self) -> None:
        self.policies = [Watched(build_policy(self.policy_name)) for _ in range(2)]
        self.cluster, self.twin = [
            ClusterScheduler(self.config, cast(QueuePolicy, policy)) for policy in self.policies
        ]

    def handle(self, event: on.ClusterEvent) -> None:
        decisions = self.cluster.handle(event, now=self.now)
        assert decisions == self.twin.handle(event, now=self.now), "same events, same decisions"
        self.check_settled()
        self.perform(decisions)

    def check_settled(self) -> None:
        due_s = self.cluster.next_deadline()
        assert due_s is None or due_s > self.now, "what is due is settled"
        assert self.policies[0].wants_nothing_more(now=self.now), "who can go has gone"

    def perform(self, decisions: list[do.ClusterDecision]) -> None:
        for decision in decisions:
            match decision:
                case do.Dispatch(worker_id, placed, _):
                    self.leave_queue(placed, decision)
                    worker = self.workers[worker_id]
                    assert worker.is_attached
                    if placed not in worker.has:
                        assert not worker.is_draining
                        worker.has[placed] = self.requests[placed]
                        self.check_fit(worker)
                case do.Reject(gateway_id, refused, _, _):
                    assert self.requests[refused].gateway_id == gateway_id
                    self.leave_queue(refused, decision)
                case do.Forget(forgotten):
                    if forgotten not in self.left_queue:
                        self.leave_queue(forgotten, decision)
                case do.Return(gateway_id, returned, _):
                    assert self.requests[returned].gateway_id == gateway_id
                    self.returned.add(returned)
                case do.Abort(worker_id, stopped, _):
                    assert self.workers[worker_id].is_attached
                    self.workers[worker_id].told_to_stop.add(stopped)
                case do.Prefetch(worker_id, adapters):
                    assert self.workers[worker_id].is_attached
                    assert len(adapters) <= 8
                case _:
                    assert_never(decision)

    def leave_queue(self, gone: Attempt, decision: do.ClusterDecision) -> None:
        assert gone not in self.left_queue, "an attempt leaves the queue once"
        self.left_queue[gone] = decision

    def check_fit(self, worker: FakeWorker) -> None:
        needs = [
            need_of(placed, worker.limits, Reserve.PREDICTED) for placed in worker.has.values()
        ]
        adapters = {need.adapter: need.adapter_blocks for need in needs}
        blocks = sum(need.kv_blocks for need in needs) + sum(adapters.values())
        assert blocks <= worker.limits.pool_blocks
        assert len(needs) <= worker.limits.max_requests

    @rule(burst=st.lists(submissions, min_size=1, max_size=6))
    def submit(self, burst: list[Submission]) -> None:
        for one in burst:
            request_id = RequestId(f"{one.gateway}-r{one.name}")
            self.numbers[request_id] = self.numbers.get(request_id, 0) + 1
            new = request(
                request_id,
                number=self.numbers[request_id],
                using=one.using,
                context=one.context,
                output=one.output,
                priority=one.priority,
                arrived_s=self.now,
                deadline_s=None if one.patience_s is None else self.now + one.patience_s,
                gateway=one.gateway,
                tenant=f"t{one.name % 3}",
            )
            self.requests[new.attempt] = new
            self.handle(on.RequestSubmitted(new))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        known = data.draw(st.sampled_from(list(self.requests)))
        holders = [w for w in self.workers.values() if known in w.has and w.is_attached]
        if known not in self.left_queue or holders:
            self.handle(on.RequestSubmitted(self.requests[known]))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(list(self.requests)))
        self.handle(on.RequestCancelled(gone, "client_cancelled"))

    @rule(worker_id=st.sampled_from(WORKERS), draining=seldom, data=st.data())
    def attach_worker(self, *, worker_id: WorkerId, draining: bool, data: st.DataObject) -> None:
        worker = self.workers[worker_id]
        lost = data.draw(st.sets(st.sampled_from(sorted(worker.has)))) if worker.has else set()
        for attempt in lost:
            del worker.has[attempt]
        worker.is_attached, worker.is_draining = True, draining
        announced = tuple(
            on.RunningRequest(
                placed.attempt,
                placed.gateway_id,
                placed.adapter.digest if placed.adapter else None,
                placed.context_tokens,
                placed.remaining_output_tokens,
            )
            for placed in worker.has.values()
        )
        resident = tuple(
            on.ResidentAdapter(used.digest, worker.limits.adapter_blocks(used), 1)
            for used in {p.adapter: None for p in worker.has.values()}
            if used is not None
        )
        event = on.WorkerAttached(worker_id, worker.limits, announced, resident, draining)
        self.handle(event)

    @precondition(lambda self: all(worker.is_attached for worker in self.workers.values()))
    @rule(data=st.data())
    def restart_scheduler(self, data: st.DataObject) -> None:
        """A new core knows nothing; some gateways have not heard of their last placements."""
        self.start_cores()
        for worker in self.workers.values():
            worker.is_attached = False
            for placed in sorted(worker.has):
                is_unheard = placed not in self.returned and data.draw(st.booleans())
                if is_unheard and isinstance(self.left_queue.get(placed), do.Dispatch):
                    del self.left_queue[placed]

    @rule(worker_id=st.sampled_from(WORKERS), draining=seldom, measured=st.none() | costs)
    def report(self, *, worker_id: WorkerId, draining: bool, measured: StepCosts | None) -> None:
        worker = self.workers[worker_id]
        if worker.is_attached:
            worker.is_draining = draining
            self.handle(on.WorkerReported(worker_id, (), draining, measured))

    @rule(worker_id=st.sampled_from(WORKERS), has_token=st.booleans(), data=st.data())
    def go_on(self, *, worker_id: WorkerId, has_token: bool, data: st.DataObject) -> None:
        worker = self.workers[worker_id]
        if worker.is_attached and worker.has:
            one = data.draw(st.sampled_from(sorted(worker.has)))
            event = on.RequestPrefilled if has_token else on.RequestStarted
            self.handle(event(worker_id, one))

    @precondition(lambda self: self.policies and self.policies[0].running)
    @rule(data=st.data())
    def squash(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(sorted(self.policies[0].running)))
        for policy in self.policies:
            policy.squash(victim)
        self.tick()

    @precondition(lambda self: self.returned)
    @rule(data=st.data(), tokens=st.integers(0, 5))
    def come_back(self, data: st.DataObject, tokens: int) -> None:
        """A gateway submits again what was returned to it, unless it did so before."""
        source = self.requests[data.draw(st.sampled_from(sorted(self.returned)))]
        request_id, number = source.attempt.request_id, source.attempt.number
        if self.numbers[request_id] == number:
            self.numbers[request_id] = number + 1
            again = replace(
                source,
                attempt=Attempt(request_id, number + 1),
                context_tokens=source.context_tokens + tokens,
                prior_output_tokens=source.prior_output_tokens + tokens,
            )
            self.requests[again.attempt] = again
            self.handle(on.RequestSubmitted(again))

    @rule(worker_id=st.sampled_from(WORKERS))
    def detach_worker(self, worker_id: WorkerId) -> None:
        self.workers[worker_id].is_attached = False
        self.handle(on.WorkerDetached(worker_id))

    @rule(worker_id=st.sampled_from(WORKERS), data=st.data())
    def finish(self, worker_id: WorkerId, data: st.DataObject) -> None:
        worker = self.workers[worker_id]
        if worker.is_attached and worker.has:
            gone = data.draw(st.sampled_from(sorted(worker.has)))
            self.finish_one(worker_id, gone)

    def finish_one(self, worker_id: WorkerId, gone: Attempt) -> None:
        del self.workers[worker_id].has[gone]
        self.handle(on.RequestStarted(worker_id, gone))
        self.handle(on.RequestFinished(worker_id, gone, 1))

    @rule(gateway_id=st.sampled_from(GATEWAYS), data=st.data())
    def attach_gateway(self, gateway_id: GatewayId, data: st.DataObject) -> None:
        mine = [
            (placed, decision.worker_id)
            for placed, decision in self.left_queue.items()
            if isinstance(decision, do.Dispatch)
            and self.requests[placed].gateway_id == gateway_id
            and placed not in self.returned
        ]
        forgets = data.draw(st.sets(st.sampled_from(mine), max_size=2)) if mine else set()
        placed = [claim for claim in mine if claim not in forgets]
        self.attach_and_resubmit(gateway_id, tuple(placed))

    def attach_and_resubmit(
        self, gateway_id: GatewayId, placed: tuple[tuple[Attempt, WorkerId], ...]
    ) -> None:
        self.handle(on.GatewayAttached(gateway_id, placed))
        for queued in [a for a in self.requests if a not in self.left_queue]:
            if self.requests[queued].gateway_id == gateway_id:
                self.handle(on.RequestSubmitted(self.requests[queued]))

    @rule(gateway_id=st.sampled_from(GATEWAYS))
    def detach_gateway(self, gateway_id: GatewayId) -> None:
        self.handle(on.GatewayDetached(gateway_id))

    @rule(wait_s=st.sampled_from([0.01, 0.1, 1.0, 3.0, 6.0, 12.0, 40.0]))
    def wait(self, wait_s: float) -> None:
        self.now += wait_s
        self.tick()

    def tick(self) -> None:
        decisions = self.cluster.tick(now=self.now)
        assert decisions == self.twin.tick(now=self.now)
        self.check_settled()
        self.perform(decisions)

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.check_integrity()
            self.cluster.snapshot(now=self.now)

    def teardown(self) -> None:
        """With all gateways and workers back and finishing, every request leaves."""
        if not hasattr(self, "cluster"):
            return
        for gateway_id in GATEWAYS:
            self.attach_and_resubmit(gateway_id, ())
        for worker_id, worker in self.workers.items():
            worker.has.clear()
            worker.is_attached, worker.is_draining = True, False
            self.handle(on.WorkerAttached(worker_id, worker.limits, (), (), draining=False))
        while any(worker.has for worker in self.workers.values()) or self.wait_for_next():
            for worker_id, worker in self.workers.items():
                for gone in list(worker.has):
                    self.finish_one(worker_id, gone)
        snapshot = self.cluster.snapshot(now=self.now)
        assert not snapshot.queued
        assert all(worker.reserved_blocks == 0 for worker in snapshot.workers)
        assert all(queue.length == 0 for queue in snapshot.queues)
        assert all(queue.used_tokens == 0 for queue in snapshot.queues)
        assert set(self.left_queue) == set(self.requests)

    def wait_for_next(self) -> bool:
        """False if nobody waits. A policy may hold requests back for a while, not for ever."""
        if not self.cluster.snapshot(now=self.now).queued:
            return False
        due_s = self.cluster.next_deadline()
        assert due_s is not None, "who waits with idle workers waits for a time"
        self.now = due_s
        self.tick()
        return True


def check(machine: type[ClusterMachine], *, examples: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, derandomize=True
        ),
    )


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_whatever_happens_the_cluster_stays_sound(policy: str) -> None:
    class Machine(ClusterMachine):
        policy_name = policy

    check(Machine, examples=200 if policy in {"adaptive", "chameleon"} else 40)


def test_whatever_happens_the_cluster_stays_sound_with_quotas_of_tenants() -> None:
    class Machine(ClusterMachine):
        policy_name = "adaptive"
        config = replace(CONFIG, tenants=Tenants(default=QUOTAS))

    check(Machine, examples=150)
