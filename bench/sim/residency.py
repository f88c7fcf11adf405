"""Where a simulated worker's adapters are: host cache, network to the store, link to the device.

Downloads share one network and transfers share one link, each in order; a download's latency
overlaps with other downloads. The host cache drops what was used longest ago, as the live one does.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from bench.sim.faults import Fault, store_slowness
from bench.sim.hardware import Hardware
from bench.sim.loop import EventLoop
from services.core.types import Adapter, AdapterDigest

# Five tries with backoff are over by then, as in `services.worker.downloads`.
STORE_FAILURE_S: Final = 1.0


@dataclass(slots=True)
class LoadCounts:
    """What the loads of one worker came to."""

    loads: int = 0
    loaded_bytes: int = 0
    downloads: int = 0
    downloaded_bytes: int = 0


class HostCache:
    """Adapters in host memory. Only the bytes count. A copy of a filled one is a new worker's."""

    def __init__(self, bytes_max: int, adapters: Iterable[Adapter] = ()) -> None:
        self._bytes_max = bytes_max
        self._held_bytes = 0
        self._held: OrderedDict[AdapterDigest, int] = OrderedDict()
        for adapter in adapters:
            if self._held_bytes + adapter.size_bytes > bytes_max:
                break
            self.put(adapter)
        self._digests = frozenset(self._held)  # replaced when what is held changes

    @property
    def digests(self) -> frozenset[AdapterDigest]:
        return self._digests

    def copy(self) -> "HostCache":
        """One that holds the same."""
        twin = HostCache(self._bytes_max)
        twin._held, twin._held_bytes = self._held.copy(), self._held_bytes
        twin._digests = self._digests
        return twin

    def use(self, digest: AdapterDigest) -> bool:
        """True if the adapter is here; it counts as used now."""
        if digest not in self._held:
            return False
        self._held.move_to_end(digest)
        return True

    def put(self, adapter: Adapter) -> None:
        """Keep an adapter if it fits at all, and drop others for it."""
        if adapter.size_bytes > self._bytes_max or adapter.digest in self._held:
            return
        self._held[adapter.digest] = adapter.size_bytes
        self._held_bytes += adapter.size_bytes
        while self._held_bytes > self._bytes_max:
            _, size_bytes = self._held.popitem(last=False)
            self._held_bytes -= size_bytes

    def publish(self) -> frozenset[AdapterDigest]:
        """What is here now."""
        self._digests = frozenset(self._held)
        return self._digests


class Residency:
    """Performs loads. `on_loaded` and `on_failed` are called once per load, later."""

    def __init__(
        self,
        loop: EventLoop,
        hardware: Hardware,
        faults: tuple[Fault, ...],
        *,
        host_cache: HostCache,
        block_device: Callable[[float], float],
    ) -> None:
        self._loop = loop
        self._hardware = hardware
        self._faults = faults
        self._host_cache = host_cache
        self._block_device = block_device
        self._network_free_s = 0.0
        self._link_free_s = 0.0
        self.counts = LoadCounts()

    def load(
        self,
        adapter: Adapter,
        *,
        on_near: Callable[[frozenset[AdapterDigest]], None],
        on_loaded: Callable[[AdapterDigest], None],
        on_failed: Callable[[AdapterDigest], None],
    ) -> None:
        """Begin to bring the adapter to the device. `on_near`: host memory has changed."""

        def arrive() -> None:
            self._host_cache.put(adapter)
            on_near(self._host_cache.publish())
            self._transfer(adapter, on_loaded)

        if self._host_cache.use(adapter.digest):
            self._transfer(adapter, on_loaded)
            return
        slowness = store_slowness(self._faults, self._loop.now)
        if slowness is None:
            self._loop.after(STORE_FAILURE_S, lambda: on_failed(adapter.digest))
            return
        self.counts.downloads += 1
        self.counts.downloaded_bytes += adapter.size_bytes
        begun_s = self._loop.now + self._hardware.store_latency_s * slowness
        bytes_s = adapter.size_bytes / self._hardware.store_bytes_per_s * slowness
        self._network_free_s = max(begun_s, self._network_free_s) + bytes_s
        self._loop.at(self._network_free_s, arrive)

    def _transfer(self, adapter: Adapter, on_loaded: Callable[[AdapterDigest], None]) -> None:
        self.counts.loads += 1
        self.counts.loaded_bytes += adapter.size_bytes
        load_s = self._hardware.load_s(adapter.size_bytes)
        self._link_free_s = max(self._loop.now, self._link_free_s) + load_s
        if self._hardware.load_blocking > 0:
            blocked_until_s = self._block_device(load_s * self._hardware.load_blocking)
            self._link_free_s = max(self._link_free_s, blocked_until_s)
        self._loop.at(self._link_free_s, lambda: on_loaded(adapter.digest))
