"""The scheduler over real gRPC, with gateways and workers that speak its streams."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from calumma.scheduler.v1 import scheduler_pb2
from services.common.clients import open_channel
from services.common.errors import Reason, RpcError
from services.scheduler.config import SchedulerSettings
from services.scheduler.service import Scheduler, start
from tests.support.scheduler_peers import (
    BASE_MODEL,
    GatewayPeer,
    Peer,
    WorkerPeer,
    digest_of,
    work_item,
)

GRACE_S = 0.3
PATIENT_S = 1.0  # for those who come back in time, on a busy machine too
OTHER_MODEL = "sha256:" + "1" * 64


def settings_for_test(**changes: Any) -> SchedulerSettings:
    fields: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "worker_grace_s": GRACE_S,
        "gateway_grace_s": GRACE_S,
        "no_worker_wait_s": 60.0,
        **changes,
    }
    return SchedulerSettings(**fields)


class Pool:
    """A scheduler and the peers of one test, all ended with it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.peers: list[Peer] = []

    async def gateway(self, gateway_id: str = "gateway-1", **options: Any) -> GatewayPeer:
        peer = GatewayPeer(self.scheduler.address, gateway_id)
        self.peers.append(peer)
        return await peer.connect(**options)

    async def worker(
        self, worker_id: str = "worker-1", *, is_eager: bool = False, **options: Any
    ) -> WorkerPeer:
        peer = WorkerPeer(self.scheduler.address, worker_id, is_eager=is_eager)
        self.peers.append(peer)
        return await peer.connect(**options)

    async def close(self) -> None:
        for peer in self.peers:
            await peer.close()
        await self.scheduler.stop(0)


StartPool = Callable[..., Awaitable[Pool]]


@pytest.fixture
async def start_pool() -> AsyncIterator[StartPool]:
    pools: list[Pool] = []

    async def begin(**changes: Any) -> Pool:
        pool = Pool(await start(settings_for_test(**changes)))
        pools.append(pool)
        return pool

    yield begin
    for pool in pools:
        await pool.close()


@pytest.fixture
async def pool(start_pool: StartPool) -> Pool:
    return await start_pool()


def reason_of(failure: grpc.aio.AioRpcError) -> Reason:
    error = RpcError.from_rpc(failure)
    assert error is not None
    return error.reason


async def until(peer: Peer, condition: Callable[[scheduler_pb2.GetStateResponse], bool]) -> None:
    """Wait until the scheduler's state is as expected."""
    async with asyncio.timeout(5):
        while not condition(await peer.state()):
            await asyncio.sleep(0.01)


def is_empty(state: scheduler_pb2.GetStateResponse) -> bool:
    queued = sum(queue.length for queue in state.queues)
    dispatched = sum(worker.dispatched_requests for worker in state.workers)
    return queued == 0 and dispatched == 0 and not state.queued


# --- the life of a request ------------------------------------------------------------------------


async def test_a_request_is_dispatched_started_finished_and_gone(pool: Pool) -> None:
    worker = await pool.worker()
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1", adapter=3, time_left_s=30.0))
    item = await worker.dispatched()
    assert (item.request_id, item.attempt, item.gateway_id) == ("r.1", 1, "gateway-1")
    assert item.token_ids == [7] * 8
    assert item.adapter.digest == digest_of(3)
    assert 29.0 < item.time_left.ToNanoseconds() / 1e9 < 30.0
    assert 0 <= item.queue_s < 1
    placed = await gateway.take("placed")
    assert (placed.attempt.request_id, placed.worker_id) == ("r.1", "worker-1")
    assert placed.queue_s == item.queue_s
    await worker.started("r.1")
    state = await gateway.state()
    assert [state_of.dispatched_requests for state_of in state.workers] == [1]
    await worker.finished("r.1")
    await until(gateway, is_empty)


