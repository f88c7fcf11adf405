"""A simulated worker: a ReplicaScheduler, and around it what the live worker's driver does.

It performs decisions in order, runs one step at a time, loads adapters, and tells gateway and
scheduler what they are told live, after the link's latency: a frame per step, started, prefilled,
finished, and its status at most every 50 ms.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol, assert_never

from bench.sim.clients import Work
from bench.sim.engine import Engine, Live, live_of
from bench.sim.faults import Fault, slowness
from bench.sim.hardware import Hardware
from bench.sim.loop import Alarm, EventLoop
from bench.sim.residency import HostCache, LoadCalls, LoadCounts, Residency
from services.core.config import ReplicaConfig
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
    AdapterLoaded,
    AdapterLoadFailed,
    AdapterProgressed,
    AdaptersWanted,
    ClusterEvent,
    HostCacheChanged,
    LoadFailure,
    ReplicaEvent,
    RequestAborted,
    RequestDispatched,
    RequestFinished,
    RequestPrefilled,
    RequestStarted,
    ResidentAdapter,
    StepFinished,
    WorkerAttached,
    WorkerReported,
)
from services.core.replica import ReplicaScheduler
from services.core.types import Adapter, AdapterDigest, Attempt, RequestId, WorkerId

REPORT_S: Final = 0.05


class Peers(Protocol):
    """Whom a worker talks to; each call arrives after the link's latency."""

    def to_scheduler(self, event: ClusterEvent) -> None: ...
    def to_gateway(self, tokens: tuple[Live, ...]) -> None: ...
    def fail(self, attempt: Attempt, reason: str) -> None: ...


