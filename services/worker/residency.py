"""Where adapters are: the adapter store, this worker's host memory, device memory.

The core decides what is in device memory; this performs it. A load takes the blob from the host
cache or else from the store, once however many requests wait, and hands it to the engine between
two steps. Every load ends in one call of `on_ended`. The store being down harms nobody whose
adapter is here.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
from opentelemetry import context as otel_context
from opentelemetry.context import Context

from services.common.adapter_container import ContainerError
from services.common.errors import Reason, RpcError
from services.core.types import Adapter, AdapterDigest
from services.worker.engine import AdapterIncompatibleError
from services.worker.engine_thread import EngineThread
from services.worker.measures import Measures
from services.worker.outputs import Tier

_log = structlog.get_logger("residency")
Fetch = Callable[[Adapter], Awaitable[bytearray]]


class HostCache:
    """Blobs in host memory, least recently used out first, at most `bytes_max` of them."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._held_bytes = 0
        self._blobs: OrderedDict[AdapterDigest, tuple[Adapter, bytearray]] = OrderedDict()

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def __contains__(self, digest: AdapterDigest) -> bool:
        return digest in self._blobs

    def adapters(self) -> list[Adapter]:
        """Whose blobs are here, least recently used first."""
        return [adapter for adapter, _ in self._blobs.values()]

    def get(self, digest: AdapterDigest) -> bytearray | None:
        """The blob, which counts as used now."""
        if digest not in self._blobs:
            return None
        self._blobs.move_to_end(digest)
        return self._blobs[digest][1]

    def put(self, adapter: Adapter, blob: bytearray) -> None:
        """Keep a blob if it fits at all, and drop others for it."""
        if len(blob) > self._bytes_max or adapter.digest in self._blobs:
            return
        self._blobs[adapter.digest] = (adapter, blob)
        self._held_bytes += len(blob)
        while self._held_bytes > self._bytes_max:
            _, (_, dropped) = self._blobs.popitem(last=False)
            self._held_bytes -= len(dropped)


@dataclass(frozen=True, slots=True)
class _Load:
    adapter: Adapter
    tier: Tier
    task: asyncio.Task[None]


class Residency:
    """Adapters of this worker by tier. Its methods belong to the driver."""

    def __init__(
        self,
        *,
        engine: EngineThread,
        fetch: Fetch,
        host_cache: HostCache,
        measures: Measures,
    ) -> None:
        self._engine = engine
        self._fetch = fetch
        self._host_cache = host_cache
        self._measures = measures
        self._device: dict[AdapterDigest, Adapter] = {}
        self._loads: dict[AdapterDigest, _Load] = {}

    def tier(self, digest: AdapterDigest | None) -> Tier:
        """Where a request that comes now finds its adapter."""
        if digest is None:
            return Tier.NONE
        if digest in self._device:
            return Tier.DEVICE
        if digest in self._loads:
            return self._loads[digest].tier
        return Tier.HOST if digest in self._host_cache else Tier.STORE

    def held(self) -> dict[AdapterDigest, tuple[Adapter, Tier]]:
        """Every adapter in device or host memory, with the nearer of its tiers."""
        host = {adapter.digest: (adapter, Tier.HOST) for adapter in self._host_cache.adapters()}
        return host | {digest: (adapter, Tier.DEVICE) for digest, adapter in self._device.items()}

    def near(self) -> frozenset[AdapterDigest]:
        """Adapters that load without the store."""
        return frozenset(adapter.digest for adapter in self._host_cache.adapters())

    def load(
        self,
        adapter: Adapter,
        *,
        context: Context | None,
        on_ended: Callable[[AdapterDigest, RpcError | None], None],
    ) -> None:
        """Begin to bring the adapter into device memory. `context`: the span it happens in."""
        digest = adapter.digest
        assert digest not in self._loads
        assert digest not in self._device
        tier = self.tier(digest)

        async def run() -> None:
            otel_context.attach(context or Context())
            error = await self._load(adapter, tier)
            del self._loads[digest]
            if error is None:
                self._device[digest] = adapter
            on_ended(digest, error)

        task = asyncio.create_task(run(), name=f"load {digest[:19]}")
        self._loads[digest] = _Load(adapter, tier, task)

    def evict(self, digest: AdapterDigest) -> None:
        """Take the adapter out of device memory."""
        del self._device[digest]
        self._engine.remove_adapter(digest)

    async def stop(self) -> None:
        """End the loads under way, without a report."""
        tasks = [load.task for load in self._loads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _load(self, adapter: Adapter, tier: Tier) -> RpcError | None:
        start_s = time.monotonic()
        try:
            blob = self._host_cache.get(adapter.digest)
            if blob is None:
                blob = await self._fetch(adapter)
                self._host_cache.put(adapter, blob)
            await self._engine.add_adapter(adapter.digest, blob)
        except Exception as error:  # noqa: BLE001 - every load ends in one event
            return _as_rpc_error(error, adapter)
        self._measures.record_load(time.monotonic() - start_s, tier)
        return None


def _as_rpc_error(error: Exception, adapter: Adapter) -> RpcError:
    match error:
        case RpcError():
            _log.warning("adapter_load_failed", digest=adapter.digest, reason=error.reason)
            return error
        case AdapterIncompatibleError():
            reason = Reason.ADAPTER_BASE_MISMATCH
        case ContainerError():
            reason = Reason.ADAPTER_CORRUPT
        case _:
            reason = Reason.INTERNAL
    _log.warning("adapter_load_failed", digest=adapter.digest, reason=reason, exc_info=error)
    message = "the adapter could not be loaded" if reason is Reason.INTERNAL else str(error)
    return RpcError(reason, message, stage="adapter_load", resource=("adapter", adapter.digest))