async def test_a_request_waits_for_a_worker_and_the_state_says_so(pool: Pool) -> None:
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1"))
    await until(gateway, lambda state: len(state.queued) == 1)
    state = await gateway.state()
    assert state.queued[0].request_id == "r.1"
    assert state.queued[0].waits_for == "no_worker"
    assert (state.system, state.policy) == ("adaptive", "adaptive")
    assert state.gateways == 1
    assert sum(queue.length for queue in state.queues) == 1
    worker = await pool.worker()
    assert (await worker.dispatched()).queue_s > 0


async def test_dispatches_to_one_worker_share_a_message(pool: Pool) -> None:
    gateway = await pool.gateway()
    for number in range(6):
        await gateway.submit(work_item(f"r.{number}"))
    await until(gateway, lambda state: len(state.queued) == 6)
    worker = await pool.worker()
    batch = await worker.take("dispatch")
    assert [item.request_id for item in batch.items] == [f"r.{number}" for number in range(6)]


async def test_a_full_worker_keeps_the_next_request_queued_until_one_ends(pool: Pool) -> None:
    worker = await pool.worker(max_requests=1)
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1"))
    await gateway.submit(work_item("r.2"))
    assert (await worker.dispatched()).request_id == "r.1"
    await until(gateway, lambda state: [q.waits_for for q in state.queued] == ["batch_slots"])
    await worker.finished("r.1")
    assert (await worker.dispatched()).request_id == "r.2"


async def test_a_request_cancelled_in_the_queue_is_forgotten(pool: Pool) -> None:
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1"))
    await gateway.cancel("r.1")
    await gateway.submit(work_item("r.2"))
    worker = await pool.worker()
    assert (await worker.dispatched()).request_id == "r.2"
    await worker.finished("r.2")
    await until(gateway, is_empty)


async def test_a_request_cancelled_after_its_dispatch_is_aborted(pool: Pool) -> None:
    worker = await pool.worker()
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1"))
    await worker.dispatched()
    await gateway.cancel("r.1")
    abort = await worker.take("abort")
    assert (abort.attempt.request_id, abort.cause) == ("r.1", "client_cancelled")
    await worker.finished("r.1")
    await until(gateway, is_empty)


async def test_an_abort_never_arrives_before_its_dispatch(pool: Pool) -> None:
    worker = await pool.worker()
    gateway = await pool.gateway()
    dispatched: set[str] = set()

    async def answer_aborts() -> None:
        while True:
            request_id = (await worker.take("abort", wait_s=60)).attempt.request_id
            while worker.waiting("dispatch"):
                batch = await worker.take("dispatch")
                dispatched.update(item.request_id for item in batch.items)
            assert request_id in dispatched
            await worker.finished(request_id)

    answering = asyncio.create_task(answer_aborts())
    for number in range(20):
        await gateway.submit(work_item(f"r.{number}"))
        await gateway.cancel(f"r.{number}")
    await until(gateway, is_empty)
    assert not answering.done()
    answering.cancel()


async def test_a_request_that_cannot_end_in_time_is_told_so_before_it_is_late(pool: Pool) -> None:
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1", tokens=5000, time_left_s=1.2))
    rejected = await gateway.take("rejected", wait_s=1.0)
    error = RpcError.from_proto(rejected.error)
    assert error.reason is Reason.DEADLINE_UNREACHABLE
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(gateway, is_empty)


async def test_a_deadline_that_passes_in_the_queue_rejects_the_request(
    start_pool: StartPool,
) -> None:
    pool = await start_pool(policy_option={"refuses_late": "false"})
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1", time_left_s=0.1))
    rejected = await gateway.take("rejected")
    assert rejected.attempt.request_id == "r.1"
    error = RpcError.from_proto(rejected.error)
    assert error.reason is Reason.DEADLINE_EXCEEDED
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.context.stage == "queue"
    await until(gateway, is_empty)


async def test_a_deadline_that_has_passed_already_rejects_at_once(pool: Pool) -> None:
    worker = await pool.worker(max_requests=1)
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1"))
    await gateway.submit(work_item("r.2", time_left_s=-5.0))
    await worker.dispatched()
    rejected = await gateway.take("rejected")
    assert rejected.attempt.request_id == "r.2"


