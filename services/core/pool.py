"""The worker's one memory pool: equal blocks that KV cache and adapters share, each with an id.

S-LoRA's unified pool with Chameleon's rule for who wins (§4.2): the KV cache grows on demand and
adapters fill the rest. This is the book of what is held now; who must give way is decided by the
replica machine. `services.core.ledger` is the book of what was promised.

What was given back last is given out first, so that memory that was never needed is never touched.
An id that is given back can be given out in the same breath: decisions are performed in order, and
the engine lets go of it before the next step, which is the first that could write to it.
"""

from collections.abc import Iterable, Sequence

from services.core.types import AdapterDigest


class BlockPool:
    """Gives out the blocks 0 to `blocks - 1`, each to one holder, and counts them by kind."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.kv_blocks = 0  # that the KV cache holds
        self.adapter_blocks = 0  # that adapters hold, loading ones included
        self._free = list(range(blocks - 1, -1, -1))  # the next one last
        self._adapters: dict[AdapterDigest, tuple[int, ...]] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that nothing holds."""
        return len(self._free)

    def take_kv(self, blocks: int) -> list[int]:
        """Give the KV cache so many blocks more; whose they are, sequences remember."""
        taken = [self._free.pop()] if blocks == 1 and self._free else self._take(blocks)
        self.kv_blocks += blocks
        return taken

    def return_kv(self, block_ids: Sequence[int]) -> None:
        """Take back blocks of the KV cache."""
        assert len(block_ids) <= self.kv_blocks
        self.kv_blocks -= len(block_ids)
        self._free.extend(reversed(block_ids))

    def hold_adapter(self, digest: AdapterDigest, blocks: int) -> tuple[int, ...]:
        """Give an adapter its blocks; from the start of its load."""
        assert digest not in self._adapters
        taken = self._adapters[digest] = tuple(self._take(blocks))
        self.adapter_blocks += blocks
        return taken

    def release_adapter(self, digest: AdapterDigest) -> None:
        """Take back an adapter's blocks."""
        block_ids = self._adapters.pop(digest)
        self.adapter_blocks -= len(block_ids)
        self._free.extend(reversed(block_ids))

    def check_integrity(self, kv: Iterable[int]) -> None:
        """Assert that every block is free or has one holder. `kv`: those of the KV cache."""
        of_kv = list(kv)
        assert len(of_kv) == self.kv_blocks
        of_adapters = [block for ids in self._adapters.values() for block in ids]
        assert len(of_adapters) == self.adapter_blocks
        every = [*self._free, *of_kv, *of_adapters]
        assert len(every) == self.blocks
        assert set(every) == set(range(self.blocks))

    def _take(self, blocks: int) -> list[int]:
        first = len(self._free) - blocks
        assert 0 <= first <= len(self._free)
        taken = self._free[first:]
        del self._free[first:]
        taken.reverse()
        return taken
