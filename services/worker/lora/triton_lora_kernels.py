"""The LoRA kernels themselves; `triton_lora` says what they do and starts them."""

# The language of kernels is not quite Python: the type checker has no % for its constants.
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from services.common.base_model import LINEARS
from services.worker.engine.triton_support import PRECISION
from services.worker.lora.paging import ALIGN_ELEMENTS, ROWS_RADIX
from services.worker.lora.worklist import (
    ADAPTER_TILE_COUNT,
    COUNTS,
    FIELDS,
    ITEM_COUNT,
    PAGE_ROWS,
)

# Kernels may read globals of this type only.
_COUNTS = tl.constexpr(COUNTS)  # the rows follow the counts
_FIELDS = tl.constexpr(FIELDS)
_LINEARS = tl.constexpr(len(LINEARS))
_PAGE_ROWS = tl.constexpr(PAGE_ROWS)
_ALIGN = tl.constexpr(ALIGN_ELEMENTS)
_RADIX = tl.constexpr(ROWS_RADIX)
_ITEM_COUNT = tl.constexpr(ITEM_COUNT)
_ADAPTER_TILE_COUNT = tl.constexpr(ADAPTER_TILE_COUNT)
# Two pages are the smallest inner dimension of a product on tensor cores.
_EXPAND_PAGES = tl.constexpr(2)


