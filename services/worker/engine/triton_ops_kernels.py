"""The kernels between linears themselves; `triton_ops` says what they do and starts them."""

# The language of kernels is not quite Python: the type checker has no % for its constants, nor
# tuples as results.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from services.worker.lora.triton_lora_kernels import lora_delta
from services.worker.lora.worklist import COUNTS, FIELDS, TILE_COUNT

# Kernels may read globals of this type only.
_COUNTS = tl.constexpr(COUNTS)
_FIELDS = tl.constexpr(FIELDS)
_TILE_COUNT = tl.constexpr(TILE_COUNT)
# Numbers that differ from step to step or from layer to layer must not make a kernel compile again.
_VARYING = ["rows", "plane_elements", "tiles_at", "place"]


@triton.jit
def add_norm_kernel(
    hidden_ptr: tl.tensor,
    added_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    hidden_stride: tl.tensor,
    added_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ADDED: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    is_column = column < WIDTH
    hidden_at = hidden_ptr + row * hidden_stride + column
    x = tl.load(hidden_at, mask=is_column, other=0.0)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0)
    if HAS_ADDED:
        x += tl.load(added_ptr + row * added_stride + column, mask=is_column, other=0.0).to(
            tl.float32
        )
        tl.store(hidden_at, x, mask=is_column)
    y = x * (1.0 / tl.sqrt(tl.sum(x * x) / WIDTH + eps)) * weight
    out_at = out_ptr + row * out_stride + column
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def tile_rows(
    tile: tl.tensor,
    tile_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    rows: tl.tensor,
    HAS_LORA: tl.constexpr,
    M: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Which rows a tile has, `[M]`, and where it has one."""
    m = tl.arange(0, M)
    if HAS_LORA:
        is_row = m < tl.load(tile_ptr + 1)
        row = tl.load(rows_ptr + tl.load(tile_ptr) + m, mask=is_row, other=0)
    else:
        row = tile * M + m
        is_row = row < rows
    return row, is_row


@triton.jit(do_not_specialize=_VARYING)
def finish_qkv_kernel(
    qkv_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    norms_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    work_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    rows: tl.tensor,
    qkv_stride: tl.tensor,
    eps: tl.tensor,
    layer_at: tl.tensor,
    plane_elements: tl.tensor,
    tiles_at: tl.tensor,
    place: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROTATES: tl.constexpr,
    HAS_LORA: tl.constexpr,
    SPLITS: tl.constexpr,
    M: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    c = tl.arange(0, HALF_BLOCK)
    is_c = c < HALF
    heads: tl.constexpr = HEADS + 2 * KV_HEADS
    tiles = tl.load(work_ptr + _TILE_COUNT) if HAS_LORA else tl.cdiv(rows, M)
    for task in range(tl.program_id(0), tiles * heads, tl.num_programs(0)):
        head = task % heads
        tile_ptr = work_ptr + tiles_at + task // heads * _FIELDS
        row, is_row = tile_rows(task // heads, tile_ptr, work_ptr + _COUNTS, rows, HAS_LORA, M)
        is_value = is_row[:, None] & is_c[None, :]
        at = qkv_ptr + row[:, None] * qkv_stride + head * (2 * HALF) + c[None, :]
        a = tl.load(at, mask=is_value, other=0.0).to(tl.float32)
        b = tl.load(at + HALF, mask=is_value, other=0.0).to(tl.float32)
        module = (head >= HEADS).to(tl.int32) + (head >= HEADS + KV_HEADS).to(tl.int32)
        own = head - tl.where(module == 0, 0, tl.where(module == 1, HEADS, HEADS + KV_HEADS))
        if HAS_LORA:
            out = tl.where(module == 0, HEADS, KV_HEADS) * (2 * HALF)
            column = own * (2 * HALF) + c
            a += lora_delta(
                tile_ptr, pool_ptr, tables_ptr, planes_ptr, plane_elements, place, module, out,
                column, is_c, 3, SPLITS, HALF_BLOCK, M, UPCAST,
            )  # fmt: skip
            b += lora_delta(
                tile_ptr, pool_ptr, tables_ptr, planes_ptr, plane_elements, place, module, out,
                column + HALF, is_c, 3, SPLITS, HALF_BLOCK, M, UPCAST,
            )  # fmt: skip
        if HAS_NORM:
            if module < 2:
                mean = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF)
                factor = (1.0 / tl.sqrt(mean + eps))[:, None]
                norm_ptr = norms_ptr + module * (2 * HALF) + c
                a = a * factor * tl.load(norm_ptr, mask=is_c, other=0.0)[None, :]
                b = b * factor * tl.load(norm_ptr + HALF, mask=is_c, other=0.0)[None, :]
        if ROTATES:
            if module < 2:
                position = tl.load(positions_ptr + row, mask=is_row, other=0)
                turn_at = position[:, None] * HALF + c[None, :]
                cos = tl.load(cos_ptr + turn_at, mask=is_value, other=0.0)
                sin = tl.load(sin_ptr + turn_at, mask=is_value, other=0.0)
                turned = a * cos - b * sin
                b = b * cos + a * sin
                a = turned
        dtype = qkv_ptr.dtype.element_ty
        if module == 0:
            tl.store(at, a.to(dtype), mask=is_value)
            tl.store(at + HALF, b.to(dtype), mask=is_value)
        else:
            slot = tl.load(slots_ptr + row, mask=is_row, other=-1)
            to = (slot // BLOCK_TOKENS).to(tl.int64) * BLOCK_ELEMENTS + layer_at
            to += ((module - 1) * KV_HEADS + own) * (BLOCK_TOKENS * 2 * HALF)
            to += slot % BLOCK_TOKENS * (2 * HALF)
            is_kept = is_value & (slot >= 0)[:, None]
            tl.store(pool_ptr + to[:, None] + c[None, :], a.to(dtype), mask=is_kept)
            tl.store(pool_ptr + to[:, None] + HALF + c[None, :], b.to(dtype), mask=is_kept)


@triton.jit(do_not_specialize=_VARYING)
def finish_gate_up_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    work_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    rows: tl.tensor,
    gate_up_stride: tl.tensor,
    out_stride: tl.tensor,
    plane_elements: tl.tensor,
    tiles_at: tl.tensor,
    place: tl.tensor,
    FFN: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    HAS_LORA: tl.constexpr,
    SPLITS: tl.constexpr,
    M: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    tiles = tl.load(work_ptr + _TILE_COUNT) if HAS_LORA else tl.cdiv(rows, M)
    for task in range(tl.program_id(0), tiles * TILES, tl.num_programs(0)):
        column = task % TILES * COLUMNS + tl.arange(0, COLUMNS)
        is_column = column < FFN
        tile_ptr = work_ptr + tiles_at + task // TILES * _FIELDS
        row, is_row = tile_rows(task // TILES, tile_ptr, work_ptr + _COUNTS, rows, HAS_LORA, M)
        is_value = is_row[:, None] & is_column[None, :]
        at = gate_up_ptr + row[:, None] * gate_up_stride + column[None, :]
        gate = tl.load(at, mask=is_value, other=0.0).to(tl.float32)
        up = tl.load(at + FFN, mask=is_value, other=0.0).to(tl.float32)
        if HAS_LORA:
            gate += lora_delta(
                tile_ptr, pool_ptr, tables_ptr, planes_ptr, plane_elements, place, 0, FFN,
                column, is_column, 2, SPLITS, COLUMNS, M, UPCAST,
            )  # fmt: skip
            up += lora_delta(
                tile_ptr, pool_ptr, tables_ptr, planes_ptr, plane_elements, place, 1, FFN,
                column, is_column, 2, SPLITS, COLUMNS, M, UPCAST,
            )  # fmt: skip
        value = gate / (1.0 + tl.exp(-gate)) * up
        to = out_ptr + row[:, None] * out_stride + column[None, :]
        tl.store(to, value.to(out_ptr.dtype.element_ty), mask=is_value)
