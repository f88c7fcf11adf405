"""Watchers of the registry: each gets everything once, then each change, never a queue of them.

A watcher holds the names it has yet to be told about, each once, and reads the adapter's state when
it sends. So a slow watcher costs at most one name per adapter, and skips what is already history.
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
    """An adapter that is gone."""

    name: str


@dataclass(frozen=True, slots=True)
class Synced:
    """Everything that existed at the start has been sent."""


Change = Updated | Deleted | Synced


class Watchers:
    """All watchers of this process."""

    def __init__(self, *, limit: int) -> None:
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

    async def watch(
        self, names: Iterable[str], read: Callable[[str], Entry | None]
    ) -> AsyncGenerator[Change]:
        """`names` now, then Synced, then changes. `read` gives the live entry of a name."""
        if len(self._watchers) >= self._limit:
            raise RpcError(
                Reason.TOO_MANY_REQUESTS, f"{self._limit} watches are open", retry_after_s=5.0
            )
        watcher = _Watcher(names)
        self._watchers.add(watcher)
        try:
            synced = False
            while not self._ended:
                if name := watcher.take():
                    entry = read(name)
                    yield Deleted(name) if entry is None else Updated(entry)
                elif not synced:
                    synced = True
                    yield Synced()
                else:
                    await watcher.wake.wait()
        finally:
            self._watchers.discard(watcher)
        raise RpcError(Reason.DRAINING, "the adapter store is stopping", retry_after_s=1.0)


class _Watcher:
    def __init__(self, names: Iterable[str]) -> None:
        self._names = dict.fromkeys(names)
        self.wake = asyncio.Event()

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
