"""The worker between the real scheduler and the real adapter store; only the gateway is a peer."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from calumma.adapter_store.v1 import adapter_store_pb2 as store_pb
from calumma.adapter_store.v1 import adapter_store_pb2_grpc as store_grpc
from calumma.common.v1 import common_pb2
from services.adapter_store import service as adapter_store
from services.adapter_store.config import AdapterStoreSettings
from services.common.clients import open_channel
from services.common.errors import Reason
from services.scheduler import service as scheduler
from services.scheduler.config import SchedulerSettings
from services.worker import service as worker
from services.worker.config import WorkerSettings
from tests.support import scheduler_peers
from tests.support.peft_folders import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    write_peft_folder,
    write_tiny_model,
)
from tests.support.worker_peers import GatewayPeer, expected_tokens, quick_engine, work_item


async def test_many_requests_over_published_adapters_and_a_scheduler_restart(
    tmp_path: Path,
) -> None:
    shapes = write_tiny_model(tmp_path / "model")
    store = await adapter_store.start(
        AdapterStoreSettings(
            listen="127.0.0.1:0",
            store_url=(tmp_path / "store").as_uri(),
            model=str(tmp_path / "model"),
            cache_dir=tmp_path / "cache",
        )
    )
    brain = await scheduler.start(SchedulerSettings(listen="127.0.0.1:0"))
    address = brain.address
    replica = await worker.start(
        WorkerSettings(
            listen="127.0.0.1:0",
            scheduler=address,
            adapter_store=store.address,
            engine="simulated",
        ),
        build=lambda: quick_engine(step_ms=4, pool_blocks=200),
    )
    tokens = GatewayPeer(replica.address)
    gateways = [scheduler_peers.GatewayPeer(address, "gateway-1")]
    try:
        refs: list[common_pb2.AdapterRef | None] = [None]
        for number in range(5):
            folder = tmp_path / f"adapter-{number}"
            write_peft_folder(folder, shapes=shapes, num_layers=2, rank=4 * 2**number, seed=number)
            refs.append(await _publish(store.address, folder, f"adapter-{number}"))
        await gateways[0].connect()
        await tokens.open()
        items = [
            work_item(f"r{i}", adapter=refs[i % len(refs)], max_tokens=100, time_left_s=30)
            for i in range(30)
        ]
        for item in items:
            await gateways[0].submit(item)
        await tokens.ended(*(item.request_id for item in items[:6]))

        placed = [item for item in items if tokens.tokens[item.request_id]]
        await gateways[0].close()
        await brain.stop(0)
        brain = await scheduler.start(SchedulerSettings(listen=address))
        gateways.append(scheduler_peers.GatewayPeer(address, "gateway-1"))
        running = [item for item in placed if item.request_id not in tokens.endings]
        worker_id = replica.settings.worker_id
        await gateways[1].connect([(item.request_id, 1, worker_id) for item in running])
        for item in items:
            if item not in placed:
                await gateways[1].submit(item)
        lost = work_item("absent", adapter=_absent())
        await gateways[1].submit(lost)

        await tokens.ended(*(item.request_id for item in items), "absent")
        for item in items:
            assert tokens.tokens[item.request_id] == expected_tokens(item)
            assert tokens.ending_frames[item.request_id] == 1
        assert tokens.endings["absent"].error.reason == Reason.ADAPTER_NOT_FOUND
        async with asyncio.timeout(10):
            while sum(w.dispatched_requests for w in (await gateways[1].state()).workers):
                await asyncio.sleep(0.02)
    finally:
        await tokens.close()
        for gateway in gateways:
            await gateway.close()
        await replica.stop(1)
        await brain.stop(0)
        await store.stop(0)


async def _publish(address: str, folder: Path, name: str) -> common_pb2.AdapterRef:
    async def messages() -> AsyncIterator[store_pb.PublishRequest]:
        yield store_pb.PublishRequest(metadata=store_pb.PublishMetadata(name=name))
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            chunk = store_pb.FileChunk(file=file, data=(folder / file).read_bytes())
            yield store_pb.PublishRequest(chunk=chunk)

    async with open_channel(address) as channel:
        stub = store_grpc.AdapterStoreServiceStub(channel)
        async with asyncio.timeout(10):
            while True:
                try:
                    response = await stub.Publish(messages(), timeout=10)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        pytest.fail(str(error))
                    await asyncio.sleep(0.05)
                else:
                    return response.version.ref


def _absent() -> common_pb2.AdapterRef:
    return common_pb2.AdapterRef(digest=f"sha256:{7:064x}", rank=4, size_bytes=1000)
