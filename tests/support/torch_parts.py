"""A suite in one process around the torch engine, on a tiny model whose adapters PEFT has made."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.adapter_store.service import SERVICE as STORE_SERVICE
from services.worker import service as worker
from services.worker.config import WorkerSettings
from services.worker.engine import StepItem
from services.worker.engine_thread import EngineThread, StepEnded
from tests.engine.peft_world import PeftWorld
from tests.support.lifecycle_parts import LifecycleParts
from tests.support.suite_parts import LIMIT_S


class TorchParts(LifecycleParts):
    """Gateway and store have the model of the world, and so has every worker."""

    def __init__(self, folder: Path, stack: AsyncExitStack, world: PeftWorld) -> None:
        super().__init__(folder, stack)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            copyfile(self.model / name, world.folder / name)
        self.model = world.folder

    async def store_is_ready(self) -> None:
        """Wait until the registry has been read."""
        stub: Any = health_pb2_grpc.HealthStub(await self.channel(self.store.address))
        request = health_pb2.HealthCheckRequest(service=STORE_SERVICE)
        async with asyncio.timeout(LIMIT_S):
            while (await stub.Check(request)).status != health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.02)

    async def start_torch_worker(
        self, worker_id: str = "worker-1", *, store_address: str = ""
    ) -> worker.Worker:
        """On the CPU, in fp32, with one thread."""
        started = await worker.start(
            WorkerSettings(
                listen="127.0.0.1:0",
                scheduler=self.scheduler.address,
                adapter_store=store_address or self.store.address,
                model=str(self.model),
                device="cpu",
                dtype="float32",
                threads=1,
                worker_id=worker_id,
                log_level="warning",
                memory_bytes=64 * 2**20,
                host_cache_bytes=2**24,
            )
        )
        self.workers[worker_id] = started
        self._stack.push_async_callback(self.stop_worker, worker_id)
        return started


@asynccontextmanager
async def torch_parts(folder: Path, world: PeftWorld) -> AsyncGenerator[TorchParts]:
    """All but workers, started; everything is stopped at the end."""
    async with AsyncExitStack() as stack:
        parts = TorchParts(folder, stack, world)
        await parts.start()
        yield parts


def note_steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepItem, ...]]:
    """What every step from now on is made of."""
    steps: list[tuple[StepItem, ...]] = []
    run_step = EngineThread.run_step

    def note(
        thread: EngineThread, items: Sequence[StepItem], on_end: Callable[[StepEnded], None]
    ) -> None:
        steps.append(tuple(items))
        run_step(thread, items, on_end)

    monkeypatch.setattr(EngineThread, "run_step", note)
    return steps