# Numbers that differ from step to step or from layer to layer must not make it compile again.
@triton.jit(do_not_specialize=["plane_elements", "items_at", "place"])
def shrink_kernel(
    x_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    work_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    x_stride: tl.tensor,
    plane_elements: tl.tensor,
    items_at: tl.tensor,
    place: tl.tensor,
    IN: tl.constexpr,
    MODULES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART_K: tl.constexpr,
    IS_EVEN: tl.constexpr,
    M: tl.constexpr,
    PAGES: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    m = tl.arange(0, M)
    n = tl.arange(0, PAGES * _PAGE_ROWS)
    tasks = tl.load(work_ptr + _ITEM_COUNT) * (MODULES * SPLITS)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        item = task // (MODULES * SPLITS)
        module = task // SPLITS % MODULES
        split = task % SPLITS
        at = work_ptr + items_at + item * _FIELDS
        is_row = m < tl.load(at + 1)
        row = tl.load(work_ptr + _COUNTS + tl.load(at) + m, mask=is_row, other=0)
        pages = tl.load(at + 3)
        page = tl.load(at + 5) + n // _PAGE_ROWS
        table = tables_ptr + tl.load(at + 2) + (place + module) * (1 + 2 * pages) + 1
        entry = tl.load(table + page, mask=page < pages, other=0)
        is_rank = n % _PAGE_ROWS < entry % _RADIX
        a_at = entry // _RADIX * _ALIGN + n % _PAGE_ROWS * IN
        sums = tl.zeros((M, PAGES * _PAGE_ROWS), dtype=tl.float32)
        for first in range(split * PART_K, tl.minimum(split * PART_K + PART_K, IN), BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            is_x = is_row[:, None]
            is_a = is_rank[:, None]
            if not IS_EVEN:
                is_x = is_x & (k < IN)[None, :]
                is_a = is_a & (k < IN)[None, :]
            x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=is_x, other=0.0)
            a = tl.load(pool_ptr + a_at[:, None] + k[None, :], mask=is_a, other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
                a = a.to(tl.float32)
            sums = tl.dot(x, tl.trans(a), sums, input_precision=PRECISION)
        product = (tl.load(at + 4) + m * pages) * (MODULES * _PAGE_ROWS)
        product += module * pages * _PAGE_ROWS
        to = product[:, None] + (page * _PAGE_ROWS + n % _PAGE_ROWS)[None, :]
        is_kept = is_row[:, None] & (page < pages)[None, :]
        tl.store(planes_ptr + split * plane_elements + to, sums, mask=is_kept)


@triton.jit
def lora_delta(
    tile_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    plane_elements: tl.tensor,
    place: tl.tensor,
    module: tl.tensor,
    out: tl.tensor,
    column: tl.tensor,
    is_column: tl.tensor,
    MODULES: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    M: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """What one tile gets for some columns of a linear: scale · s B, `[M, COLUMNS]` fp32.

    `out`: the width of the linear; `column [COLUMNS]`: which of it, where `is_column`.
    """
    m = tl.arange(0, M)
    n = tl.arange(0, _EXPAND_PAGES * _PAGE_ROWS)
    is_row = m < tl.load(tile_ptr + 1)
    pages = tl.load(tile_ptr + 3)
    table = tables_ptr + tl.load(tile_ptr + 2) + (place + module) * (1 + 2 * pages)
    product = (tl.load(tile_ptr + 4) + m * pages) * (MODULES * _PAGE_ROWS)
    product += module * pages * _PAGE_ROWS
    sums = tl.zeros((M, COLUMNS), dtype=tl.float32)
    for first in range(0, pages, _EXPAND_PAGES):
        page = first + n // _PAGE_ROWS
        entry = tl.load(table + 1 + pages + page, mask=page < pages, other=0)
        is_rank = n % _PAGE_ROWS < entry % _RADIX
        from_ptr = planes_ptr + product[:, None] + (page * _PAGE_ROWS + n % _PAGE_ROWS)[None, :]
        is_product = is_row[:, None] & is_rank[None, :]
        s = tl.load(from_ptr, mask=is_product, other=0.0)
        for split in tl.static_range(1, SPLITS):
            s += tl.load(from_ptr + split * plane_elements, mask=is_product, other=0.0)
        bt_at = entry // _RADIX * _ALIGN + n % _PAGE_ROWS * out
        is_bt = is_rank[:, None] & is_column[None, :]
        bt = tl.load(pool_ptr + bt_at[:, None] + column[None, :], mask=is_bt, other=0.0)
        s = s.to(bt.dtype)
        if UPCAST:
            s = s.to(tl.float32)
            bt = bt.to(tl.float32)
        sums = tl.dot(s, bt, sums, input_precision=PRECISION)
    # A base row has no table.
    scale = tl.load(table, mask=pages > 0, other=0).to(tl.int32).to(tl.float32, bitcast=True)
    return sums * scale


@triton.jit(do_not_specialize=["plane_elements", "tiles_at", "place"])
def expand_kernel(
    y_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    work_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    y_stride: tl.tensor,
    plane_elements: tl.tensor,
    tiles_at: tl.tensor,
    place: tl.tensor,
    OUT_0: tl.constexpr,
    OUT_1: tl.constexpr,
    OUT_2: tl.constexpr,
    TILES: tl.constexpr,
    MODULES: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    M: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    m = tl.arange(0, M)
    first_1: tl.constexpr = (OUT_0 + COLUMNS - 1) // COLUMNS
    first_2: tl.constexpr = first_1 + (OUT_1 + COLUMNS - 1) // COLUMNS
    tasks = tl.load(work_ptr + _ADAPTER_TILE_COUNT) * TILES
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        part = task % TILES
        module = (part >= first_1).to(tl.int32) + (part >= first_2).to(tl.int32)
        out = tl.where(module == 0, OUT_0, tl.where(module == 1, OUT_1, OUT_2))
        first = tl.where(module == 0, 0, tl.where(module == 1, first_1, first_2))
        output = tl.where(module == 0, 0, tl.where(module == 1, OUT_0, OUT_0 + OUT_1))
        at = work_ptr + tiles_at + task // TILES * _FIELDS
        pages = tl.load(at + 3)
        table = tables_ptr + tl.load(at + 2) + (place + module) * (1 + 2 * pages)
        if tl.load(table + 1) != 0:  # this adapter has rows for this linear
            column = (part - first) * COLUMNS + tl.arange(0, COLUMNS)
            is_column = column < out
            delta = lora_delta(
                at,
                pool_ptr,
                tables_ptr,
                planes_ptr,
                plane_elements,
                place,
                module,
                out,
                column,
                is_column,
                MODULES,
                SPLITS,
                COLUMNS,
                M,
                UPCAST,
            )
            is_row = m < tl.load(at + 1)
            row = tl.load(work_ptr + _COUNTS + tl.load(at) + m, mask=is_row, other=0)
            y_at = y_ptr + row[:, None] * y_stride + (output + column)[None, :]
            is_y = is_row[:, None] & is_column[None, :]
            y = tl.load(y_at, mask=is_y, other=0.0).to(tl.float32)
            tl.store(y_at, (y + delta).to(y_ptr.dtype.element_ty), mask=is_y)
