"""The worker's one memory pool: equal blocks that KV cache and adapters share.

S-LoRA's unified pool with Chameleon's rule for who wins (§4.2): the KV cache grows on demand and
adapters fill the rest. This is the book of what is held now; who must give way is decided by the
replica machine. `services.core.ledger` is the book of what was promised.
"""

from services.core.types import AdapterDigest


class BlockPool:
    """Counts blocks by holder. Never hands out more than it has."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.free_blocks = blocks  # that nothing holds
        self.kv_blocks = 0  # that the KV cache holds
        self.adapter_blocks = 0  # that adapters hold, loading ones included
        self._adapters: dict[AdapterDigest, int] = {}

    def take_kv(self, blocks: int) -> None:
        """Give the KV cache so many blocks more; whose they are, sequences remember."""
        assert 0 <= blocks <= self.free_blocks
        self.kv_blocks += blocks
        self.free_blocks -= blocks

    def return_kv(self, blocks: int) -> None:
        """Take back blocks of the KV cache."""
        assert 0 <= blocks <= self.kv_blocks
        self.kv_blocks -= blocks
        self.free_blocks += blocks

    def hold_adapter(self, digest: AdapterDigest, blocks: int) -> None:
        """Give an adapter its blocks; from the start of its load."""
        assert digest not in self._adapters
        assert blocks <= self.free_blocks
        self._adapters[digest] = blocks
        self.adapter_blocks += blocks
        self.free_blocks -= blocks

    def release_adapter(self, digest: AdapterDigest) -> None:
        """Take back an adapter's blocks."""
        blocks = self._adapters.pop(digest)
        self.adapter_blocks -= blocks
        self.free_blocks += blocks

    def check_integrity(self) -> None:
        """Assert that every block is free or has one holder."""
        assert min(self.free_blocks, self.kv_blocks) >= 0
        assert self.adapter_blocks == sum(self._adapters.values())
        assert self.kv_blocks + self.adapter_blocks + self.free_blocks == self.blocks