async def test_a_full_queue_rejects_with_a_time_to_retry(start_pool: StartPool) -> None:
    pool = await start_pool(queue_limit=2)
    gateway = await pool.gateway()
    for number in range(3):
        await gateway.submit(work_item(f"r.{number}"))
    rejected = await gateway.take("rejected")
    error = RpcError.from_proto(rejected.error)
    assert (rejected.attempt.request_id, error.reason) == ("r.2", Reason.QUEUE_FULL)
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.context.retry_after_s is not None


async def test_without_any_worker_a_request_is_rejected_after_a_while(
    start_pool: StartPool,
) -> None:
    pool = await start_pool(no_worker_wait_s=0.1)
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1"))
    error = RpcError.from_proto((await gateway.take("rejected")).error)
    assert (error.reason, error.code) == (Reason.NO_WORKER, grpc.StatusCode.UNAVAILABLE)
    assert error.context.retry_after_s is not None


async def test_a_request_that_no_worker_could_hold_is_rejected(pool: Pool) -> None:
    await pool.worker()
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1", tokens=20_000))
    error = RpcError.from_proto((await gateway.take("rejected")).error)
    assert error.reason is Reason.REQUEST_TOO_LARGE
    assert "16384 tokens of prompt and output" in error.message
    assert error.context.retry_after_s is None


async def test_queued_adapters_are_hinted_to_a_worker(pool: Pool) -> None:
    worker = await pool.worker(max_requests=1)
    gateway = await pool.gateway()
    for number in range(3):
        await gateway.submit(work_item(f"r.{number}", adapter=number))
    hint = await worker.take("prefetch")
    assert {adapter.digest for adapter in hint.adapters} <= {digest_of(n) for n in range(3)}
    assert all(adapter.size_bytes == 1_000_000 for adapter in hint.adapters)


async def test_a_bad_item_is_rejected_alone(pool: Pool) -> None:
    worker = await pool.worker()
    gateway = await pool.gateway()
    bad = work_item("r.bad")
    bad.sampling.temperature = float("nan")
    stolen = work_item("r.stolen", gateway_id="gateway-2")
    for item in (bad, stolen, work_item("r.good")):
        await gateway.submit(item)
    errors = [RpcError.from_proto((await gateway.take("rejected")).error) for _ in range(2)]
    assert [error.context.field for error in errors] == ["sampling.temperature", "gateway_id"]
    assert {error.reason for error in errors} == {Reason.INVALID_FIELD}
    assert (await worker.dispatched()).request_id == "r.good"


async def test_a_later_attempt_supersedes_an_earlier_one(pool: Pool) -> None:
    worker = await pool.worker()
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1"))
    await worker.dispatched()
    await gateway.submit(work_item("r.1", attempt=2, prior_tokens=3))
    abort = await worker.take("abort")
    assert abort.attempt.attempt == 1
    again = await worker.dispatched()
    assert (again.attempt, len(again.token_ids), again.prompt_tokens) == (2, 11, 8)


# --- workers come and go --------------------------------------------------------------------------


async def test_a_lost_worker_returns_its_requests_after_the_grace(pool: Pool) -> None:
    worker = await pool.worker()
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1"))
    await worker.dispatched()
    await gateway.take("placed")
    await worker.close()
    await until(gateway, lambda state: not state.workers[0].attached)
    assert gateway.waiting("returned") == 0
    returned = await gateway.take("returned")
    assert (returned.attempt.request_id, returned.worker_id) == ("r.1", "worker-1")
    await until(gateway, lambda state: not state.workers)
    other = await pool.worker("worker-2")
    await gateway.submit(work_item("r.1", attempt=2))
    assert (await other.dispatched()).attempt == 2


async def test_a_worker_that_comes_back_in_time_keeps_its_requests(start_pool: StartPool) -> None:
    pool = await start_pool(worker_grace_s=PATIENT_S)
    worker = await pool.worker()
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1"))
    await worker.dispatched()
    await worker.close()
    await until(gateway, lambda state: not state.workers[0].attached)
    worker = await pool.worker(running=[("r.1", 1, "gateway-1")])
    await asyncio.sleep(1.2 * PATIENT_S)
    assert gateway.waiting("returned") == 0
    assert (await gateway.state()).workers[0].dispatched_requests == 1
    await worker.finished("r.1")
    await until(gateway, is_empty)


