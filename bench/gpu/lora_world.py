"""Adapters in a pool, for kernels alone: pages of random rows, their tables, and dense copies."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from bench.gpu.extent import Extent
from bench.gpu.random_model import adapter_header
from services.worker.lora.paging import ALIGN_ELEMENTS, ROWS_RADIX, Int64s, place
from services.worker.lora.triton_lora import (
    LinearGroup,
    LoraStep,
    linear_groups,
    plane_elements_max,
)
from services.worker.lora.worklist import PAGE_ROWS, plan

_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class DenseGroup:
    """Active rank rows of a group in one layer.

    `a [modules * ranks, in]`; `bts`: of each module, `[ranks, out]`.
    """

    a: Tensor
    bts: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class LoraWorld:
    """Adapters of these ranks. `row_slots [rows]`: whose each row is, in order."""

    ranks: tuple[int, ...]
    row_slots: np.ndarray[tuple[int], np.dtype[np.int32]]
    step: LoraStep
    groups: dict[str, LinearGroup]
    dense: list[dict[str, DenseGroup]]  # by layer

    @property
    def sum_ranks(self) -> int:
        return sum(self.ranks)

    @property
    def bytes_per_step(self) -> int:
        """Of all rank rows, once."""
        width = sum(
            len(group.out_features) * group.in_features + sum(group.out_features)
            for group in self.groups.values()
        )
        return self.sum_ranks * width * len(self.dense) * self.step.pool.itemsize


def build(extent: Extent, *, adapters: int, ranks: Sequence[int], rows: int) -> LoraWorld:
    """Takes memory for the adapters twice: in the pool, and dense for the peers."""
    own = tuple(islice(cycle(ranks), adapters))
    config = extent.large
    block_elements = config.num_layers * 2 * config.num_kv_heads * _BLOCK_TOKENS * config.head_dim
    tables: list[Int64s] = []
    blocks = 0
    for rank in own:
        placement = place(adapter_header(config, rank, extent.dtype), block_elements=block_elements)
        numbers = range(blocks, blocks + placement.blocks)
        blocks += placement.blocks
        tables.append(
            placement.table(numbers, block_elements=block_elements, num_layers=config.num_layers)
        )
    pool = torch.empty(blocks * block_elements, dtype=extent.dtype, device=extent.device)
    pool.normal_(std=0.02)
    groups = linear_groups(config)
    row_slots = np.sort(np.arange(rows) % adapters).astype(np.int32)
    dense = [
        {name: _dense(pool, tables, group, layer) for name, group in groups.items()}
        for layer in range(config.num_layers)
    ]
    return LoraWorld(own, row_slots, _step(extent, pool, tables, row_slots), groups, dense)


def _step(
    extent: Extent,
    pool: Tensor,
    tables: Sequence[Int64s],
    row_slots: np.ndarray[tuple[int], np.dtype[np.int32]],
) -> LoraStep:
    sizes = np.array([table.size for table in tables])
    tuning = extent.tunings.decode
    work = plan(
        row_slots,
        (np.cumsum(sizes) - sizes).astype(np.int32),
        np.array([table.shape[2] // 2 for table in tables], dtype=np.int32),
        tile_rows=tuning.tile_rows,
        item_pages=tuning.item_pages,
    )
    shape = work.bucket
    return LoraStep(
        pool=pool,
        tables=torch.from_numpy(np.concatenate([one.ravel() for one in tables])).to(pool.device),
        work=torch.from_numpy(work.pack(shape)).to(pool.device),
        planes=torch.empty(
            plane_elements_max(shape, tuning), dtype=torch.float32, device=pool.device
        ),
        shape=shape,
        tuning=tuning,
    )


def _dense(pool: Tensor, tables: Sequence[Int64s], group: LinearGroup, layer: int) -> DenseGroup:
    places = range(group.first, group.first + len(group.out_features))
    a = [_rows(pool, [one[layer, at] for one in tables], 0, group.in_features) for at in places]
    bts = [
        _rows(pool, [one[layer, at] for one in tables], 1, width)
        for at, width in zip(places, group.out_features, strict=True)
    ]
    return DenseGroup(torch.cat(a), tuple(bts))


def _rows(pool: Tensor, tables: Sequence[Int64s], side: int, width: int) -> Tensor:
    """Rank rows of one side of one linear of all adapters, `[ranks, width]`: whole pages only."""
    pages: list[Int64s] = []
    for table in tables:
        count = len(table) // 2
        pages.append(table[1 + side * count : 1 + side * count + count])
    entries = np.concatenate(pages)
    assert bool((entries % ROWS_RADIX == PAGE_ROWS).all())
    starts = entries // ROWS_RADIX * ALIGN_ELEMENTS
    index = starts[:, None] + np.arange(PAGE_ROWS) * width
    at = torch.from_numpy(index.reshape(-1)).to(pool.device)
    return pool[at[:, None] + torch.arange(width, device=pool.device)]
