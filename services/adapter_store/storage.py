"""Object storage as the store needs it: whole small objects, streamed large ones, create-if-absent.

Owns the one `obstore` object, and turns its many failures into three outcomes: the object, None
for "not there", and OBJECT_STORAGE_UNAVAILABLE for everything else. Each call has a deadline.
Create-if-absent is the only condition used, because it is the only one that folders have as well
as S3, GCS and Azure.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from services.common.errors import Reason, RpcError
from services.common.interceptors import annotate

SCHEMES: Final = ("file", "s3", "gs", "az")
RETRY_AFTER_S: Final = 1.0
_STREAM_CHUNK_BYTES: Final = 2**20
_LIST_PAGE: Final = 1000  # between two pages other tasks may run
_PART_BYTES: Final = 8 * 2**20  # of a multipart upload; S3 wants 5 MiB at least
_UPLOAD_BYTES_PER_S_MIN: Final = 2**20  # an upload slower than this is given up


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What storage says of an object."""

    path: str
    size_bytes: int
    modified: datetime


@dataclass(frozen=True, slots=True)
class Timeouts:
    """`call_s`: one small call. `read_s`: silence while streaming."""

    call_s: float = 10.0
    read_s: float = 30.0


@dataclass(frozen=True, slots=True)
class S3Credentials:
    """A key pair, where the environment's own credential chain is not wanted."""

    access_key_id: str
    secret_access_key: str


class Storage(Protocol):
    """What the registry and the blobs need. All raise OBJECT_STORAGE_UNAVAILABLE."""

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

    def stream(self, path: str, *, offset: int) -> AsyncGenerator[bytes]:
        """Bytes from an offset on that lies within the object. FileNotFoundError: not there."""
        ...

    async def list(self, prefix: str) -> list[ObjectInfo]:
        """All objects below a folder, in any order."""
        ...

    async def delete(self, path: str) -> None:
        """Delete an object; nothing happens when it is not there."""
        ...


class ObjectStorage:
    """`Storage` on a bucket or a folder."""

    def __init__(self, store: ObjectStore, timeouts: Timeouts) -> None:
        self._store = store
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
        try:
            async with self._call():
                result = await obstore.get_async(self._store, path)
                return bytes(await result.bytes_async())
        except FileNotFoundError:
            return None

    async def head(self, path: str) -> ObjectInfo | None:
        """See `Storage`."""
        try:
            async with self._call():
                meta = await obstore.head_async(self._store, path)
        except FileNotFoundError:
            return None
        return ObjectInfo(path, meta["size"], meta["last_modified"])

    async def stream(self, path: str, *, offset: int) -> AsyncGenerator[bytes]:
        """See `Storage`. The deadline is per chunk."""
        async with self._call():
            result = await obstore.get_async(
                self._store, path, options={"range": {"offset": offset}}
            )
            chunks = aiter(result.stream(min_chunk_size=_STREAM_CHUNK_BYTES))
        while True:
            async with _deadline(self._timeouts.read_s):
                chunk = await anext(chunks, None)
            if chunk is None:
                return
            yield bytes(chunk)

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
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
    try:
        store = from_url(
            url,
            **credentials,
            client_options={
                # The deadlines of each call are this module's; a whole stream has none.
                "timeout": timedelta(hours=12),
                "read_timeout": timedelta(seconds=timeouts.read_s),
                "connect_timeout": timedelta(seconds=min(5.0, timeouts.call_s)),
                "allow_http": endpoint.startswith("http://"),
            },
            retry_config={
                "max_retries": 3,
                "retry_timeout": timedelta(seconds=timeouts.call_s),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
        )
    except BaseError as error:
        raise ValueError(f"store_url {url}: {_first_line(error)}") from error
    return ObjectStorage(store, timeouts)


def unavailable(cause: str) -> RpcError:
    """The error for storage that does not answer as it should. The cause is for the log only."""
    annotate(storage_error=cause)
    return RpcError(
        Reason.OBJECT_STORAGE_UNAVAILABLE,
        "object storage does not answer as it should; the adapter store's log has the details",
        resource=("object_storage", ""),
        retry_after_s=RETRY_AFTER_S,
    )


@contextlib.asynccontextmanager
async def _deadline(limit_s: float) -> AsyncGenerator[None]:
    """Bound what is inside and name its failure. "Exists" and "not there" pass."""
    try:
        async with asyncio.timeout(limit_s):
            yield
    except (AlreadyExistsError, FileNotFoundError):
        raise
    except TimeoutError as error:
        raise unavailable(f"no answer within {limit_s:g} s") from error
    except (BaseError, OSError, ValueError, RuntimeError) as error:
        raise unavailable(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
