"""The KV cache: one contiguous strip of positions per sequence slot.

    storage[layer, 0 keys | 1 values, slot, kv_head, position, head_dim]

At this scale padding a decode batch to its longest sequence costs less than following page tables,
so a sequence owns one slot for its whole life. The lowest free slot is taken first, which keeps the
decoding sequences side by side: their keys are one dense view.

How many tokens may be cached is the caller's account, in blocks. On the CPU the storage is virtual
memory that costs nothing until a position is written; on CUDA it is all allocated at start, so it
must fit into the memory given. A slot is zeroed when it is released: nothing of a request is left
for the next, and a NaN in a stale position could not be masked away.
"""

import heapq
import mmap

import numpy as np
import torch
from torch import Tensor

from services.common.base_model import ModelConfig


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


class KVCache:
    def __init__(
        self,
        config: ModelConfig,
        *,
        slots: int,
        positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.positions = positions
        self._slots = slots
        self._heads = config.num_kv_heads
        shape = (config.num_layers, 2, slots, self._heads, positions, config.head_dim)
        self._storage = _zeros(shape, dtype, device)
        # Per layer: keys, values, and both as one table of rows of head_dim.
        self.keys = [layer[0] for layer in self._storage]
        self.values = [layer[1] for layer in self._storage]
        self._rows = [layer.view(-1, config.head_dim) for layer in self._storage]
        self._free = list(range(slots))
        # Row of each (keys | values, kv_head) relative to a slot's first position.
        sides = torch.arange(2).view(2, 1) * slots * self._heads
        heads = torch.arange(self._heads).view(1, -1)
        self._head_rows = ((sides + heads) * positions).view(1, -1)

    def take_slot(self) -> int:
        """The lowest free slot. The caller keeps to the number of slots."""
        return heapq.heappop(self._free)

    def release_slot(self, slot: int, *, length: int) -> None:
        """Free a slot of which `length` positions were written."""
        self._storage[:, :, slot, :, :length].zero_()
        heapq.heappush(self._free, slot)

    def rows_of(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where `write` puts each token: `[tokens] -> [tokens * 2 * kv_heads]`."""
        first = (slots * self._heads * self.positions + positions).view(-1, 1)
        return (first + self._head_rows).view(-1).to(self._storage.device)

    def write(self, layer: int, rows: Tensor, keys_values: Tensor) -> None:
        """`keys_values [tokens, 2 * kv_heads * head_dim]`: keys of all heads, then values."""
        table = self._rows[layer]
        table.index_copy_(0, rows, keys_values.reshape(-1, table.shape[1]))

    def check_integrity(self, *, used: set[int]) -> None:
        """Assert that free and used slots partition all slots and that free ones are clean."""
        assert len(self._free) == len(set(self._free))
        assert set(self._free) | used == set(range(self._slots))
        assert not set(self._free) & used
        assert all(not bool(self._storage[:, :, slot].any()) for slot in self._free)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Anonymous memory exists once touched; torch.zeros would touch it. Not in huge pages: each of
    # the many strips would commit megabytes at its first token.
    memory = mmap.mmap(-1, int(np.prod(shape)) * dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
