"""An adapter store as its clients see it: replicas on one storage, and what they are asked."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from calumma.adapter_store.v1 import adapter_store_pb2_grpc as pb_grpc
from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.service import SERVICE, AdapterStore, start
from services.adapter_store.storage import ObjectStorage, Timeouts, open_storage
from services.common.clients import open_channel
from services.common.errors import RpcError
from tests.support.peft_folders import CONFIG_FILE, WEIGHTS_FILE, write_peft_folder

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Client:
    """A channel to a running store."""

    service: AdapterStore
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        return pb_grpc.AdapterStoreServiceStub(self.channel)

    async def publish(
        self, folder: Path, name: str = "a", *, chunk_bytes: int = 2**20, **metadata: Any
    ) -> pb.PublishResponse:
        async def messages() -> AsyncIterator[pb.PublishRequest]:
            yield pb.PublishRequest(metadata=pb.PublishMetadata(name=name, **metadata))
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                data = (folder / file).read_bytes()
                for start_byte in range(0, len(data), chunk_bytes):
                    part = data[start_byte : start_byte + chunk_bytes]
                    yield pb.PublishRequest(chunk=pb.FileChunk(file=file, data=part))

        response: pb.PublishResponse = await self.stub.Publish(messages(), timeout=30)
        return response

    async def download(self, digest: str, offset: int = 0) -> bytes:
        data = b""
        request = pb.DownloadRequest(digest=digest, offset=offset)
        async for message in self.stub.Download(request, timeout=30):
            assert message.offset == offset + len(data)
            data += message.data
            assert message.total_bytes >= offset + len(data)
        return data

    async def is_serving(self) -> bool:
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def until_serving(self) -> None:
        async with asyncio.timeout(10):
            while not await self.is_serving():
                await asyncio.sleep(0.02)


@dataclass(frozen=True)
class World:
    """A storage that any number of replicas may be started on."""

    folder: Path
    store_url: str
    shapes: dict[str, tuple[int, int]]

    @property
    def storage(self) -> ObjectStorage:
        return open_storage(self.store_url, Timeouts())

    def settings(self, **changes: Any) -> AdapterStoreSettings:
        known: dict[str, Any] = {
            "listen": "127.0.0.1:0",
            "store_url": self.store_url,
            "model": str(self.folder / "model"),
            "base_names": ("acme/tiny-base",),
            "cache_dir": self.folder / f"cache-{uuid.uuid4().hex}",
            "poll_s": 0.05,
        }
        return AdapterStoreSettings(**{**known, **changes})

    @asynccontextmanager
    async def replica(self, **changes: Any) -> AsyncGenerator[Client]:
        service = await start(self.settings(**changes))
        channel = open_channel(service.address)
        client = Client(service, channel)
        try:
            await client.until_serving()
            yield client
        finally:
            await channel.close()
            await service.stop(0)

    def adapter(self, seed: int = 0, **options: Any) -> Path:
        folder = self.folder / f"adapter-{uuid.uuid4().hex}"
        options.setdefault("target_modules", LINEARS)
        write_peft_folder(folder, shapes=self.shapes, num_layers=2, seed=seed, **options)
        return folder


async def error_of(call: Any) -> RpcError:
    """The details of the status that `call` ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (_drained(call) if hasattr(call, "read") else call)
    error = RpcError.from_rpc(caught.value)
    assert error is not None, caught.value
    assert error.code is caught.value.code()
    return error


async def _drained(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def next_of(watch: Any) -> Any:
    async with asyncio.timeout(10):
        message = await watch.read()
    kind = message.WhichOneof("event")
    return message.deleted if kind == "deleted" else kind, message
