"""Object storage as the store needs it: objects whole or in ranges, and create-if-absent.

Owns the `obstore` objects, and turns their many failures into few outcomes: the object, None for
"not there", `ObjectChangedError`, and OBJECT_STORAGE_UNAVAILABLE for everything else. Each call has
a deadline. Create-if-absent is the only condition for writes, because it is the only one that
folders have as well as S3, GCS and Azure.

Small reads are tried again here, within their deadline and the process's `RetryBudget`; a range is
tried again by who reads it (`ranges`), where it broke. Writes and lists are tried again by obstore,
each request of them at most three times.
"""

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, ObjectStore, from_url

from services.adapter_store.retry_budget import RetryBudget
from services.common.clients import Backoff
from services.common.errors import Reason, RpcError
from services.common.interceptors import annotate

SCHEMES: Final = ("file", "s3", "gs", "az")
RETRY_AFTER_S: Final = 1.0
REFUSED_RETRY_AFTER_S: Final = 10.0
REMOTE_RANGES: Final = 4  # of one object at a time; one connection rarely fills the line
TRIES_MAX: Final = 4
_FIRST_CHUNK_BYTES: Final = 2**18  # at the beginning of an object, whose readers wait for it
_BEGINNING_BYTES: Final = 4 * 2**20
_STREAM_CHUNK_BYTES: Final = 2**20  # further on, where fewer cost less; a read that breaks loses it
_FOLDER_CHUNK_BYTES: Final = 4 * 2**20  # obstore reads a file whole 20x faster than as a stream
_LIST_PAGE: Final = 1000  # between two pages other tasks may run
_PART_BYTES: Final = 8 * 2**20  # of a multipart upload; S3 wants 5 MiB at least
_UPLOAD_BYTES_PER_S_MIN: Final = 2**20  # an upload slower than this is given up
_STATUS = re.compile(r"status code: (\d{3})")
_PASSING_STATUS: Final = frozenset({408, 425, 429})  # of 4xx, those that say "later"
_OUT_OF_RANGE: Final = 416
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What storage says of an object."""

    path: str
    size_bytes: int
    modified: datetime
    etag: str | None = None  # another one: other bytes


class ObjectChangedError(RpcError):
    """OBJECT_STORAGE_UNAVAILABLE: another object has taken the place of the one that was read."""


class StorageRefusedError(RpcError):
    """OBJECT_STORAGE_UNAVAILABLE, and trying again at once is of no use: credentials, for one."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """`call_s`: one small call. `read_s`: silence while streaming, up to the next chunk.

    A chunk has 256 KiB at the beginning of an object, and 1 MiB further on.
    """

    call_s: float = 10.0
    read_s: float = 30.0


@dataclass(frozen=True, slots=True)
class S3Credentials:
    """A key pair, where the environment's own credential chain is not wanted."""

    access_key_id: str
    secret_access_key: str


class Storage(Protocol):
    """What the registry and the blobs need. All raise OBJECT_STORAGE_UNAVAILABLE."""

    retries: RetryBudget
    ranges_max: int  # of one object that are worth reading at a time

    async def create(self, path: str, data: bytes) -> bool:
        """Write an object unless it exists. False: it exists."""
        ...

    async def put(self, path: str, data: bytes) -> None:
        """Write an object, whether or not it exists; readers see the old or the new one."""
        ...

    async def get(self, path: str) -> bytes | None:
        """A whole object."""
        ...

    async def head(self, path: str) -> ObjectInfo | None:
        """Size and age of an object."""
        ...

    def read_range(self, info: ObjectInfo, *, start: int, stop: int) -> AsyncGenerator[memoryview]:
        """Bytes of a range that lies within the object, in order; one try.

        Raises FileNotFoundError, and ObjectChangedError when the object is not that of `info`.
        """
        ...

    async def list(self, prefix: str) -> list[ObjectInfo]:
        """All objects below a folder, in any order."""
        ...

    async def delete(self, path: str) -> None:
        """Delete an object; nothing happens when it is not there."""
        ...


