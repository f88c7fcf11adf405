"""One run: gateway, scheduler and workers around the real machines, in virtual time.

Every message between two of them takes the link's latency. Same scenario, same result, to the byte:
events are ordered by time and by when they were made, and randomness is seeded per user of it.
"""

from dataclasses import dataclass, field
from typing import Final

from bench.sim.clients import Work
from bench.sim.engine import Live
from bench.sim.faults import Fault, WorkerLoss
from bench.sim.gateway import SimGateway
from bench.sim.hardware import Hardware
from bench.sim.loop import EventLoop
from bench.sim.predictors import Oracle, Predictor, PredictorKind
from bench.sim.records import QueueSample, Result, Sample, WorkerRecord, records_of
from bench.sim.residency import HostCache
from bench.sim.scheduler import SimScheduler
from bench.sim.worker import SimWorker, WorkerSetup
from bench.workload.trace import Trace
from services.core.cluster import ClusterScheduler
from services.core.events import ClusterEvent, WorkerDetached
from services.core.policies import build_policy
from services.core.systems import System
from services.core.types import Adapter, Attempt, WorkerId

_SETTLE_S: Final = 1.0  # after the last request and a worker's grace, for reports under way


@dataclass(frozen=True, slots=True)
class Window:
    """What is measured. Everything runs on after the last arrival until it has ended, or for
    `drain_s`; what is here then is unfinished.
    """

    warmup_s: float = 0.0  # requests that arrive before are not measured
    drain_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """All that a run depends on."""

    system: System
    hardware: Hardware
    trace: Trace
    workers: int = 1
    predictor: PredictorKind = field(default_factory=Oracle)
    faults: tuple[Fault, ...] = ()
    seed: int = 0
    link_s: float = 0.0005  # of any message, one way
    window: Window = field(default_factory=Window)
    patience_s: float | None = None  # a client that has no token by then leaves
    sample_s: float | None = 1.0  # between two samples of the timeline; None: none
    checks_integrity: bool = (
        False  # of both machines after every event, and of the books at the end
    )


def simulate(scenario: Scenario) -> Result:
    """Run it."""
    return _Run(scenario).run()


