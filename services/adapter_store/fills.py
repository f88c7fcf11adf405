"""Bringing blobs from object storage to the disk cache, once however many wait.

One fill per digest. Each part is checked as it is written, and what an `Arrival` calls verified is
handed on at once. A fill goes on when its readers leave; when it fails they all get its
error. An object that is replaced or arrives damaged is read once more from the beginning before it
counts as corrupt. A file that an earlier process left is checked in the same way, in place.

Bounded: fills at a time, fills that wait, what they read ahead, and, by reservation, the disk.
"""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import aclosing
from typing import Final, TypeVar, TypeVarTuple

import structlog

from services.adapter_store.arrivals import Arrival, Pulse
from services.adapter_store.disk_cache import CachedBlob, DiskCache, Partial
from services.adapter_store.intake import Intake
from services.adapter_store.negative_cache import NegativeCache
from services.adapter_store.ranges import ReadAhead, read_object
from services.adapter_store.storage import ObjectChangedError, ObjectInfo, Storage
from services.common.adapter_container import BlobVerifier, ContainerError
from services.common.errors import Reason, RpcError

FILLS_RUNNING_MAX: Final = 32
FILLS_MAX: Final = 512  # with those that wait
READ_AHEAD_RANGES: Final = 12  # of all fills together, beyond one for each
_CHECK_BYTES: Final = 2**20
_Ts = TypeVarTuple("_Ts")
_T = TypeVar("_T")
_log = structlog.get_logger("fills")