async def test_a_worker_that_comes_back_without_a_request_returns_it(pool: Pool) -> None:
    worker = await pool.worker()
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1"))
    await worker.dispatched()
    await worker.close()
    await pool.worker()
    returned = await gateway.take("returned")
    assert returned.attempt.request_id == "r.1"


async def test_a_second_stream_of_a_worker_replaces_the_first(pool: Pool) -> None:
    first = await pool.worker()
    second = await pool.worker()
    assert reason_of(await first.failure()) is Reason.CONFLICT
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1"))
    assert (await second.dispatched()).request_id == "r.1"
    await asyncio.sleep(2 * GRACE_S)
    assert [worker.attached for worker in (await gateway.state()).workers] == [True]


async def test_a_worker_of_another_base_model_is_refused_by_name(pool: Pool) -> None:
    await pool.worker()
    stranger = await pool.worker("worker-2", base_model_digest=OTHER_MODEL, welcome=False)
    failure = await stranger.failure()
    assert failure.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason_of(failure) is Reason.PROTOCOL_VIOLATION
    assert BASE_MODEL in str(failure.details())
    assert OTHER_MODEL in str(failure.details())
    assert len((await stranger.state()).workers) == 1


async def test_another_base_model_may_follow_when_all_workers_have_left(pool: Pool) -> None:
    worker = await pool.worker()
    await worker.close()
    gateway = await pool.gateway()
    await until(gateway, lambda state: not state.workers)
    await asyncio.sleep(0.05)
    await pool.worker("worker-2", base_model_digest=OTHER_MODEL)


async def test_gateways_are_told_where_workers_are(pool: Pool) -> None:
    worker = await pool.worker()
    gateway = await pool.gateway()
    address = await gateway.take("worker")
    assert (address.worker_id, address.address) == ("worker-1", "worker-1.test:7102")
    assert address.attached
    await pool.worker("worker-2")
    assert (await gateway.take("worker")).worker_id == "worker-2"
    await worker.close()
    left = await gateway.take("worker")
    assert (left.worker_id, left.attached) == ("worker-1", False)


async def test_a_reported_status_is_shown_and_a_draining_worker_gets_nothing(pool: Pool) -> None:
    worker = await pool.worker()
    gateway = await pool.gateway()
    status = scheduler_pb2.WorkerStatus(free_blocks=17, draining=True, step_s=0.02)
    status.resident.add(digest=digest_of(1), blocks=3, users=0)
    await worker.report(status)
    await until(gateway, lambda state: state.workers[0].status.draining)
    await gateway.submit(work_item("r.1"))
    await until(gateway, lambda state: len(state.queued) == 1)
    shown = (await gateway.state()).workers[0]
    assert shown.status == status
    assert shown.capacity.pool_blocks == 4096
    other = await pool.worker("worker-2")
    assert (await other.dispatched()).request_id == "r.1"


async def test_a_worker_that_half_closes_has_left(pool: Pool) -> None:
    worker = await pool.worker()
    await worker.half_close()
    assert await asyncio.wait_for(worker.ended, 5) is None
    gateway = await pool.gateway()
    await until(gateway, lambda state: not state.workers)


# --- gateways come and go -------------------------------------------------------------------------


async def test_each_gateway_hears_of_its_own_requests_only(pool: Pool) -> None:
    worker = await pool.worker()
    gateways = [await pool.gateway(f"gateway-{number}") for number in (1, 2)]
    for gateway in gateways:
        item = work_item(f"{gateway.peer_id}.r", gateway_id=gateway.peer_id)
        await gateway.submit(item)
    for gateway in gateways:
        placed = await gateway.take("placed")
        assert placed.attempt.request_id == f"{gateway.peer_id}.r"
    assert [gateway.waiting("placed") for gateway in gateways] == [0, 0]
    await until(gateways[0], lambda state: state.gateways == 2)
    await worker.close()
    for gateway in gateways:
        assert (await gateway.take("returned")).attempt.request_id == f"{gateway.peer_id}.r"


