"""Cluster and replicas together, in virtual time, until every request has left."""

import random
from dataclasses import replace
from functools import partial

import pytest

from services.core.cluster import ClusterConfig, ClusterScheduler
from services.core.events import RequestCancelled
from services.core.policies import POLICY_NAMES, build_policy
from services.core.policies.adaptive import Adaptive
from services.core.policies.fifo import Fifo
from services.core.queues import Outcome, Placer, QueuePolicy, Squashed, Taken
from services.core.replica import ReplicaConfig
from services.core.types import Attempt, WorkerId
from tests.unit.core.core_world import World, adapter, attempt, capacity, request


def busy_world(
    policy: QueuePolicy | None = None, *, prediction_error: float = 0.0, eviction: str = "lru"
) -> World:
    """160 requests over 40 adapters at three small workers, well above what these can hold."""
    rng = random.Random(1)
    config = ReplicaConfig(prefill_tokens_per_step=64, eviction=eviction)
    workers = {WorkerId(f"w{i}"): (capacity(60, requests=8), config) for i in range(3)}
    world = World(
        ClusterScheduler(ClusterConfig(), Adaptive() if policy is None else policy), workers
    )
    adapters = [adapter(f"a{i:02}", blocks=rng.choice([1, 2, 4, 8])) for i in range(40)]
    for index in range(160):
        output = rng.randint(1, 120)
        predicted = max(1, round(output * rng.uniform(1 - prediction_error, 1 + prediction_error)))
        using = rng.choice(adapters) if rng.random() < 0.9 else None
        new = request(
            f"r{index:03}",
            using=using,
            context=rng.randint(1, 200),
            output=predicted,
            output_max=150,
            priority=rng.choice([0, 0, 0, 1]),
        )
        arrived_s = rng.uniform(0, 4)
        world.submit(replace(new, arrived_s=arrived_s), at_s=arrived_s, output=output)
    return world


def complete(world: World) -> None:
    """Every request has left once, and its client has all of its tokens once."""
    assert world.emitted == world.outputs
    last = {world.outcome[attempt] for attempt in world.latest.values()}
    assert last == {"EndRequest"}
    assert set(world.outcome) == set(world.requests)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_request_completes_once(policy: str) -> None:
    world = busy_world(build_policy(policy))
    world.run()
    assert len(world.latest) == 160
    complete(world)


def test_every_request_completes_once_with_another_eviction() -> None:
    world = busy_world(eviction="chameleon")
    world.run()
    complete(world)


def test_good_predictions_make_preemption_unnecessary_and_waiting_happens_in_one_place() -> None:
    world = busy_world()
    world.run()
    assert sum(engine.preemptions for engine in world.engines.values()) == 0


def test_bad_predictions_preempt_but_lose_nothing() -> None:
    world = busy_world(prediction_error=0.95)
    world.run()
    complete(world)
    assert sum(engine.preemptions for engine in world.engines.values()) > 0


def test_cancelled_requests_leave_nothing_behind() -> None:
    world = busy_world(prediction_error=0.5)
    for index in range(0, 160, 3):
        event = RequestCancelled(attempt(f"r{index:03}"), "client_cancelled")
        world.at(4.0 + index / 40, partial(world.to_cluster, event))
    world.run()
    assert len(world.outcome) == 160
    snapshot = world.cluster.snapshot(now=world.now)
    assert all(worker.reserved_blocks == 0 for worker in snapshot.workers)
    assert all(worker.dispatched == 0 for worker in snapshot.workers)
    for replica in world.replicas.values():
        assert replica.snapshot().kv_blocks == 0


def test_the_same_events_give_the_same_decisions() -> None:
    first, second = busy_world(), busy_world()
    first.run()
    second.run()
    assert first.log == second.log


class Squasher(Fifo):
    """A fifo that stops what it sent, each request up to twice, whenever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.running: dict[Attempt, None] = {}
        self.squashed = 0

    def take(self, place: Placer, *, now: float) -> Outcome:
        outcome = super().take(place, now=now)
        if isinstance(outcome, Taken):
            self.running[outcome.request.attempt] = None
        elif len(self) > 4 and self.running:
            return self._squash_next()
        return outcome

    def release(self, attempt: Attempt, *, now: float) -> None:
        super().release(attempt, now=now)
        self.running.pop(attempt, None)

    def _squash_next(self) -> Squashed | None:
        victim = next(iter(self.running))
        del self.running[victim]
        if victim.number > 2:
            return None
        self.squashed += 1
        return Squashed(victim)


def test_squashed_requests_go_on_without_a_gap_or_a_repeated_token() -> None:
    policy = Squasher()
    world = busy_world(policy)
    world.run()
    complete(world)
    assert policy.squashed > 40
    returned = [one for one, outcome in world.outcome.items() if outcome == "returned"]
    assert len(returned) > 40
    assert len(world.requests) == 160 + len(returned)


def test_small_requests_wait_less_behind_large_ones_than_in_a_fifo() -> None:
    def small_waits_s(policy: QueuePolicy) -> float:
        workers = {WorkerId("w"): (capacity(100, requests=32), ReplicaConfig())}
        world = World(ClusterScheduler(ClusterConfig(), policy), workers)
        for index in range(30):
            world.submit(request(f"large{index}", context=500, output=300), at_s=0.0)
        for index in range(30):
            world.submit(request(f"small{index}", context=10, output=5), at_s=0.1)
        world.run()
        assert len(world.outcome) == 60
        waits = [s for a, s in world.started_s.items() if a.request_id.startswith("small")]
        return sorted(waits)[len(waits) // 2]

    assert small_waits_s(Adaptive()) < small_waits_s(Fifo()) / 5
