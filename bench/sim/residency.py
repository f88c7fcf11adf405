"""Where a simulated worker's adapters are: host cache, network to the store, link to the device.

Downloads share one network and transfers share one link, each in order; a download's latency
overlaps with other downloads. The host cache drops what was used longest ago, as the live one does.

Where prompts may overlap with loads, an adapter comes in four groups of layers, as the live engine
takes it: each is told of once it is on the device, and those of a download are sent there as they
arrive.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final

from bench.sim.faults import Fault, store_slowness
from bench.sim.hardware import Hardware
from bench.sim.loop import EventLoop
from services.core.types import Adapter, AdapterDigest

# Five tries with backoff are over by then, as in `services.worker.downloads`.
STORE_FAILURE_S: Final = 1.0
GROUPS: Final = 4  # of layers


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


@dataclass(frozen=True, slots=True)
class LoadCalls:
    """Whom a load tells what, later; of `loaded` and `failed` one, once."""

    near: Callable[[frozenset[AdapterDigest]], None]  # host memory has changed
    progressed: Callable[[AdapterDigest, int], None]  # so many layers can be used
    loaded: Callable[[AdapterDigest], None]
    failed: Callable[[AdapterDigest], None]


class Residency:
    """Performs loads."""

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

    def load(self, adapter: Adapter, calls: LoadCalls) -> None:
        """Begin to bring the adapter to the device."""
        if self._host_cache.use(adapter.digest):
            self._transfer(adapter, calls)
            return
        slowness = store_slowness(self._faults, self._loop.now)
        if slowness is None:
            self._loop.after(STORE_FAILURE_S, lambda: calls.failed(adapter.digest))
            return
        self.counts.downloads += 1
        self.counts.downloaded_bytes += adapter.size_bytes
        begun_s = self._loop.now + self._hardware.store_latency_s * slowness
        bytes_s = adapter.size_bytes / self._hardware.store_bytes_per_s * slowness
        first_byte_s = max(begun_s, self._network_free_s)
        self._network_free_s = first_byte_s + bytes_s
        if self._hardware.overlaps_prefill:
            for group in range(1, GROUPS):
                arrives_s = first_byte_s + bytes_s * group / GROUPS
                self._loop.at(arrives_s, partial(self._pass_on, adapter, group, calls))
        self._loop.at(self._network_free_s, lambda: self._arrive(adapter, calls))

    def _arrive(self, adapter: Adapter, calls: LoadCalls) -> None:
        """The last byte is in host memory."""
        self._host_cache.put(adapter)
        calls.near(self._host_cache.publish())
        if self._hardware.overlaps_prefill:
            self._count(adapter)
            self._pass_on(adapter, GROUPS, calls)
        else:
            self._transfer(adapter, calls)

    def _pass_on(self, adapter: Adapter, group: int, calls: LoadCalls) -> None:
        """A group of layers that has arrived goes to the device."""
        self._link_free_s = max(self._loop.now, self._link_free_s)
        self._link_free_s += self._hardware.load_s(adapter.size_bytes) / GROUPS
        self._tell(adapter, group, self._link_free_s, calls)

    def _transfer(self, adapter: Adapter, calls: LoadCalls) -> None:
        """All of an adapter goes from host memory to the device."""
        self._count(adapter)
        load_s = self._hardware.load_s(adapter.size_bytes)
        begun_s = max(self._loop.now, self._link_free_s)
        self._link_free_s = begun_s + load_s
        if self._hardware.load_blocking > 0:
            blocked_until_s = self._block_device(load_s * self._hardware.load_blocking)
            self._link_free_s = max(self._link_free_s, blocked_until_s)
        if self._hardware.overlaps_prefill:
            for group in range(1, GROUPS):
                self._tell(adapter, group, begun_s + load_s * group / GROUPS, calls)
        self._tell(adapter, GROUPS, self._link_free_s, calls)

    def _tell(self, adapter: Adapter, group: int, at_s: float, calls: LoadCalls) -> None:
        if group == GROUPS:
            self._loop.at(at_s, lambda: calls.loaded(adapter.digest))
        else:
            layers = self._hardware.profile.num_layers * group // GROUPS
            self._loop.at(at_s, lambda: calls.progressed(adapter.digest, layers))

    def _count(self, adapter: Adapter) -> None:
        self.counts.loads += 1
        self.counts.loaded_bytes += adapter.size_bytes