async def test_the_requests_of_a_gateway_that_stays_away_are_dropped(pool: Pool) -> None:
    worker = await pool.worker(max_requests=1)
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1"))
    await gateway.submit(work_item("r.2"))
    await worker.dispatched()
    await gateway.close()
    abort = await worker.take("abort")
    assert (abort.attempt.request_id, abort.cause) == ("r.1", "gateway_lost")
    await worker.finished("r.1")
    await until(worker, is_empty)
    assert worker.waiting("dispatch") == 0


async def test_a_gateway_that_comes_back_in_time_finds_its_requests(start_pool: StartPool) -> None:
    pool = await start_pool(gateway_grace_s=PATIENT_S)
    worker = await pool.worker(max_requests=1)
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1"))
    await gateway.submit(work_item("r.2"))
    await worker.dispatched()
    await gateway.close()
    gateway = await pool.gateway(placed=[("r.1", 1, "worker-1")])
    await gateway.submit(work_item("r.2"))  # still queued: submitted again
    await asyncio.sleep(1.2 * PATIENT_S)
    await worker.finished("r.1")
    assert (await worker.dispatched()).request_id == "r.2"
    assert (await gateway.take("placed")).attempt.request_id == "r.2"
    await worker.finished("r.2")
    await until(gateway, is_empty)
    assert worker.waiting("abort") == 0
    assert worker.waiting("dispatch") == 0


async def test_a_new_scheduler_learns_what_runs_from_those_who_reconnect(
    start_pool: StartPool,
) -> None:
    before = await start_pool()
    worker = await before.worker(max_requests=1)
    gateway = await before.gateway()
    await gateway.submit(work_item("r.1"))
    await gateway.submit(work_item("r.2"))
    await worker.dispatched()
    await until(gateway, lambda state: len(state.queued) == 1)
    address = before.scheduler.address
    stopping = asyncio.create_task(before.scheduler.stop(0))
    assert reason_of(await gateway.failure()) is Reason.DRAINING
    assert reason_of(await worker.failure()) is Reason.DRAINING
    await stopping

    after = await start_pool(listen=address, worker_grace_s=PATIENT_S, gateway_grace_s=PATIENT_S)
    gateway = await after.gateway(placed=[("r.1", 1, "worker-1")])
    await gateway.submit(work_item("r.2"))
    worker = await after.worker(running=[("r.1", 1, "gateway-1")], max_requests=1)
    await asyncio.sleep(1.2 * PATIENT_S)
    assert gateway.waiting("returned") == 0
    assert worker.waiting("abort") == 0
    await worker.finished("r.1")
    assert (await worker.dispatched()).request_id == "r.2"


# --- peers that break the protocol ----------------------------------------------------------------


async def test_a_stream_that_does_not_begin_with_hello_is_a_violation(pool: Pool) -> None:
    gateway = GatewayPeer(pool.scheduler.address, "gateway-1")
    pool.peers.append(gateway)
    await gateway.open(gateway.stub.Submit(), scheduler_pb2.SubmitRequest(submit=work_item("r")))
    assert reason_of(await gateway.failure()) is Reason.PROTOCOL_VIOLATION
    worker = WorkerPeer(pool.scheduler.address, "worker-1")
    pool.peers.append(worker)
    await worker.open(worker.stub.Attach(), scheduler_pb2.AttachRequest())
    assert reason_of(await worker.failure()) is Reason.PROTOCOL_VIOLATION


