"""LoRA of a mixed step on CUDA: kernels over a work list of true ranks, without atomics.

`shrink` makes s = x Aᵀ for all adapters of a step, for all linears that share the input x. `expand`
adds scale · s B to what it is given. The kernels that finish qkv and gate_up (`triton_ops`) expand
on their own, with the same code, and what o and down add goes right into the residual stream: then
all of shrink, and expand of o and down, may run on a stream beside the base model's product, and
no kernel is added to the path that steps wait for.

Rank rows are read where they lie in the pool, page by page (`paging`), and only those there are: an
adapter costs its own bytes whatever the ranks of others. A row that a page does not have is never
read, so it may hold anything.

The inner dimension of shrink is split, so that few adapters still fill the device. Each split has a
plane of sums of its own, which expand adds up in their order: results are the same every time, and
what a row gets does not depend on its batch mates.

`add_masked_dense` computes the same with plain torch on any device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from services.common.base_model import LINEARS, ModelConfig, linear_shapes
from services.worker.engine.triton_support import launch, power_of_two
from services.worker.lora.layout import GROUPS
from services.worker.lora.paging import ALIGN_ELEMENTS, ROWS_RADIX, Int64s
from services.worker.lora.triton_lora_kernels import expand_kernel, shrink_kernel
from services.worker.lora.worklist import PAGE_ROWS, WorkShape

MODULES_MAX: Final = 3  # linears that share an input: q, k and v


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linears with one input, whose outputs lie side by side. `first`: place among `LINEARS`."""

    first: int
    in_features: int
    out_features: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoraTuning:
    """How the kernels are cut.

    The plan is made for tiles of `tile_rows` and items of `item_pages`. `splits` cut the inner
    dimension of shrink. `programs`: how many run at most; each takes many tasks if need be.
    """

    tile_rows: int = 16
    item_pages: int = 2
    splits: int = 4
    block_k: int = 128
    shrink_programs: int = 132 * 4
    shrink_warps: int = 2
    shrink_stages: int = 4
    columns: int = 128
    expand_programs: int = 132 * 8
    expand_warps: int = 4
    expand_stages: int = 2


# What arithmetic says for 132 processors; they were not measured. Decoding is bound by reading rank
# rows, by a few rows each; prompts have many rows of one adapter, and read the input most.
DECODE_TUNING: Final = LoraTuning()
PREFILL_TUNING: Final = LoraTuning(
    tile_rows=64,
    item_pages=8,
    splits=1,
    block_k=64,
    shrink_warps=4,
    shrink_stages=3,
    expand_warps=8,
)


@dataclass(frozen=True, slots=True)
class LoraStep:
    """The adapters of one step on the device.

    `pool`: all of its elements; `tables`: int64, the page tables of resident adapters, one behind
    the other; `work [shape.size]` int32: the packed plan; `planes [plane_elements_max]` fp32 at
    least: room for products.
    """

    pool: Tensor
    tables: Tensor
    work: Tensor
    planes: Tensor
    shape: WorkShape
    tuning: LoraTuning

    def plane_elements(self, group: LinearGroup) -> int:
        elements = self.shape.page_rows * PAGE_ROWS * len(group.out_features)
        assert self.planes.numel() >= elements * self.tuning.splits
        return elements


def linear_groups(config: ModelConfig) -> dict[str, LinearGroup]:
    """The groups of `layout.GROUPS` by name."""
    shapes = linear_shapes(config)
    return {
        name: LinearGroup(
            LINEARS.index(modules[0]),
            shapes[modules[0]][0],
            tuple(shapes[module][1] for module in modules),
        )
        for name, modules in GROUPS.items()
    }


def plane_elements_max(shape: WorkShape, tuning: LoraTuning) -> int:
    """Elements that `LoraStep.planes` needs for any group."""
    return tuning.splits * shape.page_rows * PAGE_ROWS * MODULES_MAX


def shrink(x: Tensor, step: LoraStep, group: LinearGroup, *, layer: int) -> None:
    """Multiply `x [rows, in_features]` with A of every row's adapter, into the planes."""
    assert x.shape[1] == group.in_features
    assert x.stride(1) == 1
    assert x.dtype == step.pool.dtype
    tuning = step.tuning
    modules = len(group.out_features)
    tasks = step.shape.items * modules * tuning.splits
    launch(
        shrink_kernel,
        (min(tuning.shrink_programs, tasks),),
        x,
        step.pool,
        step.tables,
        step.work,
        step.planes,
        x.stride(0),
        step.plane_elements(group),
        step.shape.items_at,
        layer * len(LINEARS) + group.first,
        **shrink_constants(group, tuning),
        num_warps=tuning.shrink_warps,
        num_stages=tuning.shrink_stages,
    )


