"""A whole suite in one process: real services that speak real gRPC, around a simulated engine."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from calumma.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from calumma.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from calumma.worker.v1 import worker_pb2, worker_pb2_grpc
from services.adapter_store import service as adapter_store
from services.adapter_store.config import AdapterStoreSettings
from services.common.clients import open_channel
from services.gateway import service as gateway
from services.gateway.config import GatewaySettings
from services.scheduler import service as scheduler
from services.scheduler.config import SchedulerSettings
from services.worker import service as worker
from services.worker.config import WorkerSettings
from services.worker.engine.simulated import SimulatedEngine
from tests.support.gateway_peers import write_model
from tests.support.peft_folders import CONFIG_FILE, WEIGHTS_FILE, write_peft_folder
from tests.support.worker_peers import INFO, QUICK

SHAPES = {"q_proj": (64, 64), "v_proj": (64, 64)}
LAYERS = 2
LIMIT_S = 20.0


class SuiteParts:
    """The services of one suite; each can be stopped and started on its port by the test."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.model.mkdir()
        write_model(self.model)
        self._stack = stack
        self.store: adapter_store.AdapterStore
        self.scheduler: scheduler.Scheduler
        self.gateway: gateway.Gateway
        self.workers: dict[str, worker.Worker] = {}

    async def start(self) -> None:
        """Everything but workers."""
        await self.start_store()
        await self.start_scheduler()
        self.gateway = await self.start_gateway()

    async def start_gateway(self, **settings: Any) -> gateway.Gateway:
        started = await gateway.start(
            GatewaySettings(
                listen="127.0.0.1:0",
                scheduler=self.scheduler.address,
                adapter_store=self.store.address,
                model=str(self.model),
                **settings,
            )
        )
        self._stack.push_async_callback(started.stop, 0)
        return started

    async def start_scheduler(self, listen: str = "127.0.0.1:0") -> None:
        settings = SchedulerSettings(listen=listen, worker_grace_s=0.5)
        self.scheduler = await scheduler.start(settings)
        self._stack.push_async_callback(self.scheduler.stop, 0)

    async def start_store(self, listen: str = "127.0.0.1:0") -> None:
        self.store = await adapter_store.start(
            AdapterStoreSettings(
                listen=listen,
                store_url=(self.folder / "store").as_uri(),
                model=str(self.model),
                cache_dir=self.folder / "cache",
                poll_s=0.1,
            )
        )
        self._stack.push_async_callback(self.store.stop, 0)

    async def start_worker(
        self, worker_id: str = "worker-1", *, step_ms: float = 2.0, **settings: Any
    ) -> worker.Worker:
        info = dataclasses.replace(INFO, vocab_size=256, num_layers=LAYERS)
        profile = dataclasses.replace(QUICK, fixed_ms=step_ms / 2, weights_ms=step_ms / 2)
        started = await worker.start(
            WorkerSettings(
                listen="127.0.0.1:0",
                scheduler=self.scheduler.address,
                adapter_store=self.store.address,
                engine="simulated",
                worker_id=worker_id,
                **settings,
            ),
            build=lambda: SimulatedEngine(info, profile),
        )
        self.workers[worker_id] = started
        self._stack.push_async_callback(self.stop_worker, worker_id)
        return started

    async def stop_worker(self, worker_id: str) -> None:
        if (running := self.workers.pop(worker_id, None)) is not None:
            await running.stop(0)

    async def channel(self, address: str) -> grpc.aio.Channel:
        return await self._stack.enter_async_context(open_channel(address))

    async def store_stub(self) -> Any:
        return adapter_store_pb2_grpc.AdapterStoreServiceStub(
            await self.channel(self.store.address)
        )

    async def scheduler_stub(self) -> Any:
        return scheduler_pb2_grpc.SchedulerServiceStub(await self.channel(self.scheduler.address))

    async def gateway_stub(self, address: str = "") -> Any:
        channel = await self.channel(address or self.gateway.address)
        return gateway_pb2_grpc.InferenceServiceStub(channel)

    async def publish(self, name: str, *, seed: int = 0, **metadata: Any) -> Any:
        """Publish random weights; the same seed makes the same ones. Returns the version."""
        folder = self.folder / f"peft-{name}-{seed}"
        write_peft_folder(folder, shapes=SHAPES, num_layers=LAYERS, seed=seed)
        stub = await self.store_stub()

        async def messages() -> AsyncIterator[adapter_store_pb2.PublishRequest]:
            about = adapter_store_pb2.PublishMetadata(name=name, **metadata)
            yield adapter_store_pb2.PublishRequest(metadata=about)
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                chunk = adapter_store_pb2.FileChunk(file=file, data=(folder / file).read_bytes())
                yield adapter_store_pb2.PublishRequest(chunk=chunk)

        async with asyncio.timeout(LIMIT_S):
            while True:
                try:
                    return (await stub.Publish(messages(), timeout=10)).version
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                    await asyncio.sleep(0.05)  # the registry has not been read yet

    async def generate(
        self, adapter: str, *, max_tokens: int = 4, gateway_address: str = ""
    ) -> gateway_pb2.GenerateResponse:
        """One whole completion; waits for a worker if there is none yet."""
        stub = await self.gateway_stub(gateway_address)
        request = gateway_pb2.GenerateRequest(prompt="go", adapter=adapter)
        request.stopping.max_tokens = max_tokens
        request.stopping.ignore_eos = True
        answer: gateway_pb2.GenerateResponse = await stub.Generate(request, timeout=LIMIT_S)
        return answer

    async def worker_state(self, worker_id: str = "worker-1") -> worker_pb2.GetStateResponse:
        stub: Any = worker_pb2_grpc.WorkerServiceStub(
            await self.channel(self.workers[worker_id].address)
        )
        state: worker_pb2.GetStateResponse = await stub.GetState(worker_pb2.GetStateRequest())
        return state


class ResidencyWatch:
    """The newest that a WatchResidency stream has said of every worker."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.workers: dict[str, scheduler_pb2.WorkerResidency] = {}
        self.messages = 0

    @classmethod
    async def open(cls, parts: SuiteParts) -> "ResidencyWatch":
        stub = await parts.scheduler_stub()
        return cls(stub.WatchResidency(scheduler_pb2.WatchResidencyRequest()))

    async def read(self) -> None:
        message = await self._call.read()
        assert message is not grpc.aio.EOF
        self.messages += 1
        for one in message.workers:
            self.workers[one.worker_id] = one

    async def until(self, condition: "Callable[[ResidencyWatch], object]") -> None:
        """Read on until `condition(self)` holds."""
        async with asyncio.timeout(LIMIT_S):
            while not condition(self):
                await self.read()

    def find(
        self, digest: str, worker_id: str = "worker-1"
    ) -> scheduler_pb2.AdapterResidency | None:
        known = self.workers.get(worker_id)
        adapters = known.adapters if known is not None else ()
        return next((it for it in adapters if it.digest == digest), None)


@asynccontextmanager
async def suite_parts(folder: Path) -> AsyncGenerator[SuiteParts]:
    """All but workers, started; everything is stopped at the end."""
    async with AsyncExitStack() as stack:
        parts = SuiteParts(folder, stack)
        await parts.start()
        yield parts