class ObjectStorage:
    """`Storage` on a bucket or a folder. `reads`: the same place without retries of its own."""

    def __init__(
        self, store: ObjectStore, timeouts: Timeouts, *, reads: ObjectStore | None = None
    ) -> None:
        self.retries = RetryBudget()
        self._is_folder = isinstance(store, LocalStore)
        self.ranges_max = 1 if self._is_folder else REMOTE_RANGES
        self._store = store
        self._reads = reads if reads is not None else store
        self._timeouts = timeouts

    async def create(self, path: str, data: bytes) -> bool:
        """See `Storage`."""
        try:
            async with self._call():
                await obstore.put_async(self._store, path, data, mode="create")
        except AlreadyExistsError:
            return False
        except FileNotFoundError as error:
            raise unavailable("the bucket does not exist") from error
        return True

    async def put(self, path: str, data: bytes) -> None:
        """See `Storage`. Large objects go up in parts, each of which is tried again alone."""
        try:
            async with self._call(extra_s=len(data) / _UPLOAD_BYTES_PER_S_MIN):
                await obstore.put_async(self._store, path, data, chunk_size=_PART_BYTES)
        except FileNotFoundError as error:
            raise unavailable("the bucket does not exist") from error

    async def get(self, path: str) -> bytes | None:
        """See `Storage`."""

        async def call() -> bytes:
            result = await obstore.get_async(self._reads, path)
            return bytes(await result.bytes_async())

        return await self._read(call)

    async def head(self, path: str) -> ObjectInfo | None:
        """See `Storage`."""

        async def call() -> ObjectInfo:
            meta = await obstore.head_async(self._reads, path)
            return ObjectInfo(path, meta["size"], meta["last_modified"], meta["e_tag"])

        return await self._read(call)

    async def read_range(
        self, info: ObjectInfo, *, start: int, stop: int
    ) -> AsyncGenerator[memoryview]:
        """See `Storage`. The deadline is per chunk."""
        step_bytes = _FOLDER_CHUNK_BYTES if self._is_folder else stop - start
        for first in range(start, stop, step_bytes):
            async with aclosing(self._stream(info, first, min(stop, first + step_bytes))) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _stream(self, info: ObjectInfo, start: int, stop: int) -> AsyncGenerator[memoryview]:
        async with self._call():
            result = await obstore.get_async(
                self._reads, info.path, options={"range": (start, stop), "if_match": info.etag}
            )
            meta = result.meta
            if meta["e_tag"] != info.etag or meta["size"] != info.size_bytes:
                raise _changed("it has another ETag or size")
            whole = await result.bytes_async() if self._is_folder else None
        if whole is not None:
            yield memoryview(whole)
            return
        chunk_bytes = _FIRST_CHUNK_BYTES if start < _BEGINNING_BYTES else _STREAM_CHUNK_BYTES
        chunks = aiter(result.stream(min_chunk_size=chunk_bytes))
        while True:
            async with _deadline(self._timeouts.read_s):
                chunk = await anext(chunks, None)
            if chunk is None:
                return
            yield memoryview(chunk)

    async def list(self, prefix: str) -> list[ObjectInfo]:
        """See `Storage`."""
        try:
            found: list[ObjectInfo] = []
            pages = aiter(obstore.list(self._store, prefix, chunk_size=_LIST_PAGE))
            while True:
                async with _deadline(self._timeouts.read_s):
                    page = await anext(pages, None)
                if page is None:
                    return found
                found += [ObjectInfo(m["path"], m["size"], m["last_modified"]) for m in page]
        except FileNotFoundError as error:  # of a folder that is not there, the list is empty
            raise unavailable("the bucket does not exist") from error

    async def delete(self, path: str) -> None:
        """See `Storage`."""
        with contextlib.suppress(FileNotFoundError):
            async with self._call():
                await obstore.delete_async(self._store, path)

    async def _read(self, call: Callable[[], Awaitable[_T]]) -> _T | None:
        """Try a small read until it succeeds, its time is over or no more may be tried."""
        self.retries.note_read()
        backoff = Backoff(base_s=0.1, cap_s=2.0)
        with contextlib.suppress(FileNotFoundError):
            async with self._call():
                for _ in range(TRIES_MAX - 1):
                    try:
                        return await call()
                    except BaseError as error:
                        if not _is_passing(error) or not self.retries.take():
                            raise
                    await asyncio.sleep(backoff.next_delay_s())
                return await call()
        return None

    def _call(self, *, extra_s: float = 0.0) -> contextlib.AbstractAsyncContextManager[None]:
        return _deadline(self._timeouts.call_s + extra_s)