class _Run:
    """Connects the parts; it is every part's peers."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._loop = loop = EventLoop()
        self._link_s = scenario.link_s
        self._arrivals_left = True
        self._timeline: list[Sample] = []
        self._setup = WorkerSetup(
            loop=loop,
            hardware=scenario.hardware,
            config=scenario.system.replica,
            faults=scenario.faults,
            host_cache=_host_cache(scenario),
            seed=scenario.seed,
            checks_integrity=scenario.checks_integrity,
        )
        policy = build_policy(
            scenario.system.policy,
            scenario.system.policy_config,
            tenants=scenario.system.cluster.tenants,
        )
        self._scheduler = SimScheduler(
            loop,
            ClusterScheduler(scenario.system.cluster, policy),
            self,
            checks_integrity=scenario.checks_integrity,
        )
        predictor = Predictor(scenario.predictor, scenario.trace.arrivals, seed=scenario.seed)
        self._gateway = SimGateway(
            loop, predictor, self, seed=scenario.seed, patience_s=scenario.patience_s
        )
        self._lives: dict[WorkerId, SimWorker] = {}  # every life of every worker
        self._present: dict[int, SimWorker] = {}

    def run(self) -> Result:
        scenario, loop = self._scenario, self._loop
        for index in range(scenario.workers):
            self._start_worker(index)
        self._plan_faults()
        if scenario.sample_s is not None:
            self._sample()
        self._gateway.run(scenario.trace.arrivals, on_last=self._note_last)
        limit_s = scenario.trace.duration_s + scenario.window.drain_s
        loop.run(until_s=limit_s, is_done=self._is_done)
        end_s = min(loop.now, limit_s)
        is_complete = self._is_done()
        self._gateway.close()
        if is_complete and scenario.checks_integrity:
            settled_s = loop.now + scenario.system.cluster.worker_grace_s + _SETTLE_S
            loop.run(until_s=settled_s, is_done=lambda: False)
            self._check_empty()
        return self._result(end_s)

    # --- messages, each on its way for the link's latency -------------------------------------

    def submit(self, work: Work) -> None:
        self._loop.after(self._link_s, lambda: self._scheduler.submit(work))

    def cancel(self, attempt: Attempt, cause: str) -> None:
        self._loop.after(self._link_s, lambda: self._scheduler.cancel(attempt, cause))

    def reject(self, attempt: Attempt, reason: str) -> None:
        self._loop.after(self._link_s, lambda: self._gateway.reject(attempt, reason))

    def give_back(self, attempt: Attempt) -> None:
        self._loop.after(self._link_s, lambda: self._gateway.give_back(attempt))

    def dispatch(self, worker_id: WorkerId, work: Work) -> None:
        worker = self._lives[worker_id]
        self._loop.after(self._link_s, lambda: worker.dispatch(work))

    def abort(self, worker_id: WorkerId, attempt: Attempt) -> None:
        worker = self._lives[worker_id]
        self._loop.after(self._link_s, lambda: worker.abort(attempt))

    def prefetch(self, worker_id: WorkerId, adapters: tuple[Adapter, ...]) -> None:
        worker = self._lives[worker_id]
        self._loop.after(self._link_s, lambda: worker.prefetch(adapters))

    def to_scheduler(self, event: ClusterEvent) -> None:
        self._loop.after(self._link_s, lambda: self._scheduler.handle(event))

    def to_gateway(self, tokens: tuple[Live, ...]) -> None:
        self._loop.after(self._link_s, lambda: self._gateway.tokens(tokens))

    def fail(self, attempt: Attempt, reason: str) -> None:
        self._loop.after(self._link_s, lambda: self._gateway.fail(attempt, reason))

    # --- workers ----------------------------------------------------------------------------

    def _start_worker(self, index: int) -> None:
        life = sum(worker.index == index for worker in self._lives.values())
        worker = SimWorker(self._setup, self, index=index, life=life)
        self._lives[worker.worker_id] = self._present[index] = worker
        worker.attach()

    def _plan_faults(self) -> None:
        for fault in self._scenario.faults:
            if isinstance(fault, WorkerLoss):
                self._plan_loss(fault)

    def _plan_loss(self, fault: WorkerLoss) -> None:
        index = fault.worker
        self._loop.at(fault.at_s, lambda: self._lose(index))
        if fault.back_s is not None:
            self._loop.at(fault.back_s, lambda: self._start_worker(index))

    def _lose(self, index: int) -> None:
        worker = self._present[index]
        worker.die()
        self.to_scheduler(WorkerDetached(worker.worker_id))

    # --- the end, and what is seen before -----------------------------------------------------

    def _note_last(self) -> None:
        self._arrivals_left = False

    def _is_done(self) -> bool:
        return not self._arrivals_left and self._gateway.open == 0

    def _sample(self) -> None:
        assert self._scenario.sample_s is not None
        now = self._loop.now
        queues = self._scheduler.core.snapshot(now=now).queues
        states = [worker.core.snapshot() for worker in self._present.values() if worker.is_alive]
        lives = [worker.counts for worker in self._lives.values()]
        self._timeline.append(
            Sample(
                time_s=now,
                queues=tuple(
                    QueueSample(q.name, q.length, q.oldest_s, q.quota_tokens, q.used_tokens)
                    for q in queues
                ),
                running=sum(state.running for state in states),
                loading=sum(state.loading for state in states),
                kv_blocks=sum(state.kv_blocks for state in states),
                adapter_blocks=sum(state.adapter_blocks for state in states),
                free_blocks=sum(state.free_blocks for state in states),
                adapter_uses=sum(counts.admitted for counts in lives),
                adapter_hits=sum(counts.hits for counts in lives),
                loaded_bytes=sum(counts.loads.loaded_bytes for counts in lives),
            )
        )
        self._loop.after(self._scenario.sample_s, self._sample)

    def _check_empty(self) -> None:
        """Every request has ended: nobody may hold anything for one."""
        self._scheduler.check_empty()
        for client in self._gateway.clients:
            assert client.outcome is not None
            assert client.outcome != "done" or client.emitted == client.arrival.output_tokens
        for worker in self._present.values():
            if worker.is_alive:
                state = worker.core.snapshot()
                assert state.kv_blocks == 0
                assert not worker.core.announcements()
                assert all(adapter.users == 0 for adapter in state.resident)

    def _result(self, end_s: float) -> Result:
        scenario = self._scenario
        return Result(
            system=scenario.system.name,
            trace=scenario.trace.name,
            seed=scenario.seed,
            measured_from_s=scenario.window.warmup_s,
            end_s=end_s,
            returns=self._scheduler.returns,
            requests=records_of(self._gateway.clients, scenario.hardware),
            workers=tuple(_worker_record(worker) for worker in self._lives.values()),
            timeline=tuple(self._timeline),
        )


def _host_cache(scenario: Scenario) -> HostCache:
    hardware = scenario.hardware
    warm = scenario.trace.adapters if hardware.is_host_warm else ()
    return HostCache(hardware.host_cache_bytes, warm)


def _worker_record(worker: SimWorker) -> WorkerRecord:
    counts = worker.counts
    return WorkerRecord(
        worker_id=worker.worker_id,
        steps=counts.steps,
        busy_s=counts.busy_s,
        cache_hits=counts.hits,
        cache_misses=counts.admitted - counts.hits,
        loads=counts.loads.loads,
        loaded_bytes=counts.loads.loaded_bytes,
        downloads=counts.loads.downloads,
        downloaded_bytes=counts.loads.downloaded_bytes,
        evictions=counts.evictions,
        preemptions=counts.preemptions,
        aborted=counts.aborted,
    )
