"""The bytes of adapters: `blobs/sha256/<hex>` in object storage, and a verified copy on local disk.

A blob is written before the registry names it and never changes: its name is its digest. Every read
from storage is checked against that digest before a byte of it is handed on, and the copy on disk
is checked again while it is sent. One download from storage at a time per digest, however many ask.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import IO, BinaryIO, Final, TypeVar, TypeVarTuple

from services.adapter_store.disk_cache import DiskCache
from services.adapter_store.negative_cache import NegativeCache
from services.adapter_store.references import check_digest
from services.adapter_store.storage import Storage, unavailable
from services.common.clients import Backoff
from services.common.errors import Reason, RpcError

FOLDER: Final = "blobs/sha256"
CHUNK_BYTES: Final = 2**20  # of a download: large enough to cost little, small enough to interleave
READ_ATTEMPTS_MAX: Final = 4
_THREADS: Final = 4
_BAD_TTL_S: Final = 10.0  # how long a blob known to be missing or corrupt is not read again
_Ts = TypeVarTuple("_Ts")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a blob."""

    offset: int
    data: bytes
    total_bytes: int


class Blobs:
    """All blobs. `close` ends its threads."""

    def __init__(self, storage: Storage, cache: DiskCache) -> None:
        self._storage = storage
        self._cache = cache
        self._fills: dict[str, asyncio.Task[None]] = {}
        self._missing = NegativeCache(ttl_s=_BAD_TTL_S)
        self._corrupt = NegativeCache(ttl_s=_BAD_TTL_S)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="blobs")

    async def put(self, digest: str, blob: bytes) -> None:
        """Store a blob. One that is there is written again: it becomes young, and whole."""
        await self._storage.put(blob_path(digest), blob)
        self._missing.discard(digest)
        self._corrupt.discard(digest)

    async def is_stored(self, digest: str, size_bytes: int) -> bool:
        """Whether storage has the blob, as far as its size tells."""
        info = await self._storage.head(blob_path(digest))
        return (
            info is not None and info.size_bytes == size_bytes and not self._corrupt.holds(digest)
        )

    async def read(self, digest: str, *, offset: int) -> AsyncGenerator[Chunk]:
        """Send a blob from an offset on.

        Raises INVALID_FIELD, ADAPTER_NOT_FOUND, ADAPTER_CORRUPT, OBJECT_STORAGE_UNAVAILABLE.
        """
        check_digest(digest)
        if offset < 0:
            raise _bad_offset(offset, "may not be negative")
        key = _hex(digest)
        file = await self._opened(digest)
        try:
            total_bytes = await self._in_thread(file.seek, 0, 2)
            if offset > total_bytes:
                raise _bad_offset(offset, f"the blob has {total_bytes} bytes")
            await self._in_thread(file.seek, offset)
            checked = hashlib.sha256() if offset == 0 else None
            while offset < total_bytes:
                data = await self._in_thread(_read_some, file, checked)
                is_last = offset + len(data) >= total_bytes
                if not data or (is_last and checked is not None and checked.hexdigest() != key):
                    await self._in_thread(self._cache.discard, key)
                    raise _corrupt(digest)
                yield Chunk(offset, data, total_bytes)
                offset += len(data)
        finally:
            file.close()

    async def close(self) -> None:
        """End downloads that nobody waits for, and the threads."""
        fills = list(self._fills.values())
        for fill in fills:
            fill.cancel()
        await asyncio.gather(*fills, return_exceptions=True)
        self._threads.shutdown(cancel_futures=True)

    async def _opened(self, digest: str) -> BinaryIO:
        key = _hex(digest)
        for _ in range(2):  # between the fill and the open another blob may push it out
            file = await self._in_thread(self._cache.open, key)
            if file is not None:
                return file
            await self._filled(digest)
        raise _cache_full()

    async def _filled(self, digest: str) -> None:
        """Wait for the one download of this blob. A waiter that gives up does not end it."""
        if self._missing.holds(digest):
            raise _not_found(digest)
        if self._corrupt.holds(digest):
            raise _corrupt(digest)
        fill = self._fills.get(digest)
        if fill is None:
            fill = asyncio.create_task(self._fill(digest), name=f"fill {digest}")
            self._fills[digest] = fill
            fill.add_done_callback(lambda done: self._forget(digest, done))
        await asyncio.shield(fill)

    def _forget(self, digest: str, fill: asyncio.Task[None]) -> None:
        del self._fills[digest]
        if not fill.cancelled():
            fill.exception()  # retrieved, in case every waiter has gone

    async def _fill(self, digest: str) -> None:
        try:
            partial = await self._in_thread(self._cache.new_partial)
            try:
                await self._download(digest, partial)
                await self._in_thread(self._cache.admit, _hex(digest), partial)
            except BaseException:
                self._cache.abandon(partial)
                raise
        except OSError as error:
            raise _cache_full() from error

    async def _download(self, digest: str, partial: IO[bytes]) -> None:
        """Write the object into `partial`, going on where a broken read ended."""
        checked = hashlib.sha256()
        info = await self._storage.head(blob_path(digest))
        if info is None:
            self._missing.add(digest)
            raise _not_found(digest)
        backoff = Backoff(base_s=0.1, cap_s=2.0)
        failures = 0
        while (before := partial.tell()) < info.size_bytes:
            failure = await self._append(digest, partial, checked)
            failures = 0 if partial.tell() > before else failures + 1
            if failures >= READ_ATTEMPTS_MAX:
                raise failure or unavailable("the object is shorter than it says")
            if partial.tell() < info.size_bytes:
                await asyncio.sleep(backoff.next_delay_s())
        if checked.hexdigest() != _hex(digest):
            self._corrupt.add(digest)
            raise _corrupt(digest)

    async def _append(
        self, digest: str, partial: IO[bytes], checked: "hashlib._Hash"
    ) -> RpcError | None:
        """Read on from where `partial` ends, until the end or a failure, which is returned."""
        stream = self._storage.stream(blob_path(digest), offset=partial.tell())
        try:
            async with aclosing(stream) as chunks:
                async for data in chunks:
                    await self._in_thread(_write, partial, data, checked)
        except FileNotFoundError as error:
            self._missing.add(digest)
            raise _not_found(digest) from error
        except RpcError as error:
            return error
        return None

    async def _in_thread(self, function: Callable[[*_Ts], _T], *arguments: *_Ts) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def blob_path(digest: str) -> str:
    """Where a blob lies. Raises INVALID_FIELD for what is no digest."""
    check_digest(digest)
    return f"{FOLDER}/{_hex(digest)}"


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _read_some(file: BinaryIO, checked: "hashlib._Hash | None") -> bytes:
    data = file.read(CHUNK_BYTES)
    if checked is not None:
        checked.update(data)
    return data


def _write(partial: IO[bytes], data: bytes, checked: "hashlib._Hash") -> None:
    partial.write(data)
    checked.update(data)


def _bad_offset(offset: int, why: str) -> RpcError:
    return RpcError(Reason.INVALID_FIELD, f"offset {offset}: {why}", field="offset")


def _not_found(digest: str) -> RpcError:
    return RpcError(
        Reason.ADAPTER_NOT_FOUND,
        f"no adapter has the digest {digest}",
        field="digest",
        resource=("adapter_blob", digest),
    )


def _corrupt(digest: str) -> RpcError:
    return RpcError(
        Reason.ADAPTER_CORRUPT,
        f"the stored bytes of {digest} do not have that digest; publish the adapter again",
        resource=("adapter_blob", digest),
    )


def _cache_full() -> RpcError:
    return RpcError(
        Reason.STORE_UNAVAILABLE,
        "the disk cache of the adapter store can't hold the blob",
        retry_after_s=5.0,
    )
