"""The worker's one memory pool: equal blocks that KV cache and adapters share.

S-LoRA's unified pool with Chameleon's rule for who wins (§4.2): the KV cache grows on demand and
adapters fill the rest. This is the book of what is held now; who must give way is decided by the
replica machine. `services.core.ledger` is the book of what was promised.
"""

from services.core.types import AdapterDigest, Attempt


class BlockPool:
    """Counts blocks by holder. Never hands out more than it has."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._kv: dict[Attempt, int] = {}
        self._adapters: dict[AdapterDigest, int] = {}
        self._free_blocks = blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that nothing holds."""
        return self._free_blocks

    @property
    def kv_blocks(self) -> int:
        """Blocks that the KV cache holds."""
        return sum(self._kv.values())

    @property
    def adapter_blocks(self) -> int:
        """Blocks that adapters hold, loading ones included."""
        return sum(self._adapters.values())

    def kv_of(self, attempt: Attempt) -> int:
        """Blocks of one sequence."""
        return self._kv.get(attempt, 0)

    def grow_kv(self, attempt: Attempt, *, to_blocks: int) -> None:
        """Give a sequence blocks until it holds so many."""
        more = to_blocks - self.kv_of(attempt)
        assert 0 <= more <= self._free_blocks
        self._kv[attempt] = to_blocks
        self._free_blocks -= more

    def release_kv(self, attempt: Attempt) -> None:
        """Take back all blocks of a sequence."""
        self._free_blocks += self._kv.pop(attempt, 0)

    def hold_adapter(self, digest: AdapterDigest, blocks: int) -> None:
        """Give an adapter its blocks; from the start of its load."""
        assert digest not in self._adapters
        assert blocks <= self._free_blocks
        self._adapters[digest] = blocks
        self._free_blocks -= blocks

    def release_adapter(self, digest: AdapterDigest) -> None:
        """Take back an adapter's blocks."""
        self._free_blocks += self._adapters.pop(digest)

    def check_integrity(self) -> None:
        """Assert that every block is free or has one holder."""
        assert all(blocks >= 0 for blocks in self._kv.values())
        assert self._free_blocks >= 0
        assert self.kv_blocks + self.adapter_blocks + self._free_blocks == self.blocks
