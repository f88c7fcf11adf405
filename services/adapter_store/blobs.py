"""The bytes of adapters: `blobs/sha256/<hex>` in object storage, and a verified copy on local disk.

A blob is written before the registry names it and never changes: its name is its digest. Nothing
that comes from storage is handed on before it has been checked against that digest, layer by layer;
what has been checked is handed on at once, while the rest still comes (`fills`). One download from
storage at a time per digest, however many ask.
"""

from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from services.adapter_store.arrivals import Arrival
from services.adapter_store.disk_cache import DiskCache, OpenFile
from services.adapter_store.fills import Fills, cache_unusable, corrupt, in_thread
from services.adapter_store.references import check_digest
from services.adapter_store.storage import Storage
from services.common.errors import Reason, RpcError

FOLDER: Final = "blobs/sha256"
CHUNK_BYTES: Final = 2**20  # of a download: large enough to cost little, small enough to interleave
READERS_MAX: Final = 512  # each holds a chunk and, of a blob that does not arrive, a file
BLOB_BYTES_MAX: Final = 2**36
BAD_TTL_S: Final = 10.0
_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a blob."""

    offset: int
    data: bytes
    total_bytes: int


class Blobs:
    """All blobs. `close` ends its fills and threads.

    `blob_bytes_max`: a larger object is refused before it is read. `bad_ttl_s`: how long a blob
    that is missing or corrupt is not looked for again.
    """

    def __init__(
        self,
        storage: Storage,
        cache: DiskCache,
        *,
        blob_bytes_max: int = BLOB_BYTES_MAX,
        bad_ttl_s: float = BAD_TTL_S,
    ) -> None:
        self._storage = storage
        self._cache = cache
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="blobs")
        self._fills = Fills(
            storage, cache, self._threads, blob_bytes_max=blob_bytes_max, bad_ttl_s=bad_ttl_s
        )
        self._readers = 0
        self._buffer = memoryview(bytearray(CHUNK_BYTES))  # one is enough: between reads it is free

    async def put(self, digest: str, blob: bytes) -> None:
        """Store a blob. One that is there is written again: it becomes young, and whole."""
        await self._storage.put(blob_path(digest), blob)
        self._fills.forget(digest)

    async def is_stored(self, digest: str, size_bytes: int) -> bool:
        """Whether storage has the blob, as far as its size tells."""
        info = await self._storage.head(blob_path(digest))
        return (
            info is not None
            and info.size_bytes == size_bytes
            and not self._fills.is_corrupt(digest)
        )

    async def read(self, digest: str, *, offset: int) -> AsyncGenerator[Chunk]:
        """Send a blob from an offset on, as far as it is there and as it comes.

        Raises INVALID_FIELD, ADAPTER_NOT_FOUND, ADAPTER_CORRUPT, OBJECT_STORAGE_UNAVAILABLE,
        STORE_UNAVAILABLE (the disk), TOO_MANY_REQUESTS.
        """
        check_digest(digest)
        if offset < 0:
            raise _bad_offset(offset, "may not be negative")
        if self._readers >= READERS_MAX:
            raise RpcError(
                Reason.TOO_MANY_REQUESTS, f"{self._readers} downloads run", retry_after_s=1.0
            )
        self._readers += 1
        try:
            arrival = await self._found(digest)
            try:
                async with aclosing(self._sent(digest, arrival, offset)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            finally:
                arrival.leave()
        finally:
            self._readers -= 1

    async def close(self) -> None:
        """End fills and threads."""
        await self._fills.close()
        self._threads.shutdown(cancel_futures=True)

    async def _found(self, digest: str) -> Arrival:
        """The blob on disk, or on its way there, joined."""
        arrival = self._fills.arriving(digest)
        if arrival is None:
            cached = await in_thread(
                self._threads, self._cache.open, digest.removeprefix("sha256:")
            )
            arrival = self._fills.arriving(digest)
            if arrival is not None:  # others were faster
                if cached is not None:
                    cached.file.close()
            elif cached is not None and cached.is_verified:
                arrival = Arrival.complete(cached.file, cached.size_bytes)
            else:
                arrival = self._fills.start(digest, blob_path(digest), cached)
        arrival.join()
        return arrival

    async def _sent(self, digest: str, arrival: Arrival, offset: int) -> AsyncGenerator[Chunk]:
        while True:
            changed = arrival.changed.event
            if arrival.error is not None:
                raise arrival.error
            total_bytes = arrival.total_bytes
            if total_bytes is not None and offset > total_bytes:
                raise _bad_offset(offset, f"the blob has {total_bytes} bytes")
            if offset == total_bytes:
                return
            length = min(CHUNK_BYTES, arrival.verified_bytes - offset)
            if total_bytes is None or length <= 0:
                await changed.wait()
                continue
            assert arrival.file is not None
            try:
                data = await self._bytes_of(arrival.file, offset, length)
            except OSError as error:
                raise cache_unusable() from error
            if not data:  # somebody has cut the file
                raise corrupt(digest)
            yield Chunk(offset, data, total_bytes)
            offset += len(data)

    async def _bytes_of(self, file: OpenFile, offset: int, length: int) -> bytes:
        """What the kernel has in memory is copied here: a thread would cost more than the copy."""
        at_once = self._buffer[:length]
        read_bytes = file.read_at_once(at_once, offset)
        if read_bytes:
            return bytes(at_once[:read_bytes])
        return await in_thread(self._threads, file.read, offset, length)


def blob_path(digest: str) -> str:
    """Where a blob lies. Raises INVALID_FIELD for what is no digest."""
    check_digest(digest)
    return f"{FOLDER}/{digest.removeprefix('sha256:')}"


def _bad_offset(offset: int, why: str) -> RpcError:
    return RpcError(Reason.INVALID_FIELD, f"offset {offset}: {why}", field="offset")
