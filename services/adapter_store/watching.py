"""Watchers of the registry: each gets everything once, then each change, never a queue of them.

A watcher holds the names it has yet to be told about, each once, and reads the adapter's state when
it sends. So a slow watcher costs at most one name per adapter, and skips what is already history.

With each message goes the time that the watcher is up to date with, its resume token (`resuming`).
It moves on only when nothing is left to be sent, so whatever a slow watcher has not been told is
newer than its token. A watcher of pins is told of an adapter while that has pins, and once when it
has none any more.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass

from services.adapter_store.entries import Entry
from services.common.errors import Reason, RpcError


@dataclass(frozen=True, slots=True)
class Updated:
    """An adapter that is new or has changed."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Deleted:
    """An adapter that is gone, or has no pins any more."""

    name: str


@dataclass(frozen=True, slots=True)
class Synced:
    """Everything at the start has been sent; with `resumed` only what had changed."""

    resumed: bool = False


Change = Updated | Deleted | Synced


@dataclass(frozen=True, slots=True)
class Told:
    """One message: a change, and the time up to which all is sent with it.

    `until_ns` None: not known before Synced.
    """

    change: Change
    until_ns: int | None


@dataclass(frozen=True, slots=True)
class Start:
    """What a watch begins with. `pinned`: of whom it may know; None for a watch of all."""

    names: Iterable[str]
    resumed: bool = False
    pinned: Iterable[str] | None = None


class Watchers:
    """All watchers of this process.

    `read` gives the live entry of a name, `time_ns` when the mirror was last all of storage.
    """

    def __init__(
        self, read: Callable[[str], Entry | None], time_ns: Callable[[], int], *, limit: int
    ) -> None:
        self._read = read
        self._time_ns = time_ns
        self._limit = limit
        self._watchers: set[_Watcher] = set()
        self._ended = False

    def notify(self, name: str) -> None:
        """An adapter has changed."""
        for watcher in self._watchers:
            watcher.add(name)

    def end(self) -> None:
        """End every watch, and refuse new ones."""
        self._ended = True
        for watcher in self._watchers:
            watcher.wake.set()

    async def watch(self, start: Start) -> AsyncGenerator[Told]:
        """The names of `start` now, then Synced, then changes."""
        if len(self._watchers) >= self._limit:
            raise RpcError(
                Reason.TOO_MANY_REQUESTS, f"{self._limit} watches are open", retry_after_s=5.0
            )
        watcher = _Watcher(start)
        self._watchers.add(watcher)
        try:
            until_ns: int | None = None
            while not self._ended:
                if name := watcher.take():
                    change = watcher.change_of(name, self._read(name))
                elif until_ns is None:
                    change = Synced(start.resumed)
                    until_ns = self._time_ns()
                else:
                    await watcher.wake.wait()
                    continue
                if until_ns is not None and watcher.is_empty:
                    until_ns = self._time_ns()
                if change is not None:
                    yield Told(change, until_ns)
        finally:
            self._watchers.discard(watcher)
        raise RpcError(Reason.DRAINING, "the adapter store is stopping", retry_after_s=1.0)


class _Watcher:
    def __init__(self, start: Start) -> None:
        self._names = dict.fromkeys(start.names)
        self._pinned = None if start.pinned is None else {*start.pinned, *self._names}
        self.wake = asyncio.Event()

    @property
    def is_empty(self) -> bool:
        return not self._names

    def add(self, name: str) -> None:
        self._names[name] = None
        self.wake.set()

    def take(self) -> str | None:
        """The name that has waited longest."""
        self.wake.clear()
        if not self._names:
            return None
        name = next(iter(self._names))
        del self._names[name]
        return name

    def change_of(self, name: str, entry: Entry | None) -> Change | None:
        """What this watcher is to be told. None: it is not its business."""
        if self._pinned is None:
            return Deleted(name) if entry is None else Updated(entry)
        if entry is not None and entry.pins:
            self._pinned.add(name)
            return Updated(entry)
        if name not in self._pinned:
            return None
        self._pinned.discard(name)
        return Deleted(name)