async def test_a_stream_that_says_nothing_is_a_violation(start_pool: StartPool) -> None:
    pool = await start_pool(hello_timeout_s=0.1)
    gateway = GatewayPeer(pool.scheduler.address, "gateway-1")
    pool.peers.append(gateway)
    call = gateway.stub.Submit(timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert reason_of(caught.value) is Reason.PROTOCOL_VIOLATION


async def test_a_gateway_without_a_name_is_refused(pool: Pool) -> None:
    gateway = GatewayPeer(pool.scheduler.address, "")
    pool.peers.append(gateway)
    hello = scheduler_pb2.SubmitRequest(hello=scheduler_pb2.GatewayHello())
    await gateway.open(gateway.stub.Submit(), hello)
    error = RpcError.from_rpc(await gateway.failure())
    assert error is not None
    assert (error.reason, error.context.field) == (Reason.INVALID_FIELD, "hello.gateway_id")


@pytest.mark.parametrize("message", ["hello", "nothing"])
async def test_a_second_hello_or_an_empty_message_is_a_violation(pool: Pool, message: str) -> None:
    gateway = await pool.gateway()
    hello = scheduler_pb2.GatewayHello(gateway_id="gateway-1")
    second = scheduler_pb2.SubmitRequest(hello=hello if message == "hello" else None)
    await gateway.write(second)
    assert reason_of(await gateway.failure()) is Reason.PROTOCOL_VIOLATION


async def test_a_hello_with_an_impossible_capacity_names_the_field(pool: Pool) -> None:
    worker = await pool.worker(max_requests=0, welcome=False)
    error = RpcError.from_rpc(await worker.failure())
    assert error is not None
    assert error.reason is Reason.INVALID_FIELD
    assert error.context.field == "hello.capacity.max_requests"


async def test_more_peers_than_allowed_are_sent_away(start_pool: StartPool) -> None:
    pool = await start_pool(max_workers=1)
    await pool.worker()
    second = await pool.worker("worker-2", welcome=False)
    failure = await second.failure()
    assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_worker_that_does_not_read_is_cut_off_and_others_go_on(
    start_pool: StartPool,
) -> None:
    pool = await start_pool(stall_s=0.3, dispatches_ahead=True)
    sleeper = await pool.worker(reads=False, max_requests=1000, pool_blocks=10**6)
    gateway = await pool.gateway()
    await gateway.take("worker")
    for number in range(600):  # 6 MB: more than gRPC buffers for a reader that does not read
        await gateway.submit(work_item(f"r.{number}", tokens=10_000, max_tokens=8))
    returned = {(await gateway.take("returned")).attempt.request_id for _ in range(5)}
    assert returned
    left = await gateway.take("worker")
    assert (left.worker_id, left.attached) == (sleeper.peer_id, False)
    worker = await pool.worker("worker-2", is_eager=True)
    await gateway.submit(work_item("r.0", attempt=2))
    await until(gateway, is_empty)
    assert ("r.0", 2) in {(item.request_id, item.attempt) for item in worker.items}


async def test_an_outbox_that_overflows_cuts_its_peer_off(start_pool: StartPool) -> None:
    pool = await start_pool(outbox_messages=16, queue_limit=1, stall_s=60.0)
    gateway = await pool.gateway(reads=False)
    observer = await pool.gateway("gateway-2")
    await until(observer, lambda state: state.gateways == 2)

    async def submit_without_reading() -> None:
        for _ in range(1000):  # each comes back with its long id: more than gRPC buffers
            await gateway.submit(work_item("x" * 100_000))

    submitting = asyncio.create_task(submit_without_reading())
    await until(observer, lambda state: state.gateways == 1)
    submitting.cancel()


# --- draining -------------------------------------------------------------------------------------


async def test_a_draining_scheduler_waits_for_what_runs(pool: Pool) -> None:
    worker = await pool.worker()
    gateway = await pool.gateway()
    await gateway.submit(work_item("r.1"))
    await worker.dispatched()
    assert await health_of(pool) == health_pb2.HealthCheckResponse.SERVING
    stopping = asyncio.create_task(pool.scheduler.stop(5.0))
    await asyncio.sleep(0.2)
    assert await health_of(pool) == health_pb2.HealthCheckResponse.NOT_SERVING
    assert not gateway.ended.done()
    await worker.finished("r.1")
    assert reason_of(await gateway.failure()) is Reason.DRAINING
    await asyncio.wait_for(stopping, 5)


async def health_of(pool: Pool) -> int:
    async with open_channel(pool.scheduler.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="calumma.scheduler.v1.SchedulerService")
        return int((await stub.Check(request, timeout=5)).status)
