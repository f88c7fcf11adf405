"""The KV cache in plain torch: keys and values in the blocks of the pool.

    storage[block, layer, 0 keys | 1 values, kv_head, position within the block, head_dim]

Which sequence holds which block is the caller's business; here a context is a list of blocks. What
attention reads is first gathered into one dense tensor: that costs one more copy of the context,
far less than a matrix product over views with holes.

On the CPU the storage is virtual memory that costs nothing until a position is written; on CUDA it
is all allocated at start. A block is zeroed when it is given away: nothing of one context is left
for the next, and a NaN in a stale position could not be masked away.
"""

import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from services.common.base_model import ModelConfig
from services.worker.engine.executor import Ints, Segment


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


class PagedCache:
    """All blocks, whoever holds them."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_tokens = block_tokens
        heads, dim = config.num_kv_heads, config.head_dim
        shape = (blocks, config.num_layers, 2, heads, block_tokens, dim)
        self._storage = _zeros(shape, dtype, device)
        self._device = device
        self._page_rows = 2 * heads  # pages of one block in one layer: one per side and head
        self._block_pages = config.num_layers * self._page_rows
        flat = self._storage.view(-1)
        layer_size = self._page_rows * block_tokens * dim
        # Per layer, the storage from its first value on: indices are the same for every layer.
        tails = [flat[layer * layer_size :] for layer in range(config.num_layers)]
        self._pages = [_rows_of(tail, block_tokens * dim) for tail in tails]
        self._positions = [_rows_of(tail, dim) for tail in tails]

    def clear(self, blocks: Sequence[int]) -> None:
        if blocks:
            self._storage[torch.tensor(blocks, device=self._device)] = 0

    def places(self, segments: Sequence[Segment], positions: Ints) -> Tensor:
        """Where `write` puts each row: `[rows * 2 * kv_heads]`."""
        blocks = [
            segment.blocks[position // self.block_tokens]
            for segment in segments
            for position in range(segment.start, segment.end)
        ]
        first = torch.tensor(blocks).mul_(self._block_pages).view(-1, 1)
        pages = (first + torch.arange(self._page_rows)).mul_(self.block_tokens)
        within = torch.from_numpy(positions % self.block_tokens).view(-1, 1)
        return (pages + within).view(-1).to(self._device)

    def contexts(self, segments: Sequence[Segment]) -> Tensor:
        """What `read` gathers for segments together: those that are shorter are padded.

        `[2 * segments * kv_heads * blocks]`, in this order.
        """
        longest = max(-(-segment.end // self.block_tokens) for segment in segments)
        table = np.zeros((len(segments), longest), dtype=np.int64)
        for row, segment in enumerate(segments):
            count = -(-segment.end // self.block_tokens)
            table[row, :count] = segment.blocks[:count]
            table[row, count:] = table[row, 0]
        pages = torch.from_numpy(table).mul_(self._block_pages)[None, :, None, :]
        sides_heads = torch.arange(self._page_rows).view(2, 1, -1, 1)
        return (pages + sides_heads).reshape(-1).to(self._device)

    def write(self, layer: int, places: Tensor, keys_values: Tensor) -> None:
        """`keys_values [rows, 2 * kv_heads * head_dim]`: keys of all heads, then values."""
        table = self._positions[layer]
        table.index_copy_(0, places, keys_values.reshape(-1, table.shape[1]))

    def read(self, layer: int, contexts: Tensor, *, segments: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each `[segments, kv_heads, positions, head_dim]`."""
        heads, dim = self._page_rows // 2, self._positions[layer].shape[1]
        both = self._pages[layer].index_select(0, contexts)
        keys, values = both.view(2, segments, heads, -1, dim).unbind(0)
        return keys, values


def _rows_of(tail: Tensor, width: int) -> Tensor:
    return tail[: len(tail) // width * width].view(-1, width)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Anonymous memory exists once touched; torch.zeros would touch it.
    size = int(np.prod(shape)) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, size)
    except (OSError, OverflowError) as error:
        raise ValueError(f"{size} bytes of memory cannot be mapped: {error}") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
