"""Composes the adapter store and runs what goes on in the background.

Not ready until object storage has answered and the registry has been read; after that it stays
ready, because what is mirrored and cached can be served while storage is away.
"""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import structlog

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from calumma.adapter_store.v1 import adapter_store_pb2_grpc as pb_grpc
from services.adapter_store.base_tensors import BaseTensors
from services.adapter_store.blobs import Blobs
from services.adapter_store.collect import Collector
from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.disk_cache import DiskCache
from services.adapter_store.peft import BaseModel
from services.adapter_store.publishing import Publisher
from services.adapter_store.registry import Registry, RegistryLimits
from services.adapter_store.servicer import LONG_LIVED, AdapterStoreServicer
from services.adapter_store.storage import Storage, Timeouts, open_storage
from services.adapter_store.upload import UploadLimits
from services.common.adapter_container import HEADER_BYTES_MAX
from services.common.base_model import (
    MODEL_FILE,
    is_hub_id,
    load_config,
    locate,
    model_identity,
)
from services.common.clients import Backoff
from services.common.errors import RpcError
from services.common.interceptors import ServerInterceptor
from services.common.server import ServiceServer

SERVICE: Final = pb.DESCRIPTOR.services_by_name["AdapterStoreService"].full_name
CONVERSIONS_MAX: Final = 2  # at a time; each holds its adapter in memory about three times
_log = structlog.get_logger("adapter_store")


class AdapterStore:
    """The running service."""

    def __init__(self, settings: AdapterStoreSettings, storage: Storage, base: BaseModel) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(CONVERSIONS_MAX, thread_name_prefix="publish")
        self._spooling = ThreadPoolExecutor(CONVERSIONS_MAX, thread_name_prefix="spool")
        self._registry = Registry(
            storage,
            limits=RegistryLimits(
                adapters=settings.adapters_max,
                watchers=settings.watchers_max,
                pinned_adapters=settings.pinned_adapters_max,
                pinned_bytes=settings.pinned_bytes_max,
            ),
            missing_ttl_s=settings.poll_s,
        )
        cache = DiskCache(settings.cache_dir / "blobs", bytes_max=settings.cache_bytes)
        self._blobs = Blobs(
            storage, cache, blob_bytes_max=settings.publish_bytes_max + HEADER_BYTES_MAX
        )
        self._collector = Collector(storage, self._registry, safety_age_s=settings.safety_age_s)
        publisher = Publisher(
            self._registry,
            self._blobs,
            base=base,
            rank_max=settings.rank_max,
            threads=self._threads,
        )
        servicer = AdapterStoreServicer(
            self._registry,
            self._blobs,
            publisher,
            limits=UploadLimits(
                bytes_max=settings.publish_bytes_max,
                idle_s=settings.upload_idle_s,
                uploads_max=settings.publishes_max,
            ),
            spool_dir=settings.cache_dir,
            threads=self._spooling,
        )
        self._server = ServiceServer(settings, ServerInterceptor(long_lived=LONG_LIVED))
        self._server.add(
            SERVICE,
            lambda server: pb_grpc.add_AdapterStoreServiceServicer_to_server(servicer, server),
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._address = ""

    @property
    def address(self) -> str:
        """Bound "host:port"."""
        return self._address

    async def start(self) -> None:
        """Listen, and read the registry in the background."""
        self._address = await self._server.start()
        self._tasks = [
            asyncio.create_task(self._mirror(), name="mirror"),
            asyncio.create_task(self._collect(), name="collect"),
        ]

    async def stop(self, grace_s: float) -> None:
        """End watches, let other calls end for `grace_s`, then end everything."""
        self._registry.end_watches()
        await self._server.stop(grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._blobs.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._spooling.shutdown(wait=False, cancel_futures=True)

    async def _mirror(self) -> None:
        """Read the registry until it answers, turn ready, and keep up with other replicas."""
        registry, backoff, is_ready = _Reached("registry"), Backoff(base_s=0.2), False
        while True:
            started_s = time.monotonic()
            reached = await registry.run(self._registry.sync)
            sync_s = time.monotonic() - started_s
            if reached and not is_ready:
                is_ready = True
                # What a long registry consists of lives on, and would be gone through by each full
                # collection: 0.3 s for 100,000 adapters, in which nothing else runs.
                gc.freeze()
                await self._server.set_serving(SERVICE, serving=True)
                _log.info("ready", store_url=self._settings.store_url)
            # A long registry is listed less often: a fifth of the time at most goes into it.
            pause_s = self._settings.poll_s if is_ready else backoff.next_delay_s()
            await asyncio.sleep(max(pause_s, 4 * sync_s))

    async def _collect(self) -> None:
        collector = _Reached("collector")
        while True:
            await asyncio.sleep(self._settings.collect_every_s)
            await collector.run(self._collector.collect)


class _Reached:
    """Runs something again and again, and says once when it begins to fail and when it ends to."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._fails = False

    async def run(self, act: Callable[[], Awaitable[object]]) -> bool:
        """Whether it succeeded."""
        try:
            await act()
        except RpcError as error:
            if not self._fails:
                cause = str(error.__cause__ or error).partition("\n")[0]
                _log.warning("storage_unreachable", what=self._what, cause=cause)
            self._fails = True
            return False
        except Exception:  # noqa: BLE001 - a pass that fails must not end those after it
            _log.exception("pass_failed", what=self._what)
            return False
        if self._fails:
            _log.info("storage_reached", what=self._what)
        self._fails = False
        return True


async def start(settings: AdapterStoreSettings) -> AdapterStore:
    """Start the service. Raises BaseModelError, and ValueError for a store_url that can't be."""
    storage = open_storage(
        settings.store_url,
        Timeouts(settings.call_timeout_s, settings.read_timeout_s),
        s3=settings.s3_credentials,
    )
    folder = locate(settings.model)
    base = BaseModel(load_config(folder), _base_names(settings, folder), BaseTensors(folder))
    service = AdapterStore(settings, storage, base)
    await service.start()
    return service


def _base_names(settings: AdapterStoreSettings, folder: Path) -> tuple[str, ...]:
    """Hub ids of the base model. A folder that nobody named is known by its shapes only."""
    served = model_identity(folder).name if (folder / MODEL_FILE).is_file() else settings.model
    return (served, *settings.base_names) if is_hub_id(served) else settings.base_names
