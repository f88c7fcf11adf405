"""Adapters in host memory: verified blobs in slabs of the arena, least recently used out first.

A slab that the engine or a load uses, too, costs nothing extra and stays. What is given up for a
new slab is the oldest of the others, and only when that makes room: a blob for which no range can
be had, however many went, gets memory outside the arena and is not kept here.
"""

from collections import OrderedDict
from collections.abc import Iterator

from services.core.types import Adapter, AdapterDigest
from services.worker.arena import HostArena, Slab


class HostCache:
    """The blobs of an arena. Its methods belong to the event loop."""

    def __init__(self, arena: HostArena) -> None:
        self.arena = arena
        self._blobs: OrderedDict[AdapterDigest, tuple[Adapter, Slab]] = OrderedDict()
        self._digests: frozenset[AdapterDigest] | None = frozenset()

    def __contains__(self, digest: AdapterDigest) -> bool:
        return digest in self._blobs

    def __len__(self) -> int:
        return len(self._blobs)

    def __iter__(self) -> Iterator[Adapter]:
        """Whose blobs are here, least recently used first."""
        return (adapter for adapter, _ in self._blobs.values())

    @property
    def digests(self) -> frozenset[AdapterDigest]:
        """What is here. The same object for as long as nothing changes."""
        if self._digests is None:
            self._digests = frozenset(self._blobs)
        return self._digests

    def get(self, digest: AdapterDigest) -> Slab | None:
        """The blob, which counts as used now. The caller holds it and releases it."""
        if digest not in self._blobs:
            return None
        self._blobs.move_to_end(digest)
        slab = self._blobs[digest][1]
        slab.hold()
        return slab

    def allocate(self, size_bytes: int) -> Slab:
        """Memory for a blob to come. The caller holds it and releases it. Raises MemoryError."""
        slab = self.arena.take(size_bytes)
        if slab is None and self.arena.could_take(size_bytes, without=self._idle()):
            while slab is None:
                self._drop_oldest()
                slab = self.arena.take(size_bytes)
        return slab or self.arena.take_outside(size_bytes)

    def put(self, adapter: Adapter, slab: Slab) -> None:
        """Keep a verified blob, unless it is outside the arena."""
        assert adapter.digest not in self._blobs
        if slab.is_inside:
            slab.hold()
            self._blobs[adapter.digest] = (adapter, slab)
            self._digests = None

    def drop(self, digest: AdapterDigest) -> None:
        """Forget a blob. Whoever still holds its slab goes on with it."""
        if digest in self._blobs:
            _, slab = self._blobs.pop(digest)
            self._digests = None
            slab.release()

    def uses(self, slab: Slab) -> bool:
        """Whether a blob here lies in it."""
        return any(slab is held for _, held in self._blobs.values())

    def check_integrity(self) -> None:
        """Assert that every blob has its memory."""
        self.arena.check_integrity()
        assert all(slab.users > 0 and slab.is_inside for _, slab in self._blobs.values())
        assert self.digests == self._blobs.keys()

    def _idle(self) -> Iterator[Slab]:
        return (slab for _, slab in self._blobs.values() if slab.users == 1)

    def _drop_oldest(self) -> None:
        self.drop(next(name for name, (_, slab) in self._blobs.items() if slab.users == 1))
