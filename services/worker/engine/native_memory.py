"""The memory of the KV cache on the CPU: virtual, and real only where a block was written.

The pool's blocks are KV cache here or an adapter, whose rows lie in host memory of their own. So
what a context has left in blocks that become an adapter's is given back to the system: at any time
the pool costs what its owner has counted.
"""

import mmap
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from services.worker.engine.executor import Ints

# Not in `mmap` before Python 3.13: the pool may be larger than what is free now.
_MAP_NORESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000)


class BlockMemory:
    """`blocks` blocks of `block_bytes`, side by side. What was never written is zero."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        """Raises ValueError for more than the system can address."""
        size = blocks * block_bytes
        self._block_bytes = block_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self._memory = mmap.mmap(-1, size, flags=flags)
        except (OSError, OverflowError) as error:
            raise ValueError(f"{size} bytes of memory cannot be mapped: {error}") from error
        # Pages of 2 MiB would be committed whole for the first position written to them.
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._is_used = np.zeros(blocks, dtype=np.bool_)
        self.address: int = np.frombuffer(self._memory, dtype=np.uint8).ctypes.data

    def use(self, blocks: Sequence[int]) -> Ints:
        """These will be written. Returns those that may have been before: they are not zero."""
        ids = np.asarray(blocks, dtype=np.int32)
        used = ids[self._is_used[ids]]
        self._is_used[ids] = True
        return used

    def give_back(self, blocks: Sequence[int]) -> None:
        """These hold nothing any more: their pages are the system's again, and read as zero.

        May be called while others are in use. A page that a block shares with another one stays.
        """
        for first, end in _runs(sorted(blocks)):
            start = -(-first * self._block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = end * self._block_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            if start < stop:
                self._memory.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending ids as ranges `[first, end)`."""
    start = 0
    for place in range(1, len(blocks) + 1):
        if place == len(blocks) or blocks[place] != blocks[place - 1] + 1:
            yield blocks[start], blocks[place - 1] + 1
            start = place