def open_storage(url: str, timeouts: Timeouts, *, s3: S3Credentials | None = None) -> ObjectStorage:
    """Storage at a URL, with credentials from the environment or `s3`. ValueError: not usable."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"store_url must begin with one of {', '.join(SCHEMES)}: {url}")
    if parts.scheme == "file":
        try:
            return ObjectStorage(LocalStore(Path(unquote(parts.path)), mkdir=True), timeouts)
        except OSError as error:
            raise ValueError(f"store_url {url}: {error}") from error
    credentials = asdict(s3) if s3 is not None and parts.scheme == "s3" else {}
    try:
        store, reads = (_remote(url, credentials, timeouts, tries) for tries in (TRIES_MAX, 1))
    except BaseError as error:
        raise ValueError(f"store_url {url}: {_first_line(error)}") from error
    return ObjectStorage(store, timeouts, reads=reads)


def _remote(
    url: str, credentials: dict[str, Any], timeouts: Timeouts, tries_max: int
) -> ObjectStore:
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
    store: ObjectStore = from_url(
        url,
        client_options={
            # The deadlines of each call are this module's; a whole stream has none.
            "timeout": timedelta(hours=12),
            "read_timeout": timedelta(seconds=timeouts.read_s),
            "connect_timeout": timedelta(seconds=min(5.0, timeouts.call_s)),
            "allow_http": endpoint.startswith("http://"),
        },
        retry_config={
            "max_retries": tries_max - 1,
            "retry_timeout": timedelta(seconds=timeouts.call_s),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=2),
                "base": 2,
            },
        },
        **credentials,
    )
    return store


def unavailable(cause: str) -> RpcError:
    """The error for storage that does not answer as it should. The cause is for the log only."""
    annotate(storage_error=cause)
    return RpcError(
        Reason.OBJECT_STORAGE_UNAVAILABLE,
        "object storage does not answer as it should; the adapter store's log has the details",
        resource=("object_storage", ""),
        retry_after_s=RETRY_AFTER_S,
    )


def _changed(cause: str) -> ObjectChangedError:
    annotate(storage_error=cause)
    return ObjectChangedError(
        Reason.OBJECT_STORAGE_UNAVAILABLE,
        "the object was replaced while it was read",
        resource=("object_storage", ""),
        retry_after_s=RETRY_AFTER_S,
    )


def _refused(cause: str) -> StorageRefusedError:
    annotate(storage_error=cause)
    return StorageRefusedError(
        Reason.OBJECT_STORAGE_UNAVAILABLE,
        "object storage refuses the adapter store's requests; its log has the details",
        resource=("object_storage", ""),
        retry_after_s=REFUSED_RETRY_AFTER_S,
    )


@contextlib.asynccontextmanager
async def _deadline(limit_s: float) -> AsyncGenerator[None]:
    """Bound what is inside and name its failure. What the caller must tell apart passes."""
    try:
        async with asyncio.timeout(limit_s):
            yield
    except (AlreadyExistsError, FileNotFoundError):
        raise
    except TimeoutError as error:
        raise unavailable(f"no answer within {limit_s:g} s") from error
    except BaseError as error:
        if isinstance(error, PreconditionError) or _status(error) == _OUT_OF_RANGE:
            raise _changed(_first_line(error)) from error
        if not _is_passing(error):
            raise _refused(_first_line(error)) from error
        raise unavailable(_first_line(error)) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise unavailable(_first_line(error)) from error


def _is_passing(error: BaseError) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return False
    status = _status(error)
    return status is None or not 400 <= status < 500 or status in _PASSING_STATUS


def _status(error: BaseError) -> int | None:
    """The HTTP status of an answer, which obstore tells in its message only."""
    found = _STATUS.search(_first_line(error))
    return int(found.group(1)) if found is not None else None


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
