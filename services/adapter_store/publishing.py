"""Publishing: a checked adapter becomes a version of a name.

The blob is stored before the registry names it, so a version that can be seen can be downloaded. A
publish that dies in between leaves a blob without a name, which `collect` deletes.
"""

import asyncio
import time
from concurrent.futures import Executor
from dataclasses import dataclass

from services.adapter_store.blobs import Blobs
from services.adapter_store.entries import Entry, Version, publish
from services.adapter_store.peft import BaseModel, BoundModule, Converted, convert
from services.adapter_store.registry import Registry
from services.adapter_store.upload import Metadata, Spool


@dataclass(frozen=True, slots=True)
class Published:
    """`version` has number 0 after a dry run that would have made one."""

    name: str
    version: Version
    bindings: tuple[BoundModule, ...]
    already_published: bool


class Publisher:
    """Checks, converts, stores and names adapters of one base model."""

    def __init__(
        self,
        registry: Registry,
        blobs: Blobs,
        *,
        base: BaseModel,
        rank_max: int,
        threads: Executor,
    ) -> None:
        self._registry = registry
        self._blobs = blobs
        self._base = base
        self._rank_max = rank_max
        self._threads = threads

    async def publish(self, metadata: Metadata, spool: Spool) -> Published:
        """Raises the reason for which the adapter is refused, or storage is not there."""
        self._registry.check_room_for(metadata.name)
        converted = await asyncio.get_running_loop().run_in_executor(
            self._threads, self._convert, spool
        )
        weights = converted.weights
        entry = self._registry.live_entry(metadata.name) or Entry(metadata.name)
        existing = entry.with_digest(weights.digest)
        if metadata.dry_run:
            version = existing or Version(0, time.time_ns(), weights)
            return Published(metadata.name, version, converted.bindings, existing is not None)
        if existing is None or not await self._is_stored(converted):
            await self._blobs.put(weights.digest, converted.blob)
        return await self._name(metadata, converted)

    def _convert(self, spool: Spool) -> Converted:
        with spool.contents() as (config, data):
            return convert(config, data, self._base, rank_max=self._rank_max)

    async def _name(self, metadata: Metadata, converted: Converted) -> Published:
        weights, now_ns = converted.weights, time.time_ns()
        was_there = False

        def decide(entry: Entry) -> Entry:
            nonlocal was_there
            was_there = entry.with_digest(weights.digest) is not None
            return publish(entry, weights, aliases=metadata.aliases, now_ns=now_ns)

        entry = await self._registry.change(metadata.name, decide)
        if not await self._is_stored(converted):
            await self._blobs.put(weights.digest, converted.blob)
        version = entry.with_digest(weights.digest)
        assert version is not None
        return Published(metadata.name, version, converted.bindings, was_there)

    async def _is_stored(self, converted: Converted) -> bool:
        return await self._blobs.is_stored(converted.weights.digest, len(converted.blob))
