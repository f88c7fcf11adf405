"""Cluster and replicas together, in virtual time, until every request has left."""

import random
from functools import partial

import pytest

from services.core.cluster import ClusterConfig, ClusterScheduler
from services.core.events import RequestCancelled
from services.core.policies import build_policy
from services.core.replica import ReplicaConfig
from services.core.types import WorkerId
from tests.unit.core.core_world import World, adapter, attempt, capacity, request


def busy_world(
    policy: str, *, seed: int = 1, prediction_error: float = 0.0, eviction: str = "lru"
) -> World:
    """400 requests over 40 adapters at three small workers, well above what these can hold."""
    rng = random.Random(seed)
    config = ReplicaConfig(prefill_tokens_per_step=64, eviction=eviction)
    workers = {WorkerId(f"w{i}"): (capacity(60, requests=8), config) for i in range(3)}
    world = World(ClusterScheduler(ClusterConfig(), build_policy(policy)), workers)
    adapters = [adapter(f"a{i:02}", blocks=rng.choice([1, 2, 4, 8])) for i in range(40)]
    for index in range(400):
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
        world.submit(new, at_s=rng.uniform(0, 10), output=output)
    return world


@pytest.mark.parametrize("policy", ["fifo", "multilevel"])
@pytest.mark.parametrize("eviction", ["lru", "chameleon"])
def test_every_request_completes_once(policy: str, eviction: str) -> None:
    world = busy_world(policy, eviction=eviction)
    world.run()
    assert len(world.outcome) == 400
    assert set(world.outcome.values()) == {"EndRequest"}


def test_good_predictions_make_preemption_unnecessary_and_waiting_happens_in_one_place() -> None:
    world = busy_world("multilevel")
    world.run()
    assert sum(engine.preemptions for engine in world.engines.values()) == 0


def test_bad_predictions_preempt_but_lose_nothing() -> None:
    world = busy_world("multilevel", prediction_error=0.95)
    world.run()
    assert len(world.outcome) == 400
    assert set(world.outcome.values()) == {"EndRequest"}
    assert sum(engine.preemptions for engine in world.engines.values()) > 0


def test_cancelled_requests_leave_nothing_behind() -> None:
    world = busy_world("multilevel", prediction_error=0.5)
    for index in range(0, 400, 3):
        event = RequestCancelled(attempt(f"r{index:03}"), "client_cancelled")
        world.at(10.0 + index / 40, partial(world.to_cluster, event))
    world.run()
    assert len(world.outcome) == 400
    snapshot = world.cluster.snapshot(now=world.now)
    assert all(worker.reserved_blocks == 0 for worker in snapshot.workers)
    assert all(worker.dispatched == 0 for worker in snapshot.workers)
    for replica in world.replicas.values():
        assert replica.snapshot().kv_blocks == 0


def test_the_same_events_give_the_same_decisions() -> None:
    first, second = busy_world("multilevel"), busy_world("multilevel")
    first.run()
    second.run()
    assert first.log == second.log


def test_small_requests_wait_less_behind_large_ones_than_in_a_fifo() -> None:
    def small_waits_s(policy: str) -> float:
        workers = {WorkerId("w"): (capacity(100, requests=32), ReplicaConfig())}
        world = World(ClusterScheduler(ClusterConfig(), build_policy(policy)), workers)
        for index in range(30):
            world.submit(request(f"large{index}", context=500, output=300), at_s=0.0)
        for index in range(30):
            world.submit(request(f"small{index}", context=10, output=5), at_s=0.1)
        world.run()
        assert len(world.outcome) == 60
        waits = [s for a, s in world.started_s.items() if a.request_id.startswith("small")]
        return sorted(waits)[len(waits) // 2]

    assert small_waits_s("multilevel") < small_waits_s("fifo") / 5
