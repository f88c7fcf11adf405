"""What the tests of the core share: values, an engine that checks its orders, and a small world.

`CheckingEngine` does what a worker's engine would and asserts the contract of every decision.
`World` runs one ClusterScheduler and several ReplicaSchedulers in virtual time, with a gateway that
counts every token and submits again what is returned to it.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from itertools import count
from typing import assert_never

from services.core import decisions as do
from services.core import events as on
from services.core.cluster import ClusterScheduler
from services.core.config import ClusterConfig
from services.core.costs import StepCosts
from services.core.policies.fifo import Fifo
from services.core.queues import QueuePolicy
from services.core.replica import ReplicaConfig, ReplicaScheduler
from services.core.snapshots import WaitCause
from services.core.types import (
    Adapter,
    AdapterDigest,
    Attempt,
    Capacity,
    GatewayId,
    Request,
    RequestId,
    TenantId,
    WorkerId,
)

GATEWAY = GatewayId("g")


def adapter(name: str = "a", *, blocks: int = 2, rank: int = 8) -> Adapter:
    """An adapter of so many blocks of 1,000 bytes."""
    return Adapter(AdapterDigest(name), rank, blocks * 1000)


def capacity(blocks: int = 100, *, requests: int = 16, context: int = 1000) -> Capacity:
    """A worker of so many blocks of ten tokens."""
    return Capacity(blocks, 1000, 10, requests, context)


def attempt(name: str, number: int = 1) -> Attempt:
    return Attempt(RequestId(name), number)


def request(
    name: str,
    *,
    number: int = 1,
    using: Adapter | None = None,
    context: int = 10,
    output: int = 10,
    output_max: int | None = None,
    output_q90: int | None = None,
    prior: int = 0,
    priority: int = 0,
    arrived_s: float = 0.0,
    deadline_s: float | None = None,
    gateway: GatewayId = GATEWAY,
    tenant: str = "t",
    text: str = "",
) -> Request:
    """A request of `context` tokens that is expected to generate `output`.

    Each character of `text` stands for what is in one of its first full blocks.
    """
    return Request(
        attempt=attempt(name, number),
        gateway_id=gateway,
        tenant_id=TenantId(tenant),
        adapter=using,
        context_tokens=context,
        prior_output_tokens=prior,
        max_output_tokens=output_max if output_max is not None else output,
        predicted_output_tokens=output,
        output_tokens_q90=output_q90 if output_q90 is not None else output,
        priority=priority,
        arrived_s=arrived_s,
        deadline_s=deadline_s,
        prefix_keys=keys_of(text, using=using, tenant=tenant),
    )


def keys_of(text: str, *, using: Adapter | None = None, tenant: str = "t") -> tuple[bytes, ...]:
    """Keys of blocks with that in them, readable ones."""
    name = f"{using.digest if using else 'base'}/{tenant}/"
    return tuple(f"{name}{text[:end]}".encode() for end in range(1, len(text) + 1))


class CheckingEngine:
    """Device memory and sequences of one worker. `outputs` are the true lengths, by request.

    What is in a block it knows by its key; a character "o" stands for a block of output.
    """

    def __init__(self, limits: Capacity, config: ReplicaConfig) -> None:
        self.limits = limits
        self.config = config
        self.loaded: dict[AdapterDigest, Adapter] = {}
        self.loading: dict[AdapterDigest, Adapter] = {}
        self.near: frozenset[AdapterDigest] = frozenset()  # in host memory, as the replica is told
        self.known: dict[Attempt, tuple[Request, int]] = {}  # dispatched here, with known tokens
        self.open: dict[Attempt, int] = {}  # computed tokens
        self.tables: dict[Attempt, list[int]] = {}  # blocks of those, in order
        self.content: dict[int, bytes] = {}  # of blocks that are full, if they have a key
        self.hit_tokens: dict[Attempt, int] = {}  # that were there when it started, last
        self.adapter_blocks: dict[AdapterDigest, tuple[int, ...]] = {}  # of loaded and loading
        self.ready: dict[AdapterDigest, int] = {}  # layers here of those that are loading
        # Tokens of a chunk that has not passed all layers, and how many it has passed.
        self.parts: dict[Attempt, tuple[int, int]] = {}
        self.step: tuple[do.StepWork, ...] | None = None
        self.left: dict[Attempt, do.ReplicaDecision] = {}
        self.generated: dict[Attempt, int] = {}  # by those that have left
        self.sampled: list[tuple[Attempt, int]] = []  # of the last step, with positions
        self.preemptions = 0
        self.loads = 0

    def receive(self, new: Request) -> None:
        """A request is dispatched here."""
        self.known.setdefault(new.attempt, (new, new.context_tokens))

    def perform(self, decisions: Iterable[do.ReplicaDecision]) -> None:
        """Obey, and complain about orders that break the contract."""
        for decision in decisions:
            match decision:
                case do.LoadAdapter(wanted, blocks):
                    assert wanted.digest not in self.loaded
                    assert wanted.digest not in self.loading
                    assert len(blocks) == self.limits.adapter_blocks(wanted)
                    self.adapter_blocks[wanted.digest] = blocks
                    self._overwrite(blocks)
                    downloads = sum(digest not in self.near for digest in self.loading)
                    assert wanted.digest in self.near or downloads < self.config.max_loads
                    self.loading[wanted.digest] = wanted
                    self.loads += 1
                case do.EvictAdapter(digest):
                    assert digest not in self._digests_in_use(), "evicted while in use"
                    del self.loaded[digest], self.adapter_blocks[digest]
                case do.StartRequest(started, blocks, computed_tokens):
                    assert started not in self.open
                    assert self.step is None
                    using = self.known[started][0].adapter
                    assert using is None or using.digest in self.loaded or self.ready[using.digest]
                    self._check_prefix(started, blocks, computed_tokens)
                    self.open[started] = self.hit_tokens[started] = computed_tokens
                    self.tables[started] = [*blocks]
                case do.PreemptRequest(preempted):
                    assert self.step is None
                    del self.open[preempted], self.tables[preempted]
                    self.parts.pop(preempted, None)
                    self.preemptions += 1
                case do.EndRequest(gone) | do.ExpireRequest(gone) | do.FailRequest(gone):
                    self._leave(gone, decision)
                case do.RunStep(work, new_blocks):
                    assert dict(new_blocks).keys() <= {one.request_id for one in work}
                    for request_id, blocks in new_blocks:
                        self.tables[self._open_attempt(request_id)] += blocks
                    self._begin(work)
                case _:
                    assert_never(decision)
            self._check_memory()

    def finish_step(
        self, outputs: dict[RequestId, int], *, failing: Container[RequestId] = ()
    ) -> on.StepFinished:
        """The outstanding step ends: due tokens are sampled, complete requests end."""
        assert self.step is not None
        sampled, ended, more_keys = [], [], []
        self.sampled = []
        for work in self.step:
            current = self._open_attempt(work.request_id)
            if work.request_id in failing:
                ended.append(work.request_id)
                self._spoil(current)
                continue
            if work.until_layer is not None:
                self.parts[current] = (work.tokens, work.until_layer)
                continue
            self.parts.pop(current, None)
            self._compute(current, work.tokens)
            if work.samples:
                source, tokens = self.known[current]
                self.known[current] = (source, tokens + 1)
                sampled.append(work.request_id)
                self.sampled.append((current, tokens))
                generated = tokens + 1 - source.context_tokens + source.prior_output_tokens
                if generated >= outputs[work.request_id]:
                    ended.append(work.request_id)
                    more_keys.append((work.request_id, self._more_keys(current)))
        self.step = None
        return on.StepFinished(tuple(sampled), tuple(ended), tuple(more_keys))

    def progress(self, digest: AdapterDigest, layers: int) -> on.AdapterProgressed:
        self.ready[digest] = max(layers, self.ready.get(digest, 0))
        return on.AdapterProgressed(digest, layers)

    def finish_load(self, digest: AdapterDigest) -> on.AdapterLoaded:
        self.ready.pop(digest, None)
        self.loaded[digest] = self.loading.pop(digest)
        return on.AdapterLoaded(digest)

    def fail_load(self, digest: AdapterDigest) -> on.AdapterLoadFailed:
        del self.loading[digest], self.adapter_blocks[digest]
        self.ready.pop(digest, None)
        return on.AdapterLoadFailed(digest, on.LoadFailure.UNAVAILABLE, "store down")

    def _begin(self, steps: tuple[do.StepWork, ...]) -> None:
        assert self.step is None, "one RunStep at most is outstanding"
        assert steps
        assert len({work.request_id for work in steps}) == len(steps)
        in_step, prefill_tokens, seen_prefill = set(), 0.0, False
        for work in steps:
            current = self._open_attempt(work.request_id)
            in_step.add(current)
            due = self.known[current][1] - self.open[current]
            assert 1 <= work.tokens <= due
            assert work.samples == (work.tokens == due and work.until_layer is None)
            is_prompt = due > 1 or work.until_layer is not None
            if is_prompt:
                seen_prefill = True
                prefill_tokens += work.tokens * self._share(current, work)
            assert is_prompt or not seen_prefill, "decodes come first"
        if self.config.stepping == "chunked":
            assert prefill_tokens <= self.config.prefill_tokens_per_step + 1e-6
        if self.config.stepping == "whole" and seen_prefill:
            assert all(work.until_layer is None for work in steps)
            self.step = steps
            return
        decoding = {a for a in self.open if self.known[a][1] - self.open[a] == 1}
        decoding = {a for a in decoding if self._has_adapter(a)}
        assert decoding <= in_step, "a step leaves out no decode"
        self.step = steps

    def _share(self, current: Attempt, work: do.StepWork) -> float:
        """The share of layers that a work passes, after a look at whether it may."""
        num_layers = self.limits.num_layers
        tokens, passed = self.parts.get(current, (work.tokens, 0))
        assert work.tokens == tokens, "a chunk keeps its tokens until it has passed all layers"
        if work.until_layer is None:
            assert self._has_adapter(current)
            return (num_layers - passed) / num_layers if passed else 1.0
        assert passed < work.until_layer < num_layers
        using = self.known[current][0].adapter
        assert using is not None
        assert using.digest in self.loaded or work.until_layer <= self.ready[using.digest]
        return (work.until_layer - passed) / num_layers

    def _has_adapter(self, current: Attempt) -> bool:
        using = self.known[current][0].adapter
        return using is None or using.digest in self.loaded

    def _leave(self, gone: Attempt, decision: do.ReplicaDecision) -> None:
        assert gone not in self.left, "a request leaves once"
        if self.step is not None and gone in self.open:
            assert all(work.request_id != gone.request_id for work in self.step)
        self.open.pop(gone, None)
        self.tables.pop(gone, None)
        self.parts.pop(gone, None)
        if gone in self.known:
            source, tokens = self.known.pop(gone)
            self.generated[gone] = tokens - source.context_tokens
        self.left[gone] = decision

    def _open_attempt(self, request_id: RequestId) -> Attempt:
        found = [known for known in self.open if known.request_id == request_id]
        assert len(found) == 1
        return found[0]

    def _digests_in_use(self) -> set[AdapterDigest]:
        users = [self.known[opened][0].adapter for opened in self.open]
        return {used.digest for used in users if used is not None}

    def _check_memory(self) -> None:
        chunks = {current: tokens for current, (tokens, _) in self.parts.items()}
        chunks |= {self._open_attempt(work.request_id): work.tokens for work in self.step or ()}
        for current, computed in self.open.items():
            tokens = computed + chunks.get(current, 0)
            assert len(self.tables[current]) >= self.limits.kv_blocks(tokens), "blocks are missing"
        holders = Counter(block for table in self.tables.values() for block in table)
        own = [block for blocks in self.adapter_blocks.values() for block in blocks]
        holders.update(own)
        for current, table in self.tables.items():
            own += table[self.open[current] // self.limits.block_tokens :]
        assert all(holders[block] == 1 for block in own), "what is written has one holder"
        assert holders.keys() <= set(range(self.limits.pool_blocks))

    # --- what is in blocks ------------------------------------------------------------------

    def forget(self, digest: AdapterDigest | None) -> None:
        """Nothing that is idle and was computed with this adapter may be found."""
        held = {block for table in self.tables.values() for block in table}
        name = f"{digest or 'base'}/".encode()
        for block, key in [*self.content.items()]:
            if block not in held and key.startswith(name):
                del self.content[block]

    def _check_prefix(self, started: Attempt, blocks: tuple[int, ...], tokens: int) -> None:
        source, known_tokens = self.known[started]
        assert tokens == len(blocks) * self.limits.block_tokens
        assert tokens < known_tokens, "a token is left to compute"
        found = [self.content.get(block) for block in blocks]
        assert found == [*source.prefix_keys[: len(blocks)]], "a block holds something else"

    def _compute(self, current: Attempt, tokens: int) -> None:
        block_tokens, table = self.limits.block_tokens, self.tables[current]
        begin = self.open[current]
        end = self.open[current] = begin + tokens
        written = range(begin // block_tokens, self.limits.kv_blocks(end))
        self._overwrite([table[index] for index in written])
        keys = self.known[current][0].prefix_keys
        for index in range(begin // block_tokens, end // block_tokens):
            if keys:
                outputs = b"o" * (index + 1 - len(keys))
                self.content[table[index]] = keys[-1] + outputs if outputs else keys[index]

    def _more_keys(self, current: Attempt) -> tuple[bytes, ...]:
        keys = self.known[current][0].prefix_keys
        if not keys:
            return ()
        full = self.open[current] // self.limits.block_tokens
        return tuple(keys[-1] + b"o" * count for count in range(1, full - len(keys) + 1))

    def _spoil(self, failed: Attempt) -> None:
        """It computes nothing of use, and it may have got it from what was cached."""
        self._overwrite(self.tables[failed])
        using = self.known[failed][0].adapter
        self.forget(using.digest if using else None)

    def _overwrite(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.content.pop(block, None)


def without_blocks(decisions: Iterable[do.ReplicaDecision]) -> list[do.ReplicaDecision]:
    """The decisions as tests read them that are not about which block is whose."""
    plain: list[do.ReplicaDecision] = []
    for decision in decisions:
        match decision:
            case do.LoadAdapter() | do.StartRequest():
                plain.append(replace(decision, blocks=()))
            case do.RunStep() if decision.new_blocks:
                plain.append(replace(decision, new_blocks=()))
            case _:
                plain.append(decision)
    return plain


def went(
    worker_id: WorkerId,
    name: str,
    queue_s: float = 0.0,
    *,
    number: int = 1,
    queue: str = "fifo",
    waited_for: WaitCause = "nothing",
) -> do.Dispatch:
    """The decision that sends a request to a worker."""
    return do.Dispatch(worker_id, attempt(name, number), queue_s, queue, waited_for)


# Without hints; what the figures of scenes depend on is told, whatever the defaults are.
QUIET = ClusterConfig(prefetch_depth=0, prefill_ahead_s=0.1, load_bound=1.25)


class Scene:
    """A cluster with one call per event; every call checks it and returns the decisions."""

    def __init__(
        self,
        *workers: WorkerId,
        policy: QueuePolicy | None = None,
        config: ClusterConfig | None = None,
        limits: Capacity | None = None,
        has_gateway: bool = True,
    ) -> None:
        policy = Fifo() if policy is None else policy
        self.cluster = ClusterScheduler(config or QUIET, policy)
        if has_gateway:
            self.gateway()
        for worker_id in workers:
            self.worker(worker_id, limits=limits)

    def handle(self, event: on.ClusterEvent, now: float) -> list[do.ClusterDecision]:
        decisions = self.cluster.handle(event, now=now)
        self.cluster.check_integrity()
        due_s = self.cluster.next_deadline()
        assert due_s is None or due_s > now, "an event settles what is due"
        return decisions

    def tick(self, now: float) -> list[do.ClusterDecision]:
        decisions = self.cluster.tick(now=now)
        self.cluster.check_integrity()
        due_s = self.cluster.next_deadline()
        assert due_s is None or due_s > now, "a tick settles what is due"
        return decisions

    def gateway(
        self, *placed: tuple[Attempt, WorkerId], gateway_id: GatewayId = GATEWAY, now: float = 0.0
    ) -> list[do.ClusterDecision]:
        return self.handle(on.GatewayAttached(gateway_id, placed), now)

    def gateway_leaves(
        self, *, gateway_id: GatewayId = GATEWAY, now: float
    ) -> list[do.ClusterDecision]:
        return self.handle(on.GatewayDetached(gateway_id), now)

    def worker(
        self,
        worker_id: WorkerId,
        *announced: on.RunningRequest,
        now: float = 0.0,
        has: Iterable[Adapter] = (),
        limits: Capacity | None = None,
    ) -> list[do.ClusterDecision]:
        limits = limits or capacity()
        resident = tuple(
            on.ResidentAdapter(one.digest, limits.adapter_blocks(one), 0) for one in has
        )
        event = on.WorkerAttached(worker_id, limits, announced, resident, draining=False)
        return self.handle(event, now)

    def worker_leaves(self, worker_id: WorkerId, *, now: float) -> list[do.ClusterDecision]:
        return self.handle(on.WorkerDetached(worker_id), now)

    def report(
        self,
        worker_id: WorkerId,
        *,
        draining: bool = False,
        costs: StepCosts | None = None,
        now: float = 0.0,
    ) -> list[do.ClusterDecision]:
        return self.handle(on.WorkerReported(worker_id, (), draining, costs), now)

    def submit(self, *requests: Request, now: float = 0.0) -> list[do.ClusterDecision]:
        return [one for new in requests for one in self.handle(on.RequestSubmitted(new), now)]

    def cancel(self, name: str, number: int = 1, *, now: float) -> list[do.ClusterDecision]:
        return self.handle(on.RequestCancelled(attempt(name, number), "client_cancelled"), now)

    def start(self, worker_id: WorkerId, name: str, *, now: float) -> list[do.ClusterDecision]:
        return self.handle(on.RequestStarted(worker_id, attempt(name)), now)

    def prefill(self, worker_id: WorkerId, name: str, *, now: float) -> list[do.ClusterDecision]:
        return self.handle(on.RequestPrefilled(worker_id, attempt(name)), now)

    def finish(
        self, worker_id: WorkerId, name: str, number: int = 1, *, now: float, tokens: int = 1
    ) -> list[do.ClusterDecision]:
        return self.handle(on.RequestFinished(worker_id, attempt(name, number), tokens), now)

    def dispatched(self) -> dict[WorkerId, int]:
        workers = self.cluster.snapshot(now=0.0).workers
        return {worker.worker_id: worker.dispatched for worker in workers}

    def waits(self, *, now: float) -> dict[RequestId, WaitCause]:
        """What each queued request is said to wait for."""
        return {one.request_id: one.waits_for for one in self.cluster.snapshot(now=now).queued}


class World:
    """One cluster, some workers, virtual time. Steps and loads take as long as told."""

    def __init__(
        self, cluster: ClusterScheduler, workers: dict[WorkerId, tuple[Capacity, ReplicaConfig]]
    ) -> None:
        self.now = 0.0
        self.cluster = cluster
        self.replicas = {
            i: ReplicaScheduler(config, limits) for i, (limits, config) in workers.items()
        }
        self.engines = {
            i: CheckingEngine(limits, config) for i, (limits, config) in workers.items()
        }
        self.requests: dict[Attempt, Request] = {}
        self.latest: dict[RequestId, Attempt] = {}
        self.emitted: dict[RequestId, int] = {}  # tokens that the client has, all attempts counted
        self.outputs: dict[RequestId, int] = {}
        self.outcome: dict[Attempt, str] = {}
        self.started_s: dict[Attempt, float] = {}
        self.dispatched: list[Attempt] = []
        self.log: list[str] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = count()
        self.to_cluster(on.GatewayAttached(GATEWAY, ()))
        for worker_id, (limits, _) in workers.items():
            self.to_cluster(on.WorkerAttached(worker_id, limits, (), (), draining=False))

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._sequence), action))

    def submit(self, new: Request, *, at_s: float, output: int | None = None) -> None:
        """Send a request at a time; its true output length is the predicted one if not given."""
        self.requests[new.attempt] = new
        self.latest[new.attempt.request_id] = new.attempt
        self.emitted[new.attempt.request_id] = new.prior_output_tokens
        self.outputs[new.attempt.request_id] = output or new.predicted_output_tokens
        self.at(at_s, lambda: self.to_cluster(on.RequestSubmitted(new)))

    def run(self, *, until_s: float = 1e6) -> None:
        """Run until nothing is left to happen."""
        while self._events and self._events[0][0] <= until_s:
            self.now, _, action = heapq.heappop(self._events)
            action()

    def to_cluster(self, event: on.ClusterEvent) -> None:
        decisions = self.cluster.handle(event, now=self.now)
        self.cluster.check_integrity()
        self._perform_cluster(decisions)
        due_s = self.cluster.next_deadline()
        if due_s is not None:
            self.at(max(due_s, self.now), self._tick)

    def _tick(self) -> None:
        due_s = self.cluster.next_deadline()
        if due_s is not None and due_s <= self.now:
            self._perform_cluster(self.cluster.tick(now=self.now))
            self.cluster.check_integrity()
            due_s = self.cluster.next_deadline()
            assert due_s is None or due_s > self.now, "a tick settles what is due"
            if due_s is not None:
                self.at(due_s, self._tick)

    def _perform_cluster(self, decisions: list[do.ClusterDecision]) -> None:
        for decision in decisions:
            self.log.append(f"{self.now:.2f} {decision}")
            match decision:
                case do.Dispatch(worker_id, placed, _):
                    assert placed not in self.dispatched
                    self.dispatched.append(placed)
                    self.engines[worker_id].receive(self.requests[placed])
                    self.to_replica(worker_id, on.RequestDispatched(self.requests[placed]))
                case do.Abort(worker_id, stopped, _):
                    self.to_replica(worker_id, on.RequestAborted(stopped))
                case do.Prefetch(worker_id, wanted):
                    self.to_replica(worker_id, on.AdaptersWanted(wanted))
                case do.Reject(_, refused, reason, _):
                    self._finish(refused, reason.value)
                case do.Forget(forgotten):
                    self._finish(forgotten, "forgotten")
                case do.Return(_, returned, _):
                    self._submit_again(returned)
                case _:
                    assert_never(decision)

    def to_replica(self, worker_id: WorkerId, event: on.ReplicaEvent) -> None:
        decisions = self.replicas[worker_id].handle(event, now=self.now)
        self.replicas[worker_id].check_integrity()
        engine = self.engines[worker_id]
        engine.perform(decisions)
        for decision in decisions:
            self._follow(worker_id, decision)

    def _follow(self, worker_id: WorkerId, decision: do.ReplicaDecision) -> None:
        engine = self.engines[worker_id]
        match decision:
            case do.LoadAdapter(wanted):
                self.at(
                    self.now + 0.02 * engine.limits.adapter_blocks(wanted),
                    lambda: self.to_replica(worker_id, engine.finish_load(wanted.digest)),
                )
            case do.RunStep(work):
                self.at(
                    self.now + 0.01 + 0.0001 * sum(part.tokens for part in work),
                    lambda: self._end_step(worker_id),
                )
            case do.StartRequest(started):
                self.started_s.setdefault(started, self.now)
                event = on.RequestStarted(worker_id, started)
                self.at(self.now, lambda: self.to_cluster(event))
            case do.EndRequest(gone) | do.ExpireRequest(gone) | do.FailRequest(gone):
                if self.outcome.get(gone) != "returned":
                    self._finish(gone, type(decision).__name__)
                resident = self.replicas[worker_id].snapshot().resident
                report = on.WorkerReported(worker_id, resident, draining=False)
                done = on.RequestFinished(worker_id, gone, engine.generated.get(gone, 0))
                self.at(self.now, lambda: self.to_cluster(report))
                self.at(self.now, lambda: self.to_cluster(done))
            case do.EvictAdapter() | do.PreemptRequest():
                pass
            case _:
                assert_never(decision)

    def _end_step(self, worker_id: WorkerId) -> None:
        """Tokens reach the client before what the cluster makes of them."""
        engine = self.engines[worker_id]
        event = engine.finish_step(self.outputs)
        first_tokens = []
        for sampled, position in engine.sampled:
            source, request_id = self.requests[sampled], sampled.request_id
            if position == source.context_tokens:
                first_tokens.append(on.RequestPrefilled(worker_id, sampled))
            if self.latest[request_id] == sampled:
                prompt_tokens = source.context_tokens - source.prior_output_tokens
                assert position == prompt_tokens + self.emitted[request_id], "no gap, no repeat"
                self.emitted[request_id] += 1
        self.to_replica(worker_id, event)
        for first in first_tokens:
            self.to_cluster(first)

    def _submit_again(self, returned: Attempt) -> None:
        """As a gateway does: with the tokens that the client has, unless it has them all."""
        source, request_id = self.requests[returned], returned.request_id
        emitted = self.emitted[request_id]
        if emitted == self.outputs[request_id]:
            return
        assert self.latest[request_id] == returned
        assert self.outcome.get(returned) != "returned", "an attempt is returned once"
        self.outcome[returned] = "returned"
        again = replace(
            source,
            attempt=Attempt(request_id, returned.number + 1),
            context_tokens=source.context_tokens - source.prior_output_tokens + emitted,
            prior_output_tokens=emitted,
        )
        self.submit(again, at_s=self.now, output=self.outputs[request_id])

    def _finish(self, gone: Attempt, outcome: str) -> None:
        assert gone not in self.outcome, "a request leaves once"
        self.outcome[gone] = outcome
