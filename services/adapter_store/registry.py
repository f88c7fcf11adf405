"""The registry: which adapters there are, in object storage, mirrored in memory.

An adapter is a sequence of immutable documents `registry/<name>/<revision>.json`, and the highest
revision is the truth. A change reads the highest revision N, decides, and creates N + 1 on the
condition that nobody else has; if somebody has, it reads and decides again. So a crash leaves the
old state or the new one, and of any number of replicas none loses another's change.

Old revisions are deleted by `collect`, never here: a writer that has read N must find N + 1 taken
if it was ever taken. That holds as long as a change takes less time than a superseded revision
lives, so a change that took longer than `CHANGE_S_MAX` is believed only if its document is the
newest one, and else decided again.

Reads are answered from a mirror. It is brought up to date by listing all documents every few
seconds, at once by this process's own changes, and by one look into storage before a reader is told
that something does not exist. Storage being away stops changes and leaves reads alone.
"""

import asyncio
import hashlib
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final
from weakref import WeakValueDictionary

import structlog

from services.adapter_store.documents import EntryError, from_json, to_json
from services.adapter_store.entries import Entry, Version, Weights, resolve
from services.adapter_store.mirror import Mirror
from services.adapter_store.negative_cache import NegativeCache
from services.adapter_store.references import Reference, is_name
from services.adapter_store.resuming import MARGIN_NS, Token, changed_since, read_token
from services.adapter_store.storage import ObjectInfo, Storage, unavailable
from services.adapter_store.watching import Start, Told, Watchers
from services.common.clients import Backoff
from services.common.errors import Reason, RpcError

ATTEMPTS_MAX: Final = 32
CHANGE_S_MAX: Final = 60.0
FOLDER: Final = "registry"
ID_PATH: Final = "registry_id"
_REVISION_DIGITS: Final = 12
_FETCHES_MAX: Final = 64  # documents read at a time while the mirror catches up
_STRIDE: Final = 1000
_DOCUMENT = re.compile(rf"{FOLDER}/([^/]+)/(\d{{{_REVISION_DIGITS}}})\.json", re.ASCII)
_log = structlog.get_logger("registry")

Decide = Callable[[Entry], Entry]


@dataclass(frozen=True, slots=True)
class Document:
    """A revision document in a listing."""

    name: str
    revision: int
    info: ObjectInfo


@dataclass(frozen=True, slots=True)
class RegistryLimits:
    """How many of each a registry takes. Replicas that race may pass them by a few."""

    adapters: int = 100_000
    watchers: int = 1000
    pinned_adapters: int = 1000
    pinned_bytes: int = 16 * 2**30


DEFAULT_LIMITS: Final = RegistryLimits()


