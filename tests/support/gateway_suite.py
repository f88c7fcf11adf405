"""A gateway among its peers, and a client that reads one stream."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.gateway.config import GatewaySettings
from services.gateway.service import SERVICE, Gateway, start
from tests.support.gateway_peers import (
    SchedulerPeer,
    StorePeer,
    WorkerPeer,
    soon,
)

RETRIES = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 3,
 "initialBackoff": "0.01s", "maxBackoff": "0.01s", "backoffMultiplier": 1,
 "retryableStatusCodes": ["UNAVAILABLE"]}}]}"""


@dataclass
class Suite:
    """A gateway and its peers. `settings` are changed before `start`."""

    model: Path
    encode: Any
    scheduler: SchedulerPeer
    worker: WorkerPeer
    other: WorkerPeer
    store: StorePeer
    stack: AsyncExitStack
    settings: dict[str, Any] = field(default_factory=dict)
    gateway: Gateway = None  # type: ignore[assignment]
    is_stopped: bool = False
    stub: Any = None
    health: Any = None

    async def start(self, *, ready: bool = True, retries: bool = False, **settings: Any) -> None:
        self.gateway = await start(
            GatewaySettings(
                listen="127.0.0.1:0",
                scheduler=self.scheduler.address,
                adapter_store=self.store.address,
                model=str(self.model),
                **settings,
            )
        )
        self.stack.push_async_callback(self.stop, 0)
        channel = await self.stack.enter_async_context(
            grpc.aio.insecure_channel(
                self.gateway.address, options=[("grpc.service_config", RETRIES)] if retries else []
            )
        )
        self.stub = gateway_pb2_grpc.InferenceServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)
        if ready:
            await self.is_serving()
            await self.worker.next_opened()
            await self.scheduler.next_hello()

    async def stop(self, grace_s: float) -> None:
        if not self.is_stopped:
            self.is_stopped = True
            await self.gateway.stop(grace_s)

    async def is_serving(self, *, serving: bool = True) -> None:
        status = health_pb2.HealthCheckResponse
        wanted = status.SERVING if serving else status.NOT_SERVING
        watch = self.health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        async with asyncio.timeout(10):
            async for answer in watch:
                if answer.status == wanted:
                    break
        watch.cancel()

    def stream(
        self, prompt: str = "go", *, timeout: float | None = None, **fields: Any
    ) -> "Reader":
        request = gateway_pb2.GenerateStreamRequest(prompt=prompt, **fields)
        return Reader(self.stub.GenerateStream(request, timeout=timeout))


class Reader:
    """A client that reads one stream."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.started: gateway_pb2.GenerateStarted | None = None
        self.finished: gateway_pb2.Completion | None = None
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[common_pb2.PositionLogprobs] = []

    async def read(self) -> bool:
        answer = await soon(self.call.read())
        if answer is grpc.aio.EOF:
            return False
        if answer.HasField("started"):
            self.started = answer.started
        elif answer.HasField("chunk"):
            self.text += answer.chunk.text
            self.token_ids += answer.chunk.token_ids
            self.logprobs += answer.chunk.logprobs
        else:
            self.finished = answer.finished
        return True

    async def read_until(self, text: str) -> None:
        while self.text != text:
            assert await self.read()

    async def read_all(self) -> gateway_pb2.Completion:
        while await self.read():
            pass
        assert self.finished is not None
        return self.finished

    async def error(self) -> tuple[grpc.StatusCode, error_details_pb2.ErrorInfo, float | None]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.read_all()
        return details(caught.value)


def details(
    error: grpc.aio.AioRpcError,
) -> tuple[grpc.StatusCode, error_details_pb2.ErrorInfo, float | None]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None, error
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_s = None
    for detail in status.details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            retry_s = retry.retry_delay.ToNanoseconds() / 1e9
    return error.code(), info, retry_s
