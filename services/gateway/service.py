"""Composes the gateway: tokenizer, links, table of requests, servicer and server."""

import asyncio
import contextlib
import secrets
from dataclasses import replace
from typing import Final

from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.common import base_model
from services.common.base_model import ModelConfig
from services.common.interceptors import ServerInterceptor
from services.common.server import ServiceServer
from services.gateway.config import GatewaySettings
from services.gateway.generations import Generations
from services.gateway.observation import Instruments
from services.gateway.outbox import Outbox
from services.gateway.parse import Limits
from services.gateway.registry import Registry
from services.gateway.scheduler_link import SchedulerLink
from services.gateway.servicer import InferenceServicer
from services.gateway.streams import RequestStreams
from services.gateway.tasks import start_task
from services.gateway.tokenizer import ModelTokenizer
from services.gateway.worker_links import WorkerLinks

SERVICE: Final = gateway_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
_CLOSE_S = 1.0  # for clients to read how their requests ended
_FLUSH_S = 1.0  # for the last cancellations to reach the scheduler


async def start(settings: GatewaySettings) -> "Gateway":
    """Load the tokenizer, listen, and begin to dial. Raises BaseModelError.

    Returns at once; health says SERVING when the scheduler has welcomed this gateway and the
    mirror of the adapter store is complete.
    """
    folder = base_model.locate(settings.model)
    config = base_model.load_config(folder)
    tokenizer = await asyncio.to_thread(ModelTokenizer.load, folder)
    gateway = Gateway(settings, config, tokenizer, model=folder.name.replace("--", "/"))
    await gateway.start()
    return gateway


class Gateway:
    """A running gateway."""

    def __init__(
        self,
        settings: GatewaySettings,
        config: ModelConfig,
        tokenizer: ModelTokenizer,
        *,
        model: str,
    ) -> None:
        self.gateway_id = f"gateway-{secrets.token_hex(4)}"
        self.address = ""
        self._changed = asyncio.Event()
        self._outbox = Outbox()
        self._streams = RequestStreams(
            self._outbox,
            requests_max=settings.max_requests,
            resubmissions_max=settings.max_resubmissions,
        )
        self._model_limits = _limits(settings, config)
        self._workers = WorkerLinks(
            self.gateway_id, self._streams, lost_after_s=settings.worker_reconnect_s
        )
        self._scheduler = SchedulerLink(
            settings.scheduler,
            gateway_id=self.gateway_id,
            outbox=self._outbox,
            streams=self._streams,
            workers=self._workers,
            restart_s=settings.scheduler_restart_s,
            changed=self._changed,
        )
        self._registry = Registry(
            settings.adapter_store, timeout_s=settings.store_timeout_s, changed=self._changed
        )
        self._generations = Generations(
            settings,
            limits=self._current_limits,
            tokenizer=tokenizer,
            registry=self._registry,
            scheduler=self._scheduler,
            streams=self._streams,
            instruments=Instruments(model),
        )
        self._server = ServiceServer(settings, ServerInterceptor())
        self._tasks: list[asyncio.Task[None]] = []

    def _current_limits(self) -> Limits:
        """What the model allows, down to what the most capable worker takes."""
        limits, served = self._model_limits, self._workers.context_tokens
        if served is None or served >= limits.context_tokens:
            return limits
        return replace(limits, context_tokens=served)

    async def start(self) -> None:
        """Listen and begin to dial."""
        servicer = InferenceServicer(self._generations)
        self._server.add(
            SERVICE,
            lambda server: gateway_pb2_grpc.add_InferenceServiceServicer_to_server(
                servicer, server
            ),
        )
        self.address = await self._server.start()
        runs = (self._scheduler.run(), self._registry.run(), self._report_health())
        self._tasks = [start_task(run) for run in runs]

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, let running ones go on for `grace_s`, then end them."""
        report_health = self._tasks.pop()
        await _cancelled(report_health)
        await self._server.set_serving(SERVICE, serving=False)
        await self._generations.drain(grace_s)
        await self._server.stop(_CLOSE_S)
        await self._flush()
        for task in self._tasks:
            await _cancelled(task)
        await self._workers.close()
        await self._registry.close()
        self._generations.close()

    async def _report_health(self) -> None:
        while True:
            self._changed.clear()
            is_ready = self._scheduler.is_connected and self._registry.is_synced
            await self._server.set_serving(SERVICE, serving=is_ready)
            await self._changed.wait()

    async def _flush(self) -> None:
        if self._scheduler.is_connected:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_S):
                    await self._outbox.told()


def _limits(settings: GatewaySettings, config: ModelConfig) -> Limits:
    most = settings.max_context_tokens or config.max_positions
    return Limits(
        context_tokens=min(most, config.max_positions),
        vocab_size=config.vocab_size,
        prompt_bytes=settings.max_prompt_bytes,
        default_max_tokens=settings.default_max_tokens,
    )


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