class Registry:
    """All adapters. Created unsynced: reads fail until the first `sync` has succeeded."""

    def __init__(
        self,
        storage: Storage,
        *,
        limits: RegistryLimits = DEFAULT_LIMITS,
        missing_ttl_s: float = 2.0,
    ) -> None:
        self._storage = storage
        self._limits = limits
        self._mirror = Mirror()
        self._watchers = Watchers(
            self._mirror.live_entry, lambda: self._complete_ns, limit=limits.watchers
        )
        self._missing = NegativeCache(ttl_s=missing_ttl_s)
        self._unreadable: dict[str, int] = {}  # name to the revision that could not be parsed
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._id = ""  # known after the first sync
        self._synced = False
        self._complete_ns = 0  # the mirror has all that storage had then; 0: it never had
        self._erased_ns = 0  # when documents were last found to have been deleted by hand

    # Reading

    async def get(self, reference: Reference, *, tenant: str = "") -> tuple[Version, Entry]:
        """The version that a reference means, and its adapter, as a tenant may see it."""
        self._require_synced()
        name, key = reference.name, f"{tenant} {reference}"
        try:
            return self._resolved(reference, tenant)
        except RpcError:
            if self._missing.holds(key):
                raise
        # Another replica may have published it since the last poll.
        async with self._lock(name):
            if not self._missing.holds(key):  # else somebody looked while this call waited
                await self._refresh(name)
        try:
            return self._resolved(reference, tenant)
        except RpcError:
            self._missing.add(key)
            raise

    def page(self, *, after: str, prefix: str = "", digest: str = "") -> Iterator[Entry]:
        """See `Mirror.page`."""
        self._require_synced()
        return self._mirror.page(after=after, prefix=prefix, digest=digest)

    def entry(self, name: str) -> Entry:
        """What the mirror has of a name, a tombstone too; of revision 0 when nothing."""
        return self._mirror.entry(name)

    def live_entry(self, name: str) -> Entry | None:
        """What the mirror has of a name."""
        return self._mirror.live_entry(name)

    async def watch(self, token: str = "", *, pinned_only: bool = False) -> AsyncGenerator[Told]:
        """Every live adapter, or what has changed since a token; Synced; then each change."""
        self._require_synced()
        start = self._start(token, pinned_only=pinned_only)
        async with aclosing(self._watchers.watch(start)) as messages:
            async for told in messages:
                yield told

    def token(self, until_ns: int) -> str:
        """The resume token of this time. Empty while the registry has no id, and of no time."""
        return str(Token(self._id, until_ns)) if self._id and until_ns else ""

    def _start(self, text: str, *, pinned_only: bool) -> Start:
        names = self._mirror.pinned_names if pinned_only else self._mirror.live_names
        pinned = names if pinned_only else None
        token = read_token(text)
        if token is None or token.registry_id != self._id:
            return Start(names, pinned=pinned)
        if not self._erased_ns < token.until_ns <= time.time_ns() + MARGIN_NS:
            return Start(names, pinned=pinned)
        changed = changed_since(self._mirror.entries, token.until_ns)
        return Start(changed, resumed=True, pinned=pinned)

    def end_watches(self) -> None:
        """End every watch with DRAINING."""
        self._watchers.end()

    def check_room_for(self, name: str) -> None:
        """Raises FIELD_LIMIT_EXCEEDED when one more adapter is too many."""
        self._require_synced()
        if self._mirror.live_count >= self._limits.adapters and self.live_entry(name) is None:
            raise _over(
                f"the registry has {self._limits.adapters} adapters; delete some first",
                field="metadata.name",
            )

    def check_room_for_pin(self, name: str, weights: Weights) -> None:
        """Raises FIELD_LIMIT_EXCEEDED when one more pin is too much for the registry."""
        pinned = self._mirror.pinned_names
        if name not in pinned and len(pinned) >= self._limits.pinned_adapters:
            raise _over(f"{len(pinned)} adapters are pinned; unpin some first", field="adapter")
        sizes = {**self._mirror.pinned_sizes(), weights.digest: weights.size_bytes}
        pinned_bytes = sum(sizes.values())
        if pinned_bytes > self._limits.pinned_bytes:
            raise _over(
                f"{pinned_bytes} bytes would be pinned; at most {self._limits.pinned_bytes}",
                field="adapter",
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
        changed_ns = max(time.time_ns(), current.changed_ns + 1)
        entry = replace(
            decided, revision=revision, change_id=uuid.uuid4().hex, changed_ns=changed_ns
        )
        path = document_path(name, revision)
        if not await self._storage.create(path, to_json(entry)):
            # A write whose answer was lost is tried again below us, and then meets itself.
            taken = await self._storage.get(path)
            if taken is None or entry.change_id.encode() not in taken:
                return None
        if time.monotonic() - started_s > CHANGE_S_MAX:
            newest = await self._newest(name)
            if newest.change_id != entry.change_id:
                return None
        self._set(entry)
        return entry

    # The mirror

    async def sync(self) -> list[Document]:
        """Bring the mirror up to date. Returns the listing that it now agrees with."""
        started_ns = time.time_ns()
        await self._identify()
        documents = await self._documents(FOLDER)
        stale = await self._stale(documents)
        remaining = iter(stale)

        async def catch_up() -> None:
            for name, revision in remaining:
                await self._catch_up(name, revision)

        tasks = (catch_up() for _ in range(_FETCHES_MAX))
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if outcome is not None:
                raise outcome
        if not self._unreadable:
            self._complete_ns = started_ns
        self._synced = True
        return documents

    def referenced(self) -> set[str] | None:
        """Digests that live versions need. None while an adapter can't be read."""
        return None if self._unreadable else self._mirror.digests

    async def _identify(self) -> None:
        """Learn the registry's id, which the first replica ever gives it."""
        if self._id:
            return
        try:
            data = await self._storage.get(ID_PATH)
            if data is None:
                await self._storage.create(ID_PATH, uuid.uuid4().hex.encode())
                data = await self._storage.get(ID_PATH)
        except RpcError:
            return  # where nothing can be written, watches begin anew each time
        if data is not None:
            self._id = hashlib.sha256(data).hexdigest()[:32]

    async def _stale(self, documents: list[Document]) -> list[tuple[str, int]]:
        """Names whose newest revision in a listing is not the mirror's."""
        newest: dict[str, int] = {}
        for number, document in enumerate(documents):
            await _breathe(number)
            newest[document.name] = max(document.revision, newest.get(document.name, 0))
        # A name without documents was created after the listing, or its folder was deleted by hand.
        for number, name in enumerate((*self._mirror.names, *self._unreadable)):
            await _breathe(number)
            newest.setdefault(name, 0)
        stale: list[tuple[str, int]] = []
        for number, (name, revision) in enumerate(newest.items()):
            await _breathe(number)
            known = self._unreadable.get(name) or self._mirror.entry(name).revision
            if known != revision:
                stale.append((name, revision))
        return stale

    async def _catch_up(self, name: str, revision: int) -> None:
        """Read one adapter that a listing shows at `revision`."""
        async with self._lock(name):
            # What this process may have changed since that listing is looked up anew.
            await self._refresh(
                name, revision=revision if self._mirror.entry(name).revision == 0 else None
            )

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
            mirrored = self._mirror.entry(name)
            if mirrored.revision == revision:
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
            await _breathe(number)
            match = _DOCUMENT.fullmatch(info.path)
            if match is not None and is_name(match[1]):
                documents.append(Document(match[1], int(match[2]), info))
        return documents

    def _set(self, entry: Entry) -> None:
        """Make `entry` what the mirror shows. The name's lock is held."""
        self._unreadable.pop(entry.name, None)
        if self._mirror.put(entry):
            if entry.revision == 0:
                self._erased_ns = time.time_ns()
            self._watchers.notify(entry.name)

    def _resolved(self, reference: Reference, tenant: str) -> tuple[Version, Entry]:
        entry = self._mirror.entry(reference.name)
        if not entry.is_visible_to(tenant):
            entry = Entry(reference.name)
        return resolve(entry, reference), entry

    def _lock(self, name: str) -> asyncio.Lock:
        """One lock per name that somebody uses; gone when nobody does."""
        return self._locks.setdefault(name, asyncio.Lock())

    def _require_synced(self) -> None:
        if not self._synced:
            raise unavailable("the registry has not been read yet")

    def check_integrity(self) -> None:
        """Assert what always holds between the mirror's parts."""
        self._mirror.check_integrity()


def document_path(name: str, revision: int) -> str:
    """Where a revision lies."""
    return f"{FOLDER}/{name}/{revision:0{_REVISION_DIGITS}d}.json"


async def _breathe(number: int) -> None:
    """Let others run now and then: a long registry must not hold up downloads."""
    if number % _STRIDE == _STRIDE - 1:
        await asyncio.sleep(0)


def _over(message: str, *, field: str) -> RpcError:
    return RpcError(Reason.FIELD_LIMIT_EXCEEDED, message, field=field)