def shrink_constants(group: LinearGroup, tuning: LoraTuning) -> dict[str, Any]:
    block_k = min(tuning.block_k, max(16, power_of_two(group.in_features)))
    return {
        "IN": group.in_features,
        "MODULES": len(group.out_features),
        "SPLITS": tuning.splits,
        "BLOCK_K": block_k,
        "PART_K": -(-group.in_features // (block_k * tuning.splits)) * block_k,
        "IS_EVEN": group.in_features % block_k == 0,
        "M": tuning.tile_rows,
        "PAGES": tuning.item_pages,
    }


def expand(y: Tensor, step: LoraStep, group: LinearGroup, *, layer: int) -> None:
    """Add scale · s B of every row's adapter to `y [rows, out]`, in place.

    `y` may be of any type: what an o or down projection adds may go into the residual stream.
    """
    assert y.shape[1] == sum(group.out_features)
    assert y.stride(1) == 1
    tuning = step.tuning
    constants = expand_constants(group, tuning)
    launch(
        expand_kernel,
        (min(tuning.expand_programs, step.shape.rows * constants["TILES"]),),
        y,
        step.pool,
        step.tables,
        step.work,
        step.planes,
        y.stride(0),
        step.plane_elements(group),
        step.shape.tiles_at,
        layer * len(LINEARS) + group.first,
        **constants,
        num_warps=tuning.expand_warps,
        num_stages=tuning.expand_stages,
    )


def expand_constants(group: LinearGroup, tuning: LoraTuning) -> dict[str, Any]:
    widths = (*group.out_features, 0, 0)[:MODULES_MAX]
    columns = min(tuning.columns, max(16, power_of_two(max(widths))))
    return {
        "OUT_0": widths[0],
        "OUT_1": widths[1],
        "OUT_2": widths[2],
        "TILES": sum(-(-width // columns) for width in widths),
        "MODULES": len(group.out_features),
        "SPLITS": tuning.splits,
        "COLUMNS": columns,
        "M": tuning.tile_rows,
    }


def add_masked_dense(
    y: Tensor,
    x: Tensor,
    pool: Tensor,
    group: LinearGroup,
    *,
    layer: int,
    tables: Sequence[Int64s],
    row_slots: Sequence[int],
) -> None:
    """Add what `shrink` and `expand` add to `y [rows, out]`, for `x [rows, in]`.

    All rows are multiplied with the rank rows of all adapters, and a mask keeps each row's own.
    `tables`: of each slot, `[layers, linears, 1 + 2 pages]`; `row_slots [rows]`: -1 is the base.
    """
    rows = torch.tensor(row_slots, device=x.device)
    first = 0
    for module, out in enumerate(group.out_features):
        a_at, bt_at, slots, scales = _rank_rows(
            [table[layer, group.first + module] for table in tables],
            {"a": group.in_features, "bt": out},
        )
        a = pool[_elements(a_at, group.in_features, pool.device)]
        bt = pool[_elements(bt_at, out, pool.device)]
        s = x @ a.t()
        owner = torch.from_numpy(slots).to(x.device)
        s.masked_fill_(rows[:, None] != owner[None, :], 0.0)
        s *= torch.from_numpy(scales).to(x.device)
        y[:, first : first + out] += s @ bt
        first += out


def _rank_rows(
    tables: Sequence[Int64s], widths: Mapping[str, int]
) -> tuple[Int64s, Int64s, Int64s, np.ndarray[Any, np.dtype[np.float32]]]:
    """Of all adapters: elements where rows of A and of Bᵀ begin, their slots and scales."""
    a: list[int] = []
    bt: list[int] = []
    slots: list[int] = []
    scales: list[np.float32] = []
    for slot, table in enumerate(tables):
        pages = len(table) // 2
        for at, entry in enumerate(table[1 : 1 + pages]):
            for row in range(int(entry) % ROWS_RADIX):
                a.append(int(entry) // ROWS_RADIX * ALIGN_ELEMENTS + row * widths["a"])
                bt_entry = int(table[1 + pages + at])
                bt.append(bt_entry // ROWS_RADIX * ALIGN_ELEMENTS + row * widths["bt"])
                slots.append(slot)
                scales.append(table[:1].astype(np.int32).view(np.float32)[0])
    ints = [np.array(values, dtype=np.int64) for values in (a, bt, slots)]
    return ints[0], ints[1], ints[2], np.array(scales, dtype=np.float32)


def _elements(starts: Int64s, width: int, device: torch.device) -> Tensor:
    index: Tensor = torch.from_numpy(starts)[:, None] + torch.arange(width)
    return index.to(device)
