"""Channels that services open, and how long they wait between tries."""

import asyncio
import importlib
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.common.clients import Backoff, open_channel
from services.common.config import ServiceSettings
from services.common.interceptors import ServerInterceptor
from services.common.server import ServiceServer


def test_backoff_stays_within_its_growing_ceiling() -> None:
    for _ in range(200):
        backoff = Backoff(base_s=0.1, cap_s=3.0)
        delays_s = [backoff.next_delay_s() for _ in range(40)]
        ceilings_s = [min(3.0, 0.1 * 2**tries) for tries in range(40)]
        assert all(0 <= d <= c for d, c in zip(delays_s, ceilings_s, strict=True))


def test_backoff_spreads_its_delays() -> None:
    backoffs = [Backoff(base_s=1.0, cap_s=1.0).next_delay_s() for _ in range(500)]
    assert min(backoffs) < 0.1
    assert max(backoffs) > 0.9


def test_backoff_begins_again_after_a_success() -> None:
    backoff = Backoff(base_s=0.001, cap_s=1000.0)
    for _ in range(30):
        backoff.next_delay_s()
    backoff.reset()
    assert backoff.next_delay_s() <= 0.001


def test_backoff_never_overflows() -> None:
    backoff = Backoff(base_s=0.1, cap_s=3.0)
    assert all(backoff.next_delay_s() <= 3.0 for _ in range(5000))


async def test_a_channel_comes_back_when_its_server_does() -> None:
    server, port = await serve_health("127.0.0.1:0")
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        await server.stop(None)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        server, _ = await serve_health(f"127.0.0.1:{port}")
        async with asyncio.timeout(10):
            request = health_pb2.HealthCheckRequest()
            answer = await stub.Check(request, timeout=10, wait_for_ready=True)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        await server.stop(None)


async def test_grpc_knows_every_option_that_servers_and_channels_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ignores unknown ones without a word; pings of idle peers then end their streams."""
    given: list[tuple[str, Any]] = []
    make_server, make_channel = grpc.aio.server, grpc.aio.insecure_channel

    def server(**arguments: Any) -> grpc.aio.Server:
        given.extend(arguments["options"])
        return make_server(**arguments)

    def channel(target: str, options: list[tuple[str, Any]]) -> grpc.aio.Channel:
        given.extend(options)
        return make_channel(target, options)

    monkeypatch.setattr(grpc.aio, "server", server)
    monkeypatch.setattr(grpc.aio, "insecure_channel", channel)
    ServiceServer(ServiceSettings(), ServerInterceptor())
    await open_channel("127.0.0.1:1").close()

    known = grpc_core()
    assert len(given) > 10
    assert not [name for name, _ in given if name.encode() + b"\0" not in known]


def grpc_core() -> bytes:
    """The library that knows the options' names."""
    return Path(str(importlib.import_module("grpc._cython.cygrpc").__file__)).read_bytes()


async def serve_health(listen: str) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port(listen)
    await server.start()
    return server, port
