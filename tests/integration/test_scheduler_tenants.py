"""Tenants' quotas over real gRPC: exact rates, refusals with a time to retry, and the state."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from calumma.scheduler.v1 import scheduler_pb2
from services.common.errors import Reason, RpcError
from services.scheduler.config import SchedulerSettings
from services.scheduler.service import Scheduler, start
from tests.support.scheduler_peers import GatewayPeer, WorkerPeer, work_item

RATE = 400.0
BURST = 40.0
PROMPT = 8
OUTPUT = 5  # what a worker peer reports
TENANTS = f"""
[tenants.metered]
tokens_per_s = {RATE}
burst_tokens = {BURST}
max_queued = 300

[tenants.narrow]
max_running = 1
max_queued = 1

[tenants.poor]
tokens_per_s = 1.0
burst_tokens = 1.0
max_queued = 0
"""


@pytest.fixture
async def scheduler(tmp_path: Path) -> AsyncIterator[Scheduler]:
    file = tmp_path / "tenants.toml"
    file.write_text(TENANTS)
    running = await start(SchedulerSettings(listen="127.0.0.1:0", tenants=file))
    yield running
    await running.stop(0)


@pytest.fixture
async def worker(scheduler: Scheduler) -> AsyncIterator[WorkerPeer]:
    peer = await WorkerPeer(scheduler.address, "worker-1", is_eager=True).connect()
    yield peer
    await peer.close()


@pytest.fixture
async def gateways(scheduler: Scheduler) -> AsyncIterator[list[GatewayPeer]]:
    peers = [GatewayPeer(scheduler.address, f"gateway-{number}") for number in (1, 2)]
    yield [await peer.connect() for peer in peers]
    for peer in peers:
        await peer.close()


def item_of(tenant: str, request_id: str, gateway: GatewayPeer) -> scheduler_pb2.WorkItem:
    item = work_item(request_id, gateway_id=gateway.peer_id, tokens=PROMPT)
    item.tenant = tenant
    return item


async def test_a_tenants_rate_holds_over_all_gateways_and_slows_nobody_else(
    worker: WorkerPeer, gateways: list[GatewayPeer]
) -> None:
    began_s = time.monotonic()
    for number in range(280):
        gateway = gateways[number % 2]
        await gateway.submit(item_of("metered", f"m.{number}", gateway))
    for number in range(50):
        await gateways[0].submit(item_of("free", f"f.{number}", gateways[0]))
        await gateways[0].take("placed")
    await asyncio.sleep(max(0.0, began_s + 3.0 - time.monotonic()))
    passed_s = time.monotonic() - began_s
    metered = [item for item in worker.items if item.tenant == "metered"]
    free = [item for item in worker.items if item.tenant == "free"]
    assert len(free) == 50
    assert max(item.queue_s for item in free) < 1.0
    used = len(metered) * (PROMPT + OUTPUT)
    assert used == pytest.approx(BURST + RATE * passed_s, rel=0.1)
    state = await gateways[1].state()
    (shown,) = [tenant for tenant in state.tenants if tenant.tenant == "metered"]
    assert shown.held > 100
    assert {queued.waits_for for queued in state.queued} == {"tenant"}


async def test_a_request_beyond_the_quota_is_told_which_one_and_when_to_come_back(
    worker: WorkerPeer, gateways: list[GatewayPeer]
) -> None:
    gateway = gateways[0]
    await gateway.submit(item_of("poor", "p.1", gateway))
    await gateway.take("placed")
    await gateway.submit(item_of("poor", "p.2", gateway))
    rejected = await gateway.take("rejected")
    error = RpcError.from_proto(rejected.error)
    assert error.reason is Reason.TENANT_QUOTA_EXCEEDED
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.context.retry_after_s is not None
    assert 1.0 < error.context.retry_after_s <= PROMPT + 32  # its debt, at a token per second
    details = {detail.TypeName(): detail for detail in error.to_status().details}
    quota, retry = error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo()
    assert details["google.rpc.QuotaFailure"].Unpack(quota)
    assert len(quota.violations) == 1
    assert details["google.rpc.RetryInfo"].Unpack(retry)
    assert retry.retry_delay.ToTimedelta().total_seconds() == pytest.approx(
        error.context.retry_after_s, abs=0.01
    )
    await gateway.submit(item_of("other", "o.1", gateway))
    await gateway.take("placed")
    assert [item.request_id for item in worker.items] == ["p.1", "o.1"]


async def test_the_state_says_who_waits_for_a_quota_and_who_for_a_worker(
    gateways: list[GatewayPeer],
) -> None:
    gateway = gateways[0]
    for request_id in ("n.1", "n.2", "n.3"):
        await gateway.submit(item_of("narrow", request_id, gateway))
    assert (await gateway.take("rejected")).attempt.request_id == "n.3"
    state = await gateway.state()
    assert {queued.request_id: queued.waits_for for queued in state.queued} == {
        "n.1": "no_worker",
        "n.2": "tenant",
    }
    (tenant,) = state.tenants
    assert (tenant.tenant, tenant.held, tenant.running) == ("narrow", 1, 1)
