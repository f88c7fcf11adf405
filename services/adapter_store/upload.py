"""Receiving an upload: metadata first, then the two files, into files that vanish with the process.

Owns the order and the limits of the messages. Nothing is looked into here.
"""

import asyncio
import mmap
import tempfile
from collections.abc import AsyncIterator, Generator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from services.adapter_store.changes import DEFAULT_TERMS, Terms
from services.adapter_store.descriptions import (
    check_source,
    check_tenant,
    checked_labels,
    checked_tenants,
)
from services.adapter_store.entries import Provenance
from services.adapter_store.peft_config import CONFIG_BYTES_MAX
from services.adapter_store.peft_config import FILE as CONFIG_FILE
from services.adapter_store.references import VERSION_MAX, check_alias, check_name
from services.adapter_store.refusals import invalid, shown, unsupported
from services.adapter_store.safetensors_file import FILE as WEIGHTS_FILE
from services.common.errors import Reason, RpcError

CHUNK_BYTES_MAX: Final = 2**20
ALIASES_MAX: Final = 16
_FILES: Final = (CONFIG_FILE, WEIGHTS_FILE)


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """`idle_s`: silence that ends an upload. `uploads_max`: received or converted at a time."""

    bytes_max: int
    idle_s: float
    uploads_max: int


@dataclass(frozen=True, slots=True)
class Metadata:
    """What an upload is to become."""

    name: str
    dry_run: bool = False
    terms: Terms = DEFAULT_TERMS


class Spool:
    """The files of one upload on disk, without names. Close it."""

    def __init__(self, folder: Path, *, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._files: dict[str, IO[bytes]] = {}
        self._total_bytes = 0

    def append(self, file: str, data: bytes) -> None:
        """Add a chunk. A file is sent in one go, so that its chunks can't be mixed up."""
        if file not in _FILES:
            raise unsupported(
                f"{shown(file)} is not accepted; send {' and '.join(_FILES)}", field="chunk.file"
            )
        if len(data) > CHUNK_BYTES_MAX:
            raise _over(f"a chunk has {len(data)} bytes", CHUNK_BYTES_MAX)
        if file not in self._files:
            self._files[file] = self._new_file()
        elif file != next(reversed(self._files)):
            raise RpcError(
                Reason.INVALID_FIELD, f"{file} goes on after another file", field="chunk.file"
            )
        self._total_bytes += len(data)
        if self._total_bytes > self._bytes_max:
            raise _over("the upload is too large", self._bytes_max)
        if file == CONFIG_FILE and self._files[file].tell() + len(data) > CONFIG_BYTES_MAX:
            raise _over(f"{CONFIG_FILE} is too large", CONFIG_BYTES_MAX)
        try:
            self._files[file].write(data)
        except OSError as error:
            raise _no_space(error) from error

    @contextmanager
    def contents(self) -> Generator[tuple[bytes, memoryview]]:
        """The config, and the weights without reading them into memory."""
        for file in _FILES:
            if file not in self._files or self._files[file].tell() == 0:
                raise invalid(f"{file} was not sent, or is empty", field="chunk.file")
            try:
                self._files[file].flush()
            except OSError as error:
                raise _no_space(error) from error
        self._files[CONFIG_FILE].seek(0)
        config = self._files[CONFIG_FILE].read()
        # Unmapped with the last array that looks into it.
        weights = mmap.mmap(self._files[WEIGHTS_FILE].fileno(), 0, access=mmap.ACCESS_READ)
        yield config, memoryview(weights)

    def close(self) -> None:
        """Delete the files."""
        for file in self._files.values():
            with suppress(OSError):  # what was buffered and did not fit is wanted no more
                file.close()

    def _new_file(self) -> IO[bytes]:
        try:
            return tempfile.TemporaryFile(dir=self._folder)
        except OSError as error:
            raise _no_space(error) from error


async def receive(
    messages: AsyncIterator[pb.PublishRequest],
    spool: Spool,
    *,
    idle_s: float,
    threads: Executor,
) -> Metadata:
    """Read the whole upload into `spool`. Raises the error of the first message that is wrong."""
    loop = asyncio.get_running_loop()
    metadata: Metadata | None = None
    while (message := await _next(messages, idle_s)) is not None:
        match message.WhichOneof("message"), metadata:
            case "metadata", None:
                metadata = _metadata(message.metadata)
            case "chunk", Metadata():
                chunk = message.chunk
                await loop.run_in_executor(threads, spool.append, chunk.file, chunk.data)
            case None, _:
                raise _order("a message is empty")
            case _:
                raise _order("metadata comes first, and once")
    if metadata is None:
        raise _order("nothing was sent")
    return metadata


async def _next(
    messages: AsyncIterator[pb.PublishRequest], idle_s: float
) -> pb.PublishRequest | None:
    try:
        async with asyncio.timeout(idle_s):
            return await anext(messages, None)
    except TimeoutError as error:
        raise RpcError(
            Reason.DEADLINE_EXCEEDED, f"nothing was sent for {idle_s:g} s", stage="upload"
        ) from error


def _metadata(message: pb.PublishMetadata) -> Metadata:
    check_name(message.name, field="metadata.name")
    if len(message.aliases) > ALIASES_MAX:
        raise RpcError(
            Reason.FIELD_LIMIT_EXCEEDED,
            f"{len(message.aliases)} aliases; at most {ALIASES_MAX}",
            field="metadata.aliases",
        )
    for alias in message.aliases:
        check_alias(alias, field="metadata.aliases")
    if not 0 <= message.version <= VERSION_MAX:
        raise RpcError(
            Reason.INVALID_FIELD,
            f"version must be 1 to {VERSION_MAX}, or 0 for the next one",
            field="metadata.version",
        )
    terms = Terms(
        aliases=tuple(message.aliases),
        number=message.version or None,
        labels=checked_labels(message.labels, field="metadata.labels"),
        tenants=_tenants(message),
        provenance=Provenance(source=message.source, publisher=message.tenant),
    )
    check_source(message.source, field="metadata.source")
    return Metadata(message.name, message.dry_run, terms)


def _tenants(message: pb.PublishMetadata) -> tuple[str, ...]:
    tenants = checked_tenants(message.tenants, field="metadata.tenants")
    if not message.tenant:
        return tenants
    check_tenant(message.tenant, field="metadata.tenant")
    if tenants and message.tenant not in tenants:
        raise RpcError(
            Reason.INVALID_FIELD,
            "the publishing tenant must be among those that may use the adapter",
            field="metadata.tenants",
        )
    return tenants


def _order(message: str) -> RpcError:
    return RpcError(Reason.INVALID_FIELD, message, field="message")


def _no_space(error: OSError) -> RpcError:
    return RpcError(
        Reason.STORE_UNAVAILABLE,
        f"the adapter store can't spool the upload: {error.strerror}",
        retry_after_s=5.0,
    )


def _over(message: str, limit: int) -> RpcError:
    return RpcError(
        Reason.FIELD_LIMIT_EXCEEDED, f"{message}; at most {limit} bytes", field="chunk.data"
    )