class Fills:
    """All fills. `bad_ttl_s`: how long a blob that is missing or corrupt is not read again."""

    def __init__(
        self,
        storage: Storage,
        cache: DiskCache,
        threads: Executor,
        *,
        blob_bytes_max: int,
        bad_ttl_s: float,
    ) -> None:
        self._storage = storage
        self._cache = cache
        self._threads = threads
        self._blob_bytes_max = blob_bytes_max
        self._arrivals: dict[str, Arrival] = {}  # by digest
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = asyncio.Semaphore(FILLS_RUNNING_MAX)
        self._read_ahead = ReadAhead(READ_AHEAD_RANGES)
        self._room = Pulse()  # fires when a fill ends and gives its reservation back
        self._missing = NegativeCache(ttl_s=bad_ttl_s)
        self._corrupt = NegativeCache(ttl_s=bad_ttl_s)

    def is_corrupt(self, digest: str) -> bool:
        """Whether the stored blob was seen to be corrupt just now."""
        return self._corrupt.holds(digest)

    def forget(self, digest: str) -> None:
        """The blob has been written anew."""
        self._missing.discard(digest)
        self._corrupt.discard(digest)

    def arriving(self, digest: str) -> Arrival | None:
        """The fill of this blob that is running."""
        return self._arrivals.get(digest)

    def start(self, digest: str, path: str, left: CachedBlob | None) -> Arrival:
        """Begin a fill from `left`, if that turns out right, else from storage.

        `left` is closed by the fill. Raises what is known already of a blob that storage lacks or
        has wrong, and TOO_MANY_REQUESTS.
        """
        if left is None:
            self._check(digest)
        arrival = Arrival()
        arrival.join()
        if left is not None:
            arrival.begin(left.file)
        task = asyncio.create_task(self._run(digest, path, arrival, left), name=f"fill {digest}")
        self._arrivals[digest] = arrival
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._end(digest, arrival, done))
        return arrival

    async def close(self) -> None:
        """End all fills."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _check(self, digest: str) -> None:
        if self._missing.holds(digest):
            raise not_found(digest)
        if self._corrupt.holds(digest):
            raise corrupt(digest)
        if len(self._arrivals) >= FILLS_MAX:
            raise RpcError(
                Reason.TOO_MANY_REQUESTS,
                f"{len(self._arrivals)} adapters are being fetched",
                retry_after_s=1.0,
            )

    def _end(self, digest: str, arrival: Arrival, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        del self._arrivals[digest]
        error = _stopping() if task.cancelled() else task.exception()
        if isinstance(error, RpcError) and error.reason is Reason.ADAPTER_NOT_FOUND:
            self._missing.add(digest)
        elif isinstance(error, RpcError) and error.reason is Reason.ADAPTER_CORRUPT:
            self._corrupt.add(digest)
        if error is not None and not task.cancelled():
            cause = str(error.__cause__ or error).partition("\n")[0]
            _log.warning("fill_failed", digest=digest, cause=cause)
        arrival.end(error)
        arrival.leave()

    async def _run(self, digest: str, path: str, arrival: Arrival, left: CachedBlob | None) -> None:
        if left is not None:
            if await self._is_right(digest, arrival, left):
                return
            await in_thread(self._threads, self._cache.discard, _key(digest))
            self._check(digest)
        try:
            async with self._running:
                await self._fill(digest, path, arrival)
        except FileNotFoundError as error:
            raise not_found(digest) from error
        except (ContainerError, ObjectChangedError) as error:
            raise corrupt(digest) from error
        except OSError as error:
            raise cache_unusable() from error
        finally:
            self._room.fire()

    async def _is_right(self, digest: str, arrival: Arrival, left: CachedBlob) -> bool:
        """Check a file of an earlier process, handing on what is right."""
        verifier = BlobVerifier(digest)

        def check(offset: int) -> int:
            data = left.file.read(offset, _CHECK_BYTES)
            verifier.feed(data)
            return len(data)

        offset = 0
        with contextlib.suppress(ContainerError, OSError):
            while read_bytes := await in_thread(self._threads, check, offset):
                offset += read_bytes
                _advance(arrival, verifier)
        if not verifier.is_complete:
            _log.warning("cache_file_damaged", digest=digest)
            return False
        self._cache.trust(_key(digest), left.file)
        return True

    async def _fill(self, digest: str, path: str, arrival: Arrival) -> None:
        """Two tries: an object may be replaced, or damaged on its way, once."""
        try:
            await self._download(digest, path, arrival)
        except (ContainerError, ObjectChangedError) as error:
            _log.warning("object_read_again", digest=digest, cause=str(error))
            await self._download(digest, path, arrival)

    async def _download(self, digest: str, path: str, arrival: Arrival) -> None:
        info = await self._storage.head(path)
        if info is None:
            raise FileNotFoundError(path)
        if info.size_bytes > self._blob_bytes_max:
            raise _too_large(digest, info.size_bytes, self._blob_bytes_max)
        await self._reserved(info.size_bytes)
        partial = await in_thread(self._threads, self._cache.new_partial, info.size_bytes)
        arrival.begin(partial.file)
        try:
            await self._copy(digest, info, arrival, partial)
        except BaseException:
            self._cache.abandon(partial)
            raise
        await in_thread(self._threads, self._cache.admit, _key(digest), partial)
        # The last layer is handed on now, so that who has all of a blob finds it on disk.
        arrival.advance(info.size_bytes, total_bytes=info.size_bytes)

    async def _reserved(self, size_bytes: int) -> None:
        """Wait until the blob fits beside those that are being filled."""
        while True:
            freed = self._room.event
            if await in_thread(self._threads, self._cache.reserve, size_bytes):
                return
            await freed.wait()

    async def _copy(
        self, digest: str, info: ObjectInfo, arrival: Arrival, partial: Partial
    ) -> None:
        intake = Intake(digest, partial.file, size_bytes=info.size_bytes)
        async with aclosing(read_object(self._storage, info, self._read_ahead)) as parts:
            async for chunks in parts:
                intake.hold(chunks)
                if intake.is_worth_a_step():
                    await in_thread(self._threads, intake.take)
                    if intake.verified_bytes < info.size_bytes:
                        arrival.advance(intake.verified_bytes, total_bytes=intake.total_bytes)
        intake.check_complete()


async def in_thread(threads: Executor, function: Callable[[*_Ts], _T], *arguments: *_Ts) -> _T:
    """Run what blocks where it may."""
    return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)


def _advance(arrival: Arrival, verifier: BlobVerifier) -> None:
    if verifier.header is not None:
        arrival.advance(verifier.verified_bytes, total_bytes=verifier.header.total_bytes)


def _key(digest: str) -> str:
    return digest.removeprefix("sha256:")


def not_found(digest: str) -> RpcError:
    """Storage has no object where this blob would be."""
    return RpcError(
        Reason.ADAPTER_NOT_FOUND,
        f"no adapter has the digest {digest}",
        field="digest",
        resource=("adapter_blob", digest),
    )


def corrupt(digest: str) -> RpcError:
    """What storage has is not this blob."""
    return RpcError(
        Reason.ADAPTER_CORRUPT,
        f"the stored bytes of {digest} do not have that digest; publish the adapter again",
        resource=("adapter_blob", digest),
    )


def _too_large(digest: str, size_bytes: int, bytes_max: int) -> RpcError:
    return RpcError(
        Reason.ADAPTER_CORRUPT,
        f"the stored object of {digest} has {size_bytes} bytes; an adapter here has {bytes_max} "
        "at most (publish_bytes_max)",
        resource=("adapter_blob", digest),
    )


def cache_unusable() -> RpcError:
    """The disk is full, read-only or broken."""
    return RpcError(
        Reason.STORE_UNAVAILABLE,
        "the disk cache of the adapter store can't hold the blob",
        retry_after_s=5.0,
    )


def _stopping() -> RpcError:
    return RpcError(Reason.DRAINING, "the adapter store stops", retry_after_s=1.0)
