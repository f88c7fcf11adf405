"""The registry: which adapters there are, in object storage, mirrored in memory.

An adapter is a sequence of immutable documents `registry/<name>/<revision>.json`, and the highest
revision is the truth. A change reads the highest revision N, decides, and creates N + 1 on the
condition that nobody else has; if somebody has, it reads and decides again. So a crash leaves the
old state or the new one, and of any number of replicas none loses another's change.

Old revisions are deleted by `collect`, never here: a writer that has read N must find N + 1 taken
if it was ever taken. That holds as long as a change takes less time than a superseded revision
lives, so a change that took longer than `CHANGE_S_MAX` is not believed but decided again.

Reads are answered from a mirror. It is brought up to date by listing all documents every few
seconds, at once by this process's own changes, and by one look into storage before a reader is told
that something does not exist. Storage being away stops changes and leaves reads alone.
"""

import asyncio
import itertools
import re
import time
import uuid
from bisect import bisect_left, insort
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final
from weakref import WeakValueDictionary

import structlog

from services.adapter_store.entries import (
    Entry,
    EntryError,
    Version,
    from_json,
    resolve,
    to_json,
)
from services.adapter_store.negative_cache import NegativeCache
from services.adapter_store.references import Reference, is_name
from services.adapter_store.storage import ObjectInfo, Storage, unavailable
from services.adapter_store.watching import Change, Watchers
from services.common.clients import Backoff
from services.common.errors import Reason, RpcError

ATTEMPTS_MAX: Final = 32
CHANGE_S_MAX: Final = 60.0
FOLDER: Final = "registry"
_REVISION_DIGITS: Final = 12
_FETCHES_MAX: Final = 32  # documents read at a time while the mirror catches up
_LIST_STRIDE: Final = 1000
_DOCUMENT = re.compile(rf"{FOLDER}/([^/]+)/(\d{{{_REVISION_DIGITS}}})\.json", re.ASCII)
_log = structlog.get_logger("registry")

Decide = Callable[[Entry], Entry]


@dataclass(frozen=True, slots=True)
class Document:
    """A revision document in a listing."""

    name: str
    revision: int
    info: ObjectInfo


