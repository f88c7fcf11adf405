"""A suite in one process whose engines can be looked into, for tests of adapters' lives.

Also its clients, whose every call is one line.
"""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from calumma.adapter_store.v1 import adapter_store_pb2 as store_pb
from calumma.adapter_store.v1 import adapter_store_pb2_grpc as store_grpc
from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from calumma.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from services.common.clients import open_channel
from services.worker import service as worker
from services.worker.config import WorkerSettings
from services.worker.engine.simulated import SimulatedEngine
from services.worker.outputs import Tier
from tests.support.peft_folders import CONFIG_FILE, WEIGHTS_FILE, write_peft_folder
from tests.support.suite_parts import LAYERS, LIMIT_S, SHAPES, SuiteParts
from tests.support.worker_peers import INFO, QUICK, FaultyEngine

TIERS = {Tier.DEVICE: common_pb2.ADAPTER_TIER_DEVICE, Tier.HOST: common_pb2.ADAPTER_TIER_HOST}


@dataclasses.dataclass
class Clients:
    """Stubs of all that clients and operators call."""

    gateway: Any
    scheduler: Any
    store: Any

    async def unload(
        self, digest: str, *, grace_s: float = 10.0
    ) -> scheduler_pb2.UnloadAdapterResponse:
        """Have every worker drop it."""
        request = scheduler_pb2.UnloadAdapterRequest(digest=digest)
        request.grace.FromNanoseconds(int(grace_s * 1e9))
        answer: scheduler_pb2.UnloadAdapterResponse
        answer = await self.scheduler.UnloadAdapter(request, timeout=grace_s + LIMIT_S)
        return answer

    async def publish(self, folder: Path, name: str, **metadata: Any) -> store_pb.PublishResponse:
        """Publish a PEFT folder."""

        async def messages() -> AsyncIterator[store_pb.PublishRequest]:
            yield store_pb.PublishRequest(metadata=store_pb.PublishMetadata(name=name, **metadata))
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                data = (folder / file).read_bytes()
                for start in range(0, len(data), 2**20):
                    chunk = store_pb.FileChunk(file=file, data=data[start : start + 2**20])
                    yield store_pb.PublishRequest(chunk=chunk)

        answer: store_pb.PublishResponse = await self.store.Publish(messages(), timeout=LIMIT_S)
        return answer

    async def generate(self, adapter: str, *, max_tokens: int = 4) -> gateway_pb2.GenerateResponse:
        """A whole completion."""
        answer: gateway_pb2.GenerateResponse = await self.gateway.Generate(
            gateway_pb2.GenerateRequest(
                prompt="go",
                adapter=adapter,
                stopping=common_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True),
            ),
            timeout=LIMIT_S,
        )
        return answer


class LifecycleParts(SuiteParts):
    """`engines`: of each worker that was ever started, the last one by its id."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        super().__init__(folder, stack)
        self.engines: dict[str, FaultyEngine] = {}

    async def start_worker(
        self,
        worker_id: str = "worker-1",
        *,
        step_ms: float = 2.0,
        pool_blocks: int = INFO.pool_blocks,
        max_sequences: int = INFO.max_sequences,
        store_address: str = "",
        **settings: Any,
    ) -> worker.Worker:
        info = dataclasses.replace(
            INFO,
            vocab_size=256,
            num_layers=LAYERS,
            pool_blocks=pool_blocks,
            max_sequences=max_sequences,
        )
        profile = dataclasses.replace(QUICK, fixed_ms=step_ms / 2, weights_ms=step_ms / 2)
        engine = self.engines[worker_id] = FaultyEngine(SimulatedEngine(info, profile))
        started = await worker.start(
            WorkerSettings(
                listen="127.0.0.1:0",
                scheduler=self.scheduler.address,
                adapter_store=store_address or self.store.address,
                engine="simulated",
                worker_id=worker_id,
                log_level="warning",
                **settings,
            ),
            build=lambda: engine,
        )
        self.workers[worker_id] = started
        self._stack.push_async_callback(self.stop_worker, worker_id)
        return started

    async def clients(self) -> Clients:
        """A channel to each service."""
        channels = [
            await self._stack.enter_async_context(open_channel(address))
            for address in (self.gateway.address, self.scheduler.address, self.store.address)
        ]
        return Clients(
            gateway_pb2_grpc.InferenceServiceStub(channels[0]),
            scheduler_pb2_grpc.SchedulerServiceStub(channels[1]),
            store_grpc.AdapterStoreServiceStub(channels[2]),
        )

    def folder_of(self, seed: int, **options: Any) -> Path:
        """A PEFT folder with random weights, made once."""
        folder = self.folder / f"weights-{seed}"
        if not folder.is_dir():
            write_peft_folder(folder, shapes=SHAPES, num_layers=LAYERS, seed=seed, **options)
        return folder

    async def check_rest(self, worker_id: str = "worker-1") -> None:
        """Wait until nothing runs; then nothing is held but resident adapters, as it is told."""
        running, engine = self.workers[worker_id], self.engines[worker_id]
        assert not running.has_failed
        assert await running.driver.wait_idle(LIMIT_S), "requests are left"
        async with asyncio.timeout(LIMIT_S):
            while engine.open or self._is_loading(running):
                await asyncio.sleep(0.01)  # the engine closes sequences with its next operations
        running.core.check_integrity()
        running.residency.check_integrity()
        held = running.residency.held()
        near = {digest: it for digest, it in held.items() if it.tier is Tier.DEVICE}
        assert engine.adapters == dict.fromkeys(near, LAYERS)
        state = await self.worker_state(worker_id)
        told = {it.digest: (it.tier, it.in_host, it.users) for it in state.adapters}
        assert told == {it: (TIERS[one.tier], one.in_host, 0) for it, one in held.items()}
        assert (state.kv_blocks, state.running_requests, state.loading_requests) == (0, 0, 0)
        assert (state.adapter_blocks > 0) == bool(near)

    def _is_loading(self, running: worker.Worker) -> bool:
        held = running.residency.held().values()
        is_moving = any(it.ready_layers is not None for it in held)
        near = {digest for digest, it in running.residency.held().items() if it.tier is Tier.DEVICE}
        engines = self.engines[running.settings.worker_id].adapters.keys()
        return is_moving or near != engines


@asynccontextmanager
async def lifecycle_parts(folder: Path) -> AsyncGenerator[LifecycleParts]:
    """All but workers, started; everything is stopped at the end."""
    async with AsyncExitStack() as stack:
        parts = LifecycleParts(folder, stack)
        await parts.start()
        yield parts
