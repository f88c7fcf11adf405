"""Thousands of requests through a real scheduler: nothing is lost, nothing is left, all replays."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.core.decisions import ClusterDecision, Dispatch
from services.scheduler.config import SchedulerSettings
from services.scheduler.journal import replay
from services.scheduler.performer import Performer
from services.scheduler.service import Scheduler, start
from tests.support.scheduler_peers import GatewayPeer, WorkerPeer, work_item

REQUESTS = 2000
WORKERS = 4


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[ClusterDecision]:
    """What the live core decided, in order."""
    decisions: list[ClusterDecision] = []
    perform = Performer.perform

    def noting(self: Performer, decision: ClusterDecision, *, now: float) -> None:
        decisions.append(decision)
        perform(self, decision, now=now)

    monkeypatch.setattr(Performer, "perform", noting)
    return decisions


@pytest.fixture
async def scheduler(tmp_path: Path) -> AsyncIterator[Scheduler]:
    settings = SchedulerSettings(listen="127.0.0.1:0", record=tmp_path / "events.jsonl")
    scheduler = await start(settings)
    yield scheduler
    await scheduler.stop(0)


async def test_two_thousand_requests_over_four_workers_leave_nothing_behind(
    scheduler: Scheduler, decided: list[ClusterDecision], tmp_path: Path
) -> None:
    workers = [
        await WorkerPeer(scheduler.address, f"worker-{n}", is_eager=True).connect(max_requests=16)
        for n in range(WORKERS)
    ]
    gateways = [await GatewayPeer(scheduler.address, f"gateway-{n}").connect() for n in range(2)]

    async def submit_all(gateway: GatewayPeer) -> None:
        for number in range(REQUESTS // 2):
            item = work_item(
                f"{gateway.peer_id}.{number}",
                gateway_id=gateway.peer_id,
                tokens=4 + number % 900,
                adapter=number % 50 or None,
                time_left_s=120,
            )
            await gateway.submit(item)

    await asyncio.gather(*(submit_all(gateway) for gateway in gateways))
    for gateway in gateways:
        for _ in range(REQUESTS // 2):
            await gateway.take("placed", wait_s=60)
        assert gateway.waiting("rejected") == gateway.waiting("returned") == 0

    state = await gateways[0].state()
    while any(worker.dispatched_requests for worker in state.workers):
        await asyncio.sleep(0.01)
        state = await gateways[0].state()
    assert not state.queued
    assert all(queue.length == 0 for queue in state.queues)
    done = [item.request_id for worker in workers for item in worker.items]
    assert len(done) == len(set(done)) == REQUESTS
    assert all(worker.items for worker in workers)

    for peer in (*workers, *gateways):
        await peer.close()
    await scheduler.stop(0)
    steps = list(replay(tmp_path / "events.jsonl"))
    assert [decision for step in steps for decision in step.decisions] == decided
    assert all(step.recorded is not None and step.is_same for step in steps)
    assert sum(isinstance(decision, Dispatch) for decision in decided) == REQUESTS
