"""A registry on a folder that fails when told to, and short ways to fill it."""

from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Any

from services.adapter_store import changes
from services.adapter_store.changes import Terms
from services.adapter_store.entries import Entry, Weights
from services.adapter_store.references import parse_reference
from services.adapter_store.registry import Registry
from services.adapter_store.storage import (
    ObjectInfo,
    ObjectStorage,
    Timeouts,
    open_storage,
    unavailable,
)


class FaultyStorage:
    """Storage that fails when told to: before a write, after it, or at every read."""

    def __init__(self, inner: ObjectStorage) -> None:
        self._inner = inner
        self.retries = inner.retries
        self.ranges_max = inner.ranges_max
        self.down = False
        self.fail_before_create = 0
        self.fail_after_create = 0
        self.create_twice = 0
        self.calls = 0
        self.conflicts = 0

    @classmethod
    def at(cls, folder: Path) -> "FaultyStorage":
        return cls(open_storage((folder / "store").as_uri(), Timeouts()))

    def _check(self) -> None:
        self.calls += 1
        if self.down:
            raise unavailable("switched off")

    async def create(self, path: str, data: bytes) -> bool:
        self._check()
        if self.fail_before_create:
            self.fail_before_create -= 1
            raise unavailable("lost before the write")
        created = await self._inner.create(path, data)
        self.conflicts += not created
        if self.create_twice:  # what a retry below does when the first answer is lost
            self.create_twice -= 1
            return await self._inner.create(path, data)
        if self.fail_after_create:
            self.fail_after_create -= 1
            raise unavailable("lost after the write")
        return created

    async def put(self, path: str, data: bytes) -> None:
        self._check()
        await self._inner.put(path, data)

    async def get(self, path: str) -> bytes | None:
        self._check()
        return await self._inner.get(path)

    async def head(self, path: str) -> ObjectInfo | None:
        self._check()
        return await self._inner.head(path)

    def read_range(self, info: ObjectInfo, *, start: int, stop: int) -> AsyncGenerator[memoryview]:
        self._check()
        return self._inner.read_range(info, start=start, stop=stop)

    async def list(self, prefix: str) -> list[ObjectInfo]:
        self._check()
        return await self._inner.list(prefix)

    async def delete(self, path: str) -> None:
        self._check()
        await self._inner.delete(path)


async def synced(storage: FaultyStorage, **options: Any) -> Registry:
    registry = Registry(storage, **options)
    await registry.sync()
    return registry


def weights(number: int) -> Weights:
    return Weights(f"sha256:{number:064x}", 8, 1000, ("q_proj",), "BF16", "acme/base", 512)


async def publish(registry: Registry, name: str, number: int, *aliases: str) -> Entry:
    decide = partial(changes.publish, weights=weights(number), terms=Terms(aliases), now_ns=1)
    return await registry.change(name, decide)


async def digest(registry: Registry, reference: str) -> int:
    version, _ = await registry.get(parse_reference(reference))
    return int(version.weights.digest.removeprefix("sha256:"), 16)
