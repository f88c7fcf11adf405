"""Host memory for the bytes of adapters: one mapping for all of them, given out in slabs.

Owns which range of the mapping is whose. A slab is one contiguous range for one blob, counted by
its users: the host cache, a load under way, and the engine, whose device memory it is on the CPU.
The last one that lets go gives the range back, where it joins the free ranges beside it.

The mapping is made once and pinned once where a GPU reads it; nothing is allocated or pinned per
adapter. Its pages come with their first use, in huge pages where the kernel has them. What finds no
range in it gets memory of its own, so that a small arena never fails a load: such slabs are bounded
by whoever was promised device memory for them.
"""

import contextlib
import mmap
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from typing import Final

ALIGNMENT: Final = 256  # of every slab's start, and so of the payload of the blob in it


class Slab:
    """`size_bytes` of host memory at `view`, for as long as somebody holds it."""

    __slots__ = ("_on_free", "is_inside", "size_bytes", "users", "view")

    def __init__(
        self, view: memoryview, *, is_inside: bool, on_free: Callable[["Slab"], None]
    ) -> None:
        self.view = view
        self.size_bytes = len(view)
        self.is_inside = is_inside  # of the arena
        self.users = 1
        self._on_free = on_free

    def hold(self) -> None:
        """One more user."""
        assert self.users > 0
        self.users += 1

    def release(self) -> None:
        """One user less; the last one gives the memory back."""
        assert self.users > 0
        self.users -= 1
        if self.users == 0:
            self._on_free(self)


class HostArena:
    """The mapping and its free ranges. Its methods belong to the event loop."""

    def __init__(self, size_bytes: int) -> None:
        """Raises ValueError where there is no room for a mapping of that size."""
        self.size_bytes = size_bytes // ALIGNMENT * ALIGNMENT
        self.outside_bytes = 0  # of slabs that found no range
        self._memory = _mapping(self.size_bytes)
        self._free = [(0, self.size_bytes)] if self.size_bytes else []  # (start, end), ascending
        self._starts: dict[Slab, int] = {}

    @property
    def memory(self) -> memoryview:
        """All of it, for pinning."""
        return self._memory

    @property
    def used_bytes(self) -> int:
        """In slabs, with what their alignment costs."""
        return self.size_bytes - sum(end - start for start, end in self._free)

    @property
    def slabs(self) -> int:
        """How many ranges are given out."""
        return len(self._starts)

    def take(self, size_bytes: int) -> Slab | None:
        """A slab from the smallest free range that has room; None if none has."""
        room = _aligned(size_bytes)
        fits = [(end - start, start) for start, end in self._free if end - start >= room]
        if not fits:
            return None
        range_bytes, start = min(fits)
        at = bisect_left(self._free, (start, start + range_bytes))
        if range_bytes == room:
            del self._free[at]
        else:
            self._free[at] = (start + room, start + range_bytes)
        view = self._memory[start : start + size_bytes]
        slab = Slab(view, is_inside=True, on_free=self._give_back)
        self._starts[slab] = start
        return slab

    def take_outside(self, size_bytes: int) -> Slab:
        """A slab with memory of its own. Raises MemoryError."""
        try:
            view = _mapping(size_bytes)
        except ValueError as error:
            raise MemoryError(str(error)) from error
        self.outside_bytes += size_bytes
        return Slab(view, is_inside=False, on_free=self._forget)

    def could_take(self, size_bytes: int, *, without: Iterable[Slab]) -> bool:
        """Whether there would be a range for a slab if these slabs were given back."""
        gone = set(without)
        kept = sorted(
            (start, start + _aligned(slab.size_bytes))
            for slab, start in self._starts.items()
            if slab not in gone
        )
        free_from = 0
        for start, end in [*kept, (self.size_bytes, self.size_bytes)]:
            if start - free_from >= _aligned(size_bytes):
                return True
            free_from = end
        return False

    def check_integrity(self) -> None:
        """Assert that slabs and free ranges cover the arena, each byte once, and none is apart."""
        used = [(start, start + _aligned(s.size_bytes)) for s, start in self._starts.items()]
        at, was_free = 0, False
        for start, end in sorted([*used, *self._free]):
            is_free = (start, end) in self._free
            assert start == at < end
            assert not (is_free and was_free), "free ranges side by side"
            at, was_free = end, is_free
        assert at == self.size_bytes
        assert all(slab.users > 0 for slab in self._starts)

    def _give_back(self, slab: Slab) -> None:
        start = self._starts.pop(slab)
        end = start + _aligned(slab.size_bytes)
        at = bisect_left(self._free, (start, end))
        if at < len(self._free) and self._free[at][0] == end:
            end = self._free.pop(at)[1]
        if at > 0 and self._free[at - 1][1] == start:
            start = self._free.pop(at - 1)[0]
        insort(self._free, (start, end))

    def _forget(self, slab: Slab) -> None:
        self.outside_bytes -= slab.size_bytes
        slab.view = memoryview(b"")  # the memory goes with the last view of it


def _aligned(size_bytes: int) -> int:
    return max(ALIGNMENT, size_bytes + (-size_bytes % ALIGNMENT))


def _mapping(size_bytes: int) -> memoryview:
    """Private zeroed memory, page-aligned."""
    if size_bytes == 0:
        return memoryview(bytearray())
    try:
        mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise ValueError(f"no mapping of {size_bytes} bytes can be had: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: small pages do as well
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapping)
