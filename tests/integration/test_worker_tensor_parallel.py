"""A worker whose model is split over two processes: it serves, and it leaves when one is lost."""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from peft import LoraConfig  # noqa: E402

from calumma.common.v1 import common_pb2  # noqa: E402
from calumma.scheduler.v1.scheduler_pb2 import WorkItem  # noqa: E402
from services.common.errors import Reason  # noqa: E402
from services.worker.config import WorkerSettings  # noqa: E402
from services.worker.service import Worker, start  # noqa: E402
from tests.engine.peft_world import PeftWorld, peft_world, prompt  # noqa: E402
from tests.support.worker_peers import (  # noqa: E402
    Blob,
    GatewayPeer,
    SchedulerPeer,
    StorePeer,
    work_item,
)

_LIMIT_S = 60.0
_RANK = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    adapters = {"r8": LoraConfig(r=_RANK, lora_alpha=8, target_modules="all-linear")}
    return peft_world(tmp_path_factory.mktemp("world"), adapters)


@dataclass(frozen=True, slots=True)
class _Parts:
    worker: Worker
    scheduler: SchedulerPeer
    store: StorePeer
    gateway: GatewayPeer
    failed: asyncio.Event

    def kill_a_shard(self) -> None:
        (child,) = _children()
        os.kill(child, signal.SIGKILL)

    def item(
        self, name: str, index: int, ref: common_pb2.AdapterRef | None, *, max_tokens: int
    ) -> WorkItem:
        tokens = prompt(index)
        item = work_item(name, adapter=ref, tokens=len(tokens), max_tokens=max_tokens)
        del item.token_ids[:]
        item.token_ids.extend(tokens)
        return item


@asynccontextmanager
async def _parts(world: PeftWorld) -> AsyncGenerator[_Parts]:
    store, scheduler = await StorePeer().listen(), await SchedulerPeer().listen()
    failed = asyncio.Event()
    settings = WorkerSettings(
        listen="127.0.0.1:0",
        scheduler=scheduler.address,
        adapter_store=store.address,
        model=str(world.folder),
        device="cpu",
        dtype="float32",
        threads=2,
        tensor_parallel=2,
        memory_bytes=2**22,
        host_cache_bytes=2**24,
        log_level="warning",
    )
    worker = await start(settings, on_failure=failed.set)
    gateway = GatewayPeer(worker.address)
    try:
        await scheduler.attached()
        await gateway.open()
        yield _Parts(worker, scheduler, store, gateway, failed)
    finally:
        await gateway.close()
        await worker.stop(1.0)
        await scheduler.close()
        await store.close()
    assert _children() == []


async def test_tokens_of_a_split_model_are_those_of_peft(world: PeftWorld) -> None:
    async with _parts(world) as parts:
        digest, blob = world.blobs["r8"]
        ref = parts.store.add(Blob(bytes(blob), _RANK))
        assert ref.digest == digest
        items = [
            parts.item("adapted", 0, ref, max_tokens=12),
            parts.item("base", 1, None, max_tokens=12),
        ]
        await parts.scheduler.dispatch(*items)
        await parts.gateway.until(lambda: len(parts.gateway.endings) == 2, wait_s=_LIMIT_S)
        assert parts.gateway.tokens["adapted"] == world.greedy("r8", prompt(0), 12)
        assert parts.gateway.tokens["base"] == world.greedy(None, prompt(1), 12)


async def test_a_worker_that_loses_a_shard_fails_and_its_requests_go_elsewhere(
    world: PeftWorld,
) -> None:
    async with _parts(world) as parts:
        item = parts.item("running", 0, None, max_tokens=200)
        await parts.scheduler.dispatch(item)
        await parts.gateway.until(lambda: len(parts.gateway.tokens["running"]) > 2, wait_s=_LIMIT_S)
        parts.kill_a_shard()
        await asyncio.wait_for(parts.failed.wait(), _LIMIT_S)
        await parts.gateway.until(lambda: "running" in parts.gateway.endings, wait_s=_LIMIT_S)
        assert parts.gateway.endings["running"].error.reason == Reason.WORKER_LOST
        assert parts.worker.has_failed


async def test_an_idle_worker_that_loses_a_shard_fails(world: PeftWorld) -> None:
    async with _parts(world) as parts:
        parts.kill_a_shard()
        await asyncio.wait_for(parts.failed.wait(), _LIMIT_S)


async def test_a_request_whose_adapter_meets_the_loss_goes_elsewhere(world: PeftWorld) -> None:
    async with _parts(world) as parts:
        ref = parts.store.add(Blob(bytes(world.blobs["r8"][1]), _RANK))
        parts.store.gate.clear()
        await parts.scheduler.dispatch(parts.item("waiting", 0, ref, max_tokens=8))
        await parts.store.asked()
        parts.kill_a_shard()
        parts.store.gate.set()
        await asyncio.wait_for(parts.failed.wait(), _LIMIT_S)
        await parts.gateway.until(lambda: "waiting" in parts.gateway.endings, wait_s=_LIMIT_S)
        assert parts.gateway.endings["waiting"].error.reason == Reason.WORKER_LOST


def _children() -> list[int]:
    """Processes of shards that this one has started and that still run."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text(encoding="ascii").split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"parallel_child" in command:
                found.append(int(pid))
    return found
