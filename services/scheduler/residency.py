"""Where every adapter is, as the workers say: device memory in their status, host memory beside it.

What a worker says is kept as it came and read when somebody asks, which is rarely: a watcher, at
most every `INTERVAL_S`, or an unload under way. A watcher gets all workers at once and then those
whose adapters have changed, each time whole, so one that reads slowly skips what is history. A
worker counts from its hello until its stream has been down for the grace period.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Iterator
from typing import Final

from calumma.common.v1 import common_pb2
from calumma.scheduler.v1 import scheduler_pb2
from services.common.errors import Reason, RpcError

INTERVAL_S: Final = 0.5  # between two messages to one watcher
WATCHES_MAX: Final = 64


class _Holder:
    """One worker. `revision` is another one when what it holds has changed since the last look."""

    def __init__(self, worker_id: str, block_bytes: int, revisions: Iterator[int]) -> None:
        self.status = scheduler_pb2.WorkerStatus()
        self.host_cache = scheduler_pb2.HostCache()
        self.hellos = 0
        self._revisions = revisions  # of all workers, so that none comes twice
        self.revision = next(revisions)
        self._view = scheduler_pb2.WorkerResidency(worker_id=worker_id, attached=True)
        self._block_bytes = block_bytes
        self._is_stale = True

    def report(
        self,
        status: scheduler_pb2.WorkerStatus | None = None,
        host_cache: scheduler_pb2.HostCache | None = None,
    ) -> None:
        """It has said something new of one tier, or both."""
        self.status = status if status is not None else self.status
        self.host_cache = host_cache if host_cache is not None else self.host_cache
        self._is_stale = True

    def view(self) -> scheduler_pb2.WorkerResidency:
        """What it holds. The same object while that does not change."""
        if self._is_stale:
            self._is_stale = False
            view = self._build()
            if view != self._view:
                self._view = view
                self.revision = next(self._revisions)
        return self._view

    def held_bytes(self, digest: str) -> int | None:
        """Bytes of the adapter in both tiers together; None when it has it in neither."""
        sizes = [self._size(it) for it in self.status.resident if it.digest == digest]
        sizes += [it.size_bytes for it in self.host_cache.adapters if it.digest == digest]
        return sum(sizes) if sizes else None

    def _build(self) -> scheduler_pb2.WorkerResidency:
        view = scheduler_pb2.WorkerResidency(worker_id=self._view.worker_id, attached=True)
        on_device: set[str] = set()
        for it in self.status.resident:
            on_device.add(it.digest)
            view.adapters.add(
                digest=it.digest,
                tier=common_pb2.ADAPTER_TIER_DEVICE,
                size_bytes=self._size(it),
                users=it.users,
                pin_reason=it.pin_reason,
            )
        for kept in self.host_cache.adapters:
            if kept.digest not in on_device:
                view.adapters.add(
                    digest=kept.digest,
                    tier=common_pb2.ADAPTER_TIER_HOST,
                    size_bytes=kept.size_bytes,
                )
        return view

    def _size(self, adapter: scheduler_pb2.ResidentAdapter) -> int:
        return adapter.size_bytes or adapter.blocks * self._block_bytes


class Residency:
    """What all known workers hold, and who wants to hear of it."""

    def __init__(self, *, watches_max: int = WATCHES_MAX, interval_s: float = INTERVAL_S) -> None:
        self._watches_max = watches_max
        self._interval_s = interval_s
        self._revisions = itertools.count()
        self._holders: dict[str, _Holder] = {}
        self._waiting: set[asyncio.Event] = set()
        self._watches = 0
        self._has_ended = False

    def __contains__(self, worker_id: str) -> bool:
        """True from its hello until it has left for good."""
        return worker_id in self._holders

    @property
    def workers(self) -> set[str]:
        """All known ones; a copy."""
        return set(self._holders)

    def attach(self, hello: scheduler_pb2.WorkerHello) -> None:
        """A worker has come, for the first time or again."""
        holder = self._holders.get(hello.worker_id)
        if holder is None:
            holder = _Holder(hello.worker_id, hello.capacity.block_bytes, self._revisions)
            self._holders[hello.worker_id] = holder
        holder.hellos += 1
        holder.report(hello.status, hello.host_cache)
        self._wake()

    def report_status(self, worker_id: str, status: scheduler_pb2.WorkerStatus) -> None:
        """A known worker's status is new."""
        self._holders[worker_id].report(status=status)
        self._wake()

    def report_host_cache(self, worker_id: str, host_cache: scheduler_pb2.HostCache) -> None:
        """A known worker's host memory has changed."""
        self._holders[worker_id].report(host_cache=host_cache)
        self._wake()

    def leave(self, worker_id: str) -> None:
        """A worker is gone for good."""
        self._holders.pop(worker_id, None)
        self._wake()

    def end(self) -> None:
        """End every watch, and refuse new ones."""
        self._has_ended = True
        self._wake()

    def reports(self, worker_id: str) -> tuple[scheduler_pb2.WorkerStatus, scheduler_pb2.HostCache]:
        """The last ones of a known worker."""
        holder = self._holders[worker_id]
        return holder.status, holder.host_cache

    def holders(self, digest: str) -> dict[str, int]:
        """Bytes of the adapter by worker, for those that hold it."""
        found = ((name, one.held_bytes(digest)) for name, one in self._holders.items())
        return {name: held_bytes for name, held_bytes in found if held_bytes is not None}

    def hellos(self, worker_id: str) -> int:
        """How often a known worker has attached."""
        return self._holders[worker_id].hellos

    async def changed(self, timeout_s: float) -> None:
        """Wait until a worker has said something, or the time is over."""
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await event.wait()
        finally:
            self._waiting.discard(event)

    async def watch(self) -> AsyncGenerator[scheduler_pb2.WatchResidencyResponse]:
        """All workers, then those that have changed. Raises TOO_MANY_REQUESTS and DRAINING."""
        if self._watches >= self._watches_max:
            raise RpcError(
                Reason.TOO_MANY_REQUESTS, f"{self._watches_max} watches are open", retry_after_s=5.0
            )
        self._watches += 1
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            sent: dict[str, int] = {}
            yield self._news(sent)
            while not self._has_ended:
                await event.wait()
                event.clear()
                news = self._news(sent)
                if news.workers:
                    yield news
                await asyncio.sleep(self._interval_s)
        finally:
            self._waiting.discard(event)
            self._watches -= 1
        raise RpcError(Reason.DRAINING, "the scheduler is going away", retry_after_s=0.1)

    def _news(self, sent: dict[str, int]) -> scheduler_pb2.WatchResidencyResponse:
        """What differs from the revisions in `sent`, which are brought up to date."""
        news: list[scheduler_pb2.WorkerResidency] = []
        for worker_id, holder in self._holders.items():
            view = holder.view()
            if sent.get(worker_id) != holder.revision:
                sent[worker_id] = holder.revision
                news.append(view)
        for worker_id in sent.keys() - self._holders.keys():
            del sent[worker_id]
            news.append(scheduler_pb2.WorkerResidency(worker_id=worker_id, attached=False))
        return scheduler_pb2.WatchResidencyResponse(workers=news)

    def _wake(self) -> None:
        for event in self._waiting:
            event.set()
