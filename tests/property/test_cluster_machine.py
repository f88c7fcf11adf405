"""Any order of submits, cancels, losses, finishes and returns of gateways and workers."""

from dataclasses import dataclass, field
from typing import assert_never

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.core import decisions as do
from services.core import events as on
from services.core.cluster import ClusterConfig, ClusterScheduler
from services.core.config import MultilevelConfig
from services.core.ledger import need_of
from services.core.policies import build_policy
from services.core.types import Adapter, Attempt, Capacity, GatewayId, Request, RequestId, WorkerId
from tests.unit.core.core_world import adapter, capacity, request

ADAPTERS = [adapter(f"a{index}", blocks=1 + 2 * index) for index in range(5)]
GATEWAYS = [GatewayId("g0"), GatewayId("g1")]
WORKERS = [WorkerId("w0"), WorkerId("w1"), WorkerId("w2")]


@dataclass
class FakeWorker:
    """A worker process: it has what was dispatched to it until it says that it finished."""

    limits: Capacity
    is_attached: bool = False
    is_draining: bool = False
    has: dict[Attempt, Request] = field(default_factory=dict)
    told_to_stop: set[Attempt] = field(default_factory=set)


class ClusterMachine(RuleBasedStateMachine):
    """Keeps what gateways and workers believe, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.numbers: dict[RequestId, int] = {}
        self.requests: dict[Attempt, Request] = {}
        self.left_queue: dict[Attempt, do.ClusterDecision] = {}
        self.returned: set[Attempt] = set()
        self.workers = {
            worker_id: FakeWorker(capacity(20 + 15 * index, requests=3 + index, context=200))
            for index, worker_id in enumerate(WORKERS)
        }

    @initialize(policy=st.sampled_from(["fifo", "multilevel"]))
    def build(self, policy: str) -> None:
        self.policy = policy
        self.cluster, self.twin = self.new_core(), self.new_core()
        for worker_id, worker in list(self.workers.items())[:2]:
            worker.is_attached = True
            self.handle(on.WorkerAttached(worker_id, worker.limits, (), (), draining=False))

    def new_core(self) -> ClusterScheduler:
        levels = MultilevelConfig(
            cutoffs=(50.0, 100.0), shares=(0.3, 0.3, 0.4), bypasses=2, starvation_s=3.0
        )
        return ClusterScheduler(
            ClusterConfig(queue_limit=8), build_policy(self.policy, multilevel=levels)
        )

    def handle(self, event: on.ClusterEvent) -> None:
        decisions = self.cluster.handle(event, now=self.now)
        assert decisions == self.twin.handle(event, now=self.now), "same events, same decisions"
        self.perform(decisions)

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
        needs = [need_of(placed, worker.limits) for placed in worker.has.values()]
        adapters = {need.adapter: need.adapter_blocks for need in needs}
        blocks = sum(need.kv_blocks for need in needs) + sum(adapters.values())
        assert blocks <= worker.limits.pool_blocks
        assert len(needs) <= worker.limits.max_requests

    @rule(
        name=st.integers(0, 9),
        gateway=st.sampled_from(GATEWAYS),
        using=st.sampled_from([None, *ADAPTERS]),
        context=st.integers(1, 120),
        output=st.integers(1, 60),
        priority=st.integers(0, 2),
        patience_s=st.none() | st.floats(0.0, 20.0),
    )
    def submit(
        self,
        *,
        name: int,
        gateway: GatewayId,
        using: Adapter | None,
        context: int,
        output: int,
        priority: int,
        patience_s: float | None,
    ) -> None:
        request_id = RequestId(f"{gateway}-r{name}")
        self.numbers[request_id] = self.numbers.get(request_id, 0) + 1
        new = request(
            request_id,
            number=self.numbers[request_id],
            using=using,
            context=context,
            output=output,
            priority=priority,
            deadline_s=None if patience_s is None else self.now + patience_s,
            gateway=gateway,
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

    @rule(worker_id=st.sampled_from(WORKERS), draining=st.booleans(), data=st.data())
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

    @rule(data=st.data())
    def restart_scheduler(self, data: st.DataObject) -> None:
        """A new core knows nothing; some gateways have not heard of their last placements."""
        self.cluster, self.twin = self.new_core(), self.new_core()
        for worker in self.workers.values():
            worker.is_attached = False
            for placed in sorted(worker.has):
                is_unheard = placed not in self.returned and data.draw(st.booleans())
                if is_unheard and isinstance(self.left_queue.get(placed), do.Dispatch):
                    del self.left_queue[placed]

    @rule(worker_id=st.sampled_from(WORKERS), draining=st.booleans())
    def report(self, *, worker_id: WorkerId, draining: bool) -> None:
        worker = self.workers[worker_id]
        if worker.is_attached:
            worker.is_draining = draining
            self.handle(on.WorkerReported(worker_id, (), draining))

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
        due_s = self.cluster.next_deadline()
        assert due_s is None or due_s > self.now, "a tick settles what is due"

    def tick(self) -> None:
        decisions = self.cluster.tick(now=self.now)
        assert decisions == self.twin.tick(now=self.now)
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
        while any(worker.has for worker in self.workers.values()):
            for worker_id, worker in self.workers.items():
                for gone in list(worker.has):
                    self.finish_one(worker_id, gone)
        snapshot = self.cluster.snapshot(now=self.now)
        assert not snapshot.queued
        assert all(worker.reserved_blocks == 0 for worker in snapshot.workers)
        assert set(self.left_queue) == set(self.requests)


ClusterMachine.TestCase.settings = settings(
    max_examples=250, stateful_step_count=50, deadline=None, derandomize=True
)
TestClusterMachine = ClusterMachine.TestCase