@dataclass(slots=True)
class WorkerCounts:
    """What one worker came to."""

    steps: int = 0
    busy_s: float = 0.0
    admitted: int = 0  # requests with an adapter that came here
    hits: int = 0  # of those, whose adapter was in device memory then
    evictions: int = 0
    preemptions: int = 0
    aborted: int = 0
    loads: LoadCounts = field(default_factory=LoadCounts)


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What all workers of a run have in common."""

    loop: EventLoop
    hardware: Hardware
    config: ReplicaConfig
    faults: tuple[Fault, ...]
    host_cache: HostCache  # as a process finds it when it starts
    seed: int
    checks_integrity: bool


class SimWorker:
    """One life of one worker process."""

    def __init__(self, setup: WorkerSetup, peers: Peers, *, index: int, life: int) -> None:
        self.worker_id = WorkerId(f"worker-{index}.{life}")
        self.index = index
        self.is_alive = True
        self.counts = WorkerCounts()
        self.core = ReplicaScheduler(setup.config, setup.hardware.capacity)
        self._setup = setup
        self._loop = setup.loop
        self._peers = peers
        self._engine = Engine(setup.hardware, seed=f"{setup.seed} {self.worker_id}")
        self._residency = Residency(
            setup.loop,
            setup.hardware,
            setup.faults,
            host_cache=setup.host_cache.copy(),
            block_device=self._block_device,
        )
        self.counts.loads = self._residency.counts
        self._calls = LoadCalls(
            self._on_near, self._on_progressed, self._on_loaded, self._on_load_failed
        )
        self._lives: dict[Attempt, Live] = {}
        self._unannounced: dict[RequestId, Live] = {}  # open, and the scheduler was not told so
        self._device: set[AdapterDigest] = set()
        self._device_free_s = 0.0
        self._alarm = Alarm(setup.loop, next_deadline=self.core.next_deadline, ring=self._tick)
        self._reported: tuple[tuple[ResidentAdapter, ...], StepCosts | None] = ((), None)
        self._report_due_s = 0.0
        self._is_report_due = False
        if setup.host_cache.digests:
            self._handle(HostCacheChanged(setup.host_cache.digests))

    def attach(self) -> None:
        """Announce itself to the scheduler."""
        capacity = self._setup.hardware.capacity
        hello = WorkerAttached(self.worker_id, capacity, running=(), resident=(), draining=False)
        self._peers.to_scheduler(hello)

    def die(self) -> None:
        """Whatever is here is gone; what is on its way to others arrives."""
        self.is_alive = False

    # --- what comes in ----------------------------------------------------------------------

    def dispatch(self, work: Work) -> None:
        if not self.is_alive:
            return
        request = work.request
        self._lives[request.attempt] = live_of(work)
        if request.adapter is not None:
            self.counts.admitted += 1
            self.counts.hits += request.adapter.digest in self._device
        self._handle(RequestDispatched(request))

    def abort(self, attempt: Attempt) -> None:
        live = self._lives.get(attempt)
        if self.is_alive and live is not None:
            live.is_ended = True
            self.counts.aborted += 1
            self._handle(RequestAborted(attempt))

    def prefetch(self, adapters: tuple[Adapter, ...]) -> None:
        if self.is_alive:
            self._handle(AdaptersWanted(adapters))

    # --- the machine ------------------------------------------------------------------------

    def _handle(self, event: ReplicaEvent) -> None:
        self._perform(self.core.handle(event, now=self._loop.now))

    def _tick(self) -> None:
        if self.is_alive:
            self._perform(self.core.tick(now=self._loop.now))

    def _perform(self, decisions: Iterable[ReplicaDecision]) -> None:  # noqa: C901 - one case each
        if self._setup.checks_integrity:
            self.core.check_integrity()
        for decision in decisions:
            match decision:
                case RunStep():
                    self._run_step(decision)
                case StartRequest(attempt, _, computed_tokens):
                    self._start(self._lives[attempt], computed_tokens)
                case PreemptRequest(attempt):
                    self._preempt(self._lives[attempt])
                case EndRequest(attempt):
                    self._depart(attempt)
                case FailRequest(attempt, failure):
                    self._peers.fail(attempt, failure)
                    self._depart(attempt)
                case ExpireRequest(attempt):
                    self._depart(attempt)  # its gateway has the same deadline
                case LoadAdapter(adapter):
                    self._load(adapter)
                case EvictAdapter(digest):
                    self.counts.evictions += 1
                    self._device.remove(digest)
                case _:
                    assert_never(decision)
        self._alarm.set()
        self._plan_report()

    # --- steps ------------------------------------------------------------------------------

    def _run_step(self, step: RunStep) -> None:
        self._announce(step)
        now = self._loop.now
        start_s = max(now, self._device_free_s)
        duration_s = self._engine.begin_step(step.work)
        duration_s *= slowness(self._setup.faults, self.index, now)
        self._device_free_s = start_s + duration_s
        self.counts.steps += 1
        self.counts.busy_s += duration_s
        self._loop.at(self._device_free_s, self._end_step)

    def _end_step(self) -> None:
        if not self.is_alive:
            return
        result = self._engine.end_step()
        if result.tokens:
            self._peers.to_gateway(result.tokens)
        for live in result.first_tokens:
            self._peers.to_scheduler(RequestPrefilled(self.worker_id, live.attempt))
        self._handle(StepFinished(result.sampled, result.ended))

    def _block_device(self, duration_s: float) -> float:
        """Nothing else computes for so long, from the end of the present step."""
        self._device_free_s = max(self._loop.now, self._device_free_s) + duration_s
        self.counts.busy_s += duration_s
        return self._device_free_s

    # --- requests ---------------------------------------------------------------------------

    def _start(self, live: Live, computed_tokens: int) -> None:
        self._engine.open(live, computed_tokens=computed_tokens)
        client = live.work.client
        if client.started_s is None:
            client.started_s = self._loop.now
        if not live.is_announced:
            self._unannounced[live.attempt.request_id] = live

    def _announce(self, step: RunStep) -> None:
        """Tell who started. Whose adapter is still coming has not: others may still come first."""
        if not self._unannounced:
            return
        for item in step.work:
            if item.until_layer is None and item.request_id in self._unannounced:
                live = self._unannounced.pop(item.request_id)
                live.is_announced = True
                self._peers.to_scheduler(RequestStarted(self.worker_id, live.attempt))

    def _preempt(self, live: Live) -> None:
        self.counts.preemptions += 1
        live.work.client.preemptions += 1
        self._engine.close(live)

    def _depart(self, attempt: Attempt) -> None:
        live = self._lives.pop(attempt)
        self._engine.close(live)
        if self._unannounced.get(attempt.request_id) is live:
            del self._unannounced[attempt.request_id]
        self._peers.to_scheduler(RequestFinished(self.worker_id, attempt, live.position))

    # --- adapters ---------------------------------------------------------------------------

    def _load(self, adapter: Adapter) -> None:
        self._residency.load(adapter, self._calls)

    def _on_near(self, digests: frozenset[AdapterDigest]) -> None:
        if self.is_alive:
            self._handle(HostCacheChanged(digests))

    def _on_progressed(self, digest: AdapterDigest, layers: int) -> None:
        if self.is_alive:
            self._handle(AdapterProgressed(digest, layers))

    def _on_loaded(self, digest: AdapterDigest) -> None:
        if self.is_alive:
            self._device.add(digest)
            self._handle(AdapterLoaded(digest))

    def _on_load_failed(self, digest: AdapterDigest) -> None:
        if self.is_alive:
            message = "the adapter store does not answer"
            self._handle(AdapterLoadFailed(digest, LoadFailure.UNAVAILABLE, message))

    # --- reports ----------------------------------------------------------------------------

    def _plan_report(self) -> None:
        if not self._is_report_due:
            self._is_report_due = True
            self._loop.at(self._report_due_s, self._report)

    def _report(self) -> None:
        if not self.is_alive:
            return
        self._is_report_due = False
        self._report_due_s = self._loop.now + REPORT_S
        status = (self.core.snapshot().resident, self.core.costs)
        if status != self._reported:
            self._reported = status
            resident, costs = status
            self._peers.to_scheduler(
                WorkerReported(self.worker_id, resident, draining=False, costs=costs)
            )