class Registry:
    """All adapters. Created unsynced: reads fail until the first `sync` has succeeded."""

    def __init__(
        self,
        storage: Storage,
        *,
        adapters_max: int = 100_000,
        watchers_max: int = 1000,
        missing_ttl_s: float = 2.0,
    ) -> None:
        self._storage = storage
        self._adapters_max = adapters_max
        self._entries: dict[str, Entry] = {}  # tombstones too: they hold the revision
        self._live: list[str] = []  # sorted names of live adapters
        self._watchers = Watchers(limit=watchers_max)
        self._missing = NegativeCache(ttl_s=missing_ttl_s)
        self._unreadable: dict[str, int] = {}  # name to the revision that could not be parsed
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._synced = False

    # Reading

    async def get(self, reference: Reference) -> tuple[Version, Entry]:
        """The version that a reference means, and its adapter."""
        self._require_synced()
        name, key = reference.name, str(reference)
        try:
            return self._resolved(reference)
        except RpcError:
            if self._missing.holds(key):
                raise
        # Another replica may have published it since the last poll.
        async with self._lock(name):
            if not self._missing.holds(key):  # else somebody looked while this call waited
                await self._refresh(name)
        try:
            return self._resolved(reference)
        except RpcError:
            self._missing.add(key)
            raise

    def page(self, *, after: str, prefix: str) -> Iterator[Entry]:
        """Live adapters by name whose name begins with `prefix` and follows `after`."""
        self._require_synced()
        start = max(bisect_left(self._live, prefix), bisect_left(self._live, after + "\0"))
        for name in itertools.islice(self._live, start, None):
            if not name.startswith(prefix):
                return
            yield self._entries[name]

    async def watch(self) -> AsyncGenerator[Change]:
        """Every live adapter, Synced, then each change."""
        self._require_synced()
        async with aclosing(self._watchers.watch(list(self._live), self.live_entry)) as changes:
            async for change in changes:
                yield change

    def end_watches(self) -> None:
        """End every watch with DRAINING."""
        self._watchers.end()

    def check_room_for(self, name: str) -> None:
        """Raises FIELD_LIMIT_EXCEEDED when one more adapter is too many."""
        self._require_synced()
        if len(self._live) >= self._adapters_max and self.live_entry(name) is None:
            raise RpcError(
                Reason.FIELD_LIMIT_EXCEEDED,
                f"the registry has {self._adapters_max} adapters; delete some first",
                field="metadata.name",
            )

    # Changing

    async def change(self, name: str, decide: Decide) -> Entry:
        """Apply `decide` to the newest entry of `name`, atomically. Raises what it raises.

        Changes of one name by this process wait for each other, so conflicts come only from
        other replicas. Raises CONFLICT when those are faster every time.
        """
        backoff = Backoff(base_s=0.005, cap_s=0.25)
        async with self._lock(name):
            for _ in range(ATTEMPTS_MAX):
                entry = await self._attempt(name, decide)
                if entry is not None:
                    return entry
                await asyncio.sleep(backoff.next_delay_s())
        raise RpcError(
            Reason.CONFLICT,
            f"{name} is being changed by others all the time",
            resource=("adapter", name),
            retry_after_s=1.0,
        )

    async def _attempt(self, name: str, decide: Decide) -> Entry | None:
        """One read, decision and write. None: another writer was first."""
        started_s = time.monotonic()
        current = await self._newest(name)
        decided = decide(current)
        if decided == current:
            return current
        revision = current.revision + 1
        entry = replace(decided, revision=revision, change_id=uuid.uuid4().hex)
        path = document_path(name, revision)
        if not await self._storage.create(path, to_json(entry)):
            # A write whose answer was lost is tried again below us, and then meets itself.
            taken = await self._storage.get(path)
            if taken is None or entry.change_id.encode() not in taken:
                return None
        if time.monotonic() - started_s > CHANGE_S_MAX:
            return None
        self._set(entry)
        return entry

    # The mirror

    async def sync(self) -> list[Document]:
        """Bring the mirror up to date. Returns the listing that it now agrees with."""
        documents = await self._documents(FOLDER)
        newest: dict[str, int] = {}
        for document in documents:
            newest[document.name] = max(document.revision, newest.get(document.name, 0))
        # A name without documents was created after the listing, or its folder was deleted by hand.
        for name in (*self._entries, *self._unreadable):
            newest.setdefault(name, 0)
        stale = [(name, n) for name, n in newest.items() if self._known_revision(name) != n]
        for start in range(0, len(stale), _FETCHES_MAX):
            batch = stale[start : start + _FETCHES_MAX]
            done = await asyncio.gather(
                *(self._catch_up(name, n) for name, n in batch), return_exceptions=True
            )
            for outcome in done:
                if isinstance(outcome, BaseException):
                    raise outcome
        self._synced = True
        return documents

    def referenced(self) -> set[str] | None:
        """Digests that live versions need. None while an adapter can't be read."""
        if self._unreadable:
            return None
        return {v.weights.digest for entry in self._entries.values() for v in entry.versions}

    def _known_revision(self, name: str) -> int:
        entry = self._entries.get(name)
        return self._unreadable.get(name) or (entry.revision if entry is not None else 0)

    async def _catch_up(self, name: str, revision: int) -> None:
        """Read one adapter that a listing shows at `revision`."""
        async with self._lock(name):
            # What this process may have changed since that listing is looked up anew.
            await self._refresh(name, revision=None if name in self._entries else revision)

    async def _refresh(self, name: str, *, revision: int | None = None) -> None:
        """Read one adapter again, its lock held. What can't be parsed changes nothing."""
        try:
            self._set(await self._newest(name, revision=revision))
        except RpcError as error:
            if error.reason is not Reason.ADAPTER_CORRUPT:
                raise

    async def _newest(self, name: str, *, revision: int | None = None) -> Entry:
        """The entry of the highest revision in storage, which `revision` may say already."""
        for _ in range(2):  # the newest may be superseded and collected while it is read
            if revision is None:
                documents = await self._documents(f"{FOLDER}/{name}")
                revision = max((item.revision for item in documents), default=0)
            if revision == 0:
                return Entry(name)
            mirrored = self._entries.get(name)
            if mirrored is not None and mirrored.revision == revision:
                return mirrored
            data = await self._storage.get(document_path(name, revision))
            if data is not None:
                return self._parsed(data, name=name, revision=revision)
            revision = None
        raise unavailable(f"the entry of {name} can't be read")

    def _parsed(self, data: bytes, *, name: str, revision: int) -> Entry:
        try:
            return from_json(data, name=name, revision=revision)
        except EntryError as error:
            if self._unreadable.get(name) != revision:
                _log.error("unreadable_entry", adapter=name, revision=revision, cause=str(error))
            self._unreadable[name] = revision
            raise RpcError(
                Reason.ADAPTER_CORRUPT,
                f"the registry's entry of {name} can't be read",
                resource=("adapter", name),
            ) from error

    async def _documents(self, prefix: str) -> list[Document]:
        documents: list[Document] = []
        for number, info in enumerate(await self._storage.list(prefix)):
            if number % _LIST_STRIDE == _LIST_STRIDE - 1:
                await asyncio.sleep(0)  # a long registry must not hold up downloads
            match = _DOCUMENT.fullmatch(info.path)
            if match is not None and is_name(match[1]):
                documents.append(Document(match[1], int(match[2]), info))
        return documents

    def _set(self, entry: Entry) -> None:
        """Make `entry` what the mirror shows. The name's lock is held."""
        name = entry.name
        self._unreadable.pop(name, None)
        before = self._entries.get(name, Entry(name))
        if entry == before:
            return
        if entry.revision == 0:
            del self._entries[name]
        else:
            self._entries[name] = entry
        if entry.is_live and not before.is_live:
            insort(self._live, name)
        elif before.is_live and not entry.is_live:
            del self._live[bisect_left(self._live, name)]
        self._watchers.notify(name)

    def _resolved(self, reference: Reference) -> tuple[Version, Entry]:
        entry = self._entries.get(reference.name, Entry(reference.name))
        return resolve(entry, reference), entry

    def _lock(self, name: str) -> asyncio.Lock:
        """One lock per name that somebody uses; gone when nobody does."""
        return self._locks.setdefault(name, asyncio.Lock())

    def live_entry(self, name: str) -> Entry | None:
        """What the mirror has of a name."""
        entry = self._entries.get(name)
        return entry if entry is not None and entry.is_live else None

    def _require_synced(self) -> None:
        if not self._synced:
            raise unavailable("the registry has not been read yet")

    def check_integrity(self) -> None:
        """Assert what always holds between the mirror's parts."""
        assert self._live == sorted(n for n, entry in self._entries.items() if entry.is_live)
        for name, entry in self._entries.items():
            numbers = [version.number for version in entry.versions]
            assert entry.name == name
            assert numbers == sorted(set(numbers))
            assert all(number < entry.next_version for number in numbers)
            assert set(entry.aliases.values()) <= set(numbers)


def document_path(name: str, revision: int) -> str:
    """Where a revision lies."""
    return f"{FOLDER}/{name}/{revision:0{_REVISION_DIGITS}d}.json"
