"""Decisions must not slow down with the length of the queue."""

import random
import time

import pytest

from services.core.cluster import ClusterConfig, ClusterScheduler
from services.core.decisions import ClusterDecision, Dispatch
from services.core.events import (
    GatewayAttached,
    RequestCancelled,
    RequestFinished,
    RequestSubmitted,
    WorkerAttached,
)
from services.core.policies import build_policy
from services.core.types import WorkerId
from tests.unit.core.core_world import GATEWAY, adapter, attempt, capacity, request

QUEUED = 20_000


@pytest.mark.parametrize("policy", ["fifo", "adaptive"])
def test_20000_queued_requests_are_handled_in_seconds(policy: str) -> None:
    rng = random.Random(1)
    adapters = [adapter(f"a{i}", blocks=rng.choice([1, 2, 4, 8])) for i in range(1000)]
    cluster = ClusterScheduler(ClusterConfig(), build_policy(policy))
    cluster.handle(GatewayAttached(GATEWAY, ()), now=0.0)
    for index in range(4):
        event = WorkerAttached(
            WorkerId(f"w{index}"), capacity(400, requests=16), (), (), draining=False
        )
        cluster.handle(event, now=0.0)
    began_s = time.process_time()
    running: list[Dispatch] = []

    def perform(decisions: list[ClusterDecision]) -> None:
        running.extend(one for one in decisions if isinstance(one, Dispatch))

    for index in range(QUEUED):
        new = request(
            f"r{index}",
            using=rng.choice(adapters),
            context=rng.randint(1, 600),
            output=rng.randint(1, 300),
            priority=rng.randint(0, 3),
            deadline_s=1e6,
        )
        perform(cluster.handle(RequestSubmitted(new), now=index / 1000))
    for index in range(0, QUEUED, 10):
        cancel = RequestCancelled(attempt(f"r{index}"), "client_cancelled")
        perform(cluster.handle(cancel, now=20.0))
    finished, now = 0, 20.0
    while running:
        done = running.pop(rng.randrange(len(running)))
        now += 0.01
        finished += 1
        perform(cluster.handle(RequestFinished(done.worker_id, done.attempt, 1), now=now))
    assert finished > QUEUED * 0.89
    assert not cluster.snapshot(now=now).queued
    assert time.process_time() - began_s < 20.0
