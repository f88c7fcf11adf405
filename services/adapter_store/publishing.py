"""Publishing: a checked adapter becomes a version of a name.

The blob is stored before the registry names it, so a version that can be seen can be downloaded. A
publish that dies in between leaves a blob without a name, which `collect` deletes.
"""

import asyncio
import hashlib
import time
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from services.adapter_store.blobs import Blobs
from services.adapter_store.changes import Terms, check_publisher, publish
from services.adapter_store.entries import Entry, Version
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
        entry = self._registry.entry(metadata.name)
        check_publisher(entry, metadata.terms.provenance.publisher)
        loop = asyncio.get_running_loop()
        converted, terms = await loop.run_in_executor(
            self._threads, self._convert, spool, metadata.terms
        )
        if metadata.dry_run:
            return self._report(metadata.name, converted, terms)
        weights = converted.weights
        entry = self._registry.entry(metadata.name)
        if entry.with_digest(weights.digest) is None or not await self._is_stored(converted):
            await self._blobs.put(weights.digest, converted.blob)
        return await self._name(metadata.name, converted, terms)

    def _convert(self, spool: Spool, terms: Terms) -> tuple[Converted, Terms]:
        """The adapter, and the terms with all that is known of where it comes from."""
        with spool.contents() as (config, data):
            converted = convert(config, data, self._base, rank_max=self._rank_max)
            provenance = replace(
                terms.provenance,
                peft_version=converted.peft_version,
                config_sha256=hashlib.sha256(config).hexdigest(),
                weights_sha256=hashlib.sha256(data).hexdigest(),
            )
        return converted, replace(terms, provenance=provenance)

    def _report(self, name: str, converted: Converted, terms: Terms) -> Published:
        """What publishing would do, as far as this replica knows; raises what it would raise."""
        before = self._registry.entry(name)
        existing = before.with_digest(converted.weights.digest)
        after = publish(before, converted.weights, terms, now_ns=time.time_ns())
        version = existing or replace(after.versions[-1], number=0)
        return Published(name, version, converted.bindings, existing is not None)

    async def _name(self, name: str, converted: Converted, terms: Terms) -> Published:
        weights, now_ns = converted.weights, time.time_ns()
        was_there = False

        def decide(entry: Entry) -> Entry:
            nonlocal was_there
            was_there = entry.with_digest(weights.digest) is not None
            return publish(entry, weights, terms, now_ns=now_ns)

        entry = await self._registry.change(name, decide)
        if not await self._is_stored(converted):
            await self._blobs.put(weights.digest, converted.blob)
        version = entry.with_digest(weights.digest)
        assert version is not None
        return Published(name, version, converted.bindings, was_there)

    async def _is_stored(self, converted: Converted) -> bool:
        return await self._blobs.is_stored(converted.weights.digest, len(converted.blob))
