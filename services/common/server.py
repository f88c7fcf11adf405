"""How every service listens: one grpc.aio server with health, reflection, limits and a drain.

Health follows grpc.health.v1: "" is the process, the service's full name is its readiness, and it
turns NOT_SERVING before a drain begins, so that callers go elsewhere first.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Protocol

import grpc
import structlog
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common.config import ServiceSettings
from services.common.interceptors import ServerInterceptor
from services.common.logs import setup_logs
from services.common.telemetry import setup_telemetry

_log = structlog.get_logger("server")


class ServiceServer:
    """One listener. `add` the servicers, `start`, `set_serving` when ready, `stop`."""

    def __init__(self, settings: ServiceSettings, interceptor: ServerInterceptor) -> None:
        self._settings = settings
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []
        self._server = grpc.aio.server(
            interceptors=[interceptor],
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
                ("grpc.max_metadata_size", 16 * 1024),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", 10_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def add(self, full_name: str, register: Callable[[grpc.aio.Server], None]) -> None:
        """Register a service, not serving yet, under its full proto name."""
        self._names.append(full_name)
        register(self._server)

    async def start(self) -> str:
        """Listen. Returns the bound "host:port". Exits 1 when the address is taken."""
        names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server)
        for name in self._names:
            await self.set_serving(name, serving=False)
        host = self._settings.listen.rpartition(":")[0]
        try:
            port = self._server.add_insecure_port(self._settings.listen)
        except RuntimeError:
            _log.error("cannot_listen", address=self._settings.listen)
            sys.exit(1)
        await self._server.start()
        address = f"{host}:{port}"
        _log.info("listening", address=address)
        return address

    async def set_serving(self, full_name: str, *, serving: bool) -> None:
        """Say whether a service is ready."""
        status = health_pb2.HealthCheckResponse
        await self._health.set(full_name, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Turn NOT_SERVING, let running calls end for `grace_s`, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


class RunningService(Protocol):
    """What `start(settings)` of every service package returns."""

    @property
    def address(self) -> str:
        """Bound "host:port"."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Drain for at most `grace_s`, then end everything."""
        ...


def serve(
    name: str, settings: ServiceSettings, start: Callable[[], Awaitable[RunningService]]
) -> None:
    """Run a service as this process until SIGTERM or SIGINT; a second signal ends it at once."""
    setup_logs(name, level=settings.log_level, log_format=settings.log_format)
    end_telemetry = setup_telemetry(name, instance=f"{socket.gethostname()}-{os.getpid()}")
    try:
        uvloop.run(_serve_until_signal(start, settings.grace_s))
    finally:
        end_telemetry()


async def _serve_until_signal(
    start: Callable[[], Awaitable[RunningService]], grace_s: float
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    service = await start()
    await stop.wait()
    _log.info("draining", grace_s=grace_s)
    await service.stop(grace_s)
    _log.info("stopped")
