"""The attention kernels themselves; `triton_attention` says what they do and starts them."""

import triton
import triton.language as tl

from services.worker.engine.triton_support import PRECISION


@triton.jit
def attend(
    q: tl.tensor,
    sums: tl.tensor,
    total: tl.tensor,
    peak: tl.tensor,
    pool_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    head_at: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    position: tl.tensor,
    scale: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
    TOKENS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Go on with `q [m, D]` over `TOKENS` tokens from `first`, those below `end`.

    `sums [m, D]`, `total [m]` and `peak [m]` are the running softmax, base 2. `head_at`: where the
    keys of layer and head begin in a block. With IS_CAUSAL queries see tokens to `position [m]`.
    """
    token = first + tl.arange(0, TOKENS)
    d = tl.arange(0, D)
    is_there = token < end
    block = tl.load(blocks_ptr + token // BLOCK_TOKENS, mask=is_there, other=0)
    at = block.to(tl.int64) * BLOCK_ELEMENTS + head_at + token % BLOCK_TOKENS * HEAD_DIM
    is_value = is_there[:, None] & (d < HEAD_DIM)[None, :]
    k = tl.load(pool_ptr + at[:, None] + d[None, :], mask=is_value, other=0.0)
    at += KV_HEADS * BLOCK_TOKENS * HEAD_DIM
    v = tl.load(pool_ptr + at[:, None] + d[None, :], mask=is_value, other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    is_seen = is_there[None, :]
    if IS_CAUSAL:
        is_seen = is_seen & (token[None, :] <= position[:, None])
    scores = tl.where(is_seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_peak[:, None])
    fade = tl.exp2(peak - new_peak)
    total = total * fade + tl.sum(weights, axis=1)
    weights = weights.to(v.dtype)
    if UPCAST:
        weights = weights.to(tl.float32)
        v = v.to(tl.float32)
    sums = tl.dot(weights, v, sums * fade[:, None], input_precision=PRECISION)
    return sums, total, new_peak


@triton.jit
def part_tokens(
    length: tl.tensor, TOKENS: tl.constexpr, PARTS: tl.constexpr, PART_TOKENS_MIN: tl.constexpr
) -> tl.tensor:
    """Tokens of each part of a context but the last, which has the rest."""
    even = tl.cdiv(tl.cdiv(length, PARTS), TOKENS) * TOKENS
    return tl.maximum(even, PART_TOKENS_MIN)


# The width of block tables differs from step to step, and must not make a kernel compile again.
@triton.jit(do_not_specialize=["blocks_stride"])
def decode_kernel(
    q_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    outputs_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    scale: tl.tensor,
    q_stride: tl.tensor,
    blocks_stride: tl.tensor,
    layer_at: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
    M: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_TOKENS_MIN: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    tokens = part_tokens(length, TOKENS, PARTS, PART_TOKENS_MIN)
    start = part * tokens
    end = tl.minimum(length, start + tokens)
    if start >= end:
        return
    g = tl.arange(0, M)
    d = tl.arange(0, D)
    head = kv_head * GROUP + g
    is_value = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    q_at = q_ptr + row * q_stride + head[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(q_at, mask=is_value, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    sums = tl.zeros((M, D), dtype=tl.float32)
    total = tl.zeros((M,), dtype=tl.float32)
    peak = tl.full((M,), float("-inf"), dtype=tl.float32)
    head_at = layer_at + kv_head * (BLOCK_TOKENS * HEAD_DIM)
    table_ptr = blocks_ptr + row * blocks_stride
    for first in range(start, end, TOKENS):
        sums, total, peak = attend(
            q, sums, total, peak, pool_ptr, table_ptr, head_at, first, end, 0,
            scale, KV_HEADS, HEAD_DIM, D, BLOCK_TOKENS, BLOCK_ELEMENTS, TOKENS, False, UPCAST,
        )  # fmt: skip
    to = (row * (KV_HEADS * GROUP) + head) * PARTS + part
    tl.store(
        outputs_ptr + to.to(tl.int64)[:, None] * HEAD_DIM + d[None, :],
        sums / total[:, None],
        mask=is_value,
    )
    tl.store(weights_ptr + to, peak + tl.log2(total), mask=g < GROUP)


@triton.jit
def reduce_kernel(
    outputs_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    out_ptr: tl.tensor,
    out_stride: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_TOKENS_MIN: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.arange(0, PARTS)
    d = tl.arange(0, D)
    length = tl.load(lengths_ptr + row)
    is_part = part < tl.cdiv(length, part_tokens(length, TOKENS, PARTS, PART_TOKENS_MIN))
    at = (row * HEADS + head) * PARTS + part
    weights = tl.load(weights_ptr + at, mask=is_part, other=float("-inf"))
    # A row without a context has no part, and its output is 0.
    peak = tl.where(length > 0, tl.max(weights, axis=0), 0.0)
    weights = tl.exp2(weights - peak)
    is_value = is_part[:, None] & (d < HEAD_DIM)[None, :]
    from_ptr = outputs_ptr + at.to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
    outputs = tl.load(from_ptr, mask=is_value, other=0.0)
    total = tl.maximum(tl.sum(weights, axis=0), 1e-30)
    output = tl.sum(outputs * weights[:, None], axis=0) / total
    out_at = out_ptr + row * out_stride + head * HEAD_DIM + d
    tl.store(out_at, output.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=["blocks_stride"])
def prefill_kernel(
    q_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale: tl.tensor,
    q_stride: tl.tensor,
    blocks_stride: tl.tensor,
    out_stride: tl.tensor,
    layer_at: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    TOKENS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    kv_head = tl.program_id(1)
    segment = tl.load(tiles_ptr + tl.program_id(0) * 2)
    first_row = tl.load(tiles_ptr + tl.program_id(0) * 2 + 1)
    rows = tl.load(segments_ptr + segment * 3 + 1)
    start = tl.load(segments_ptr + segment * 3 + 2)
    m = tl.arange(0, POSITIONS * GROUP_BLOCK)
    d = tl.arange(0, D)
    i = first_row + m // GROUP_BLOCK
    g = m % GROUP_BLOCK
    is_value = ((i < rows) & (g < GROUP))[:, None] & (d < HEAD_DIM)[None, :]
    row = (tl.load(segments_ptr + segment * 3) + i).to(tl.int64)
    head_d = ((kv_head * GROUP + g) * HEAD_DIM)[:, None] + d[None, :]
    q = tl.load(q_ptr + row[:, None] * q_stride + head_d, mask=is_value, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    sums = tl.zeros((POSITIONS * GROUP_BLOCK, D), dtype=tl.float32)
    total = tl.zeros((POSITIONS * GROUP_BLOCK,), dtype=tl.float32)
    peak = tl.full((POSITIONS * GROUP_BLOCK,), float("-inf"), dtype=tl.float32)
    head_at = layer_at + kv_head * (BLOCK_TOKENS * HEAD_DIM)
    table_ptr = blocks_ptr + segment * blocks_stride
    end = start + tl.minimum(rows, first_row + POSITIONS)
    # All queries of the tile see the tokens before its first one.
    seen_by_all = (start + first_row) // TOKENS * TOKENS
    for first in range(0, seen_by_all, TOKENS):
        sums, total, peak = attend(
            q, sums, total, peak, pool_ptr, table_ptr, head_at, first, end, 0,
            scale, KV_HEADS, HEAD_DIM, D, BLOCK_TOKENS, BLOCK_ELEMENTS, TOKENS, False, UPCAST,
        )  # fmt: skip
    for first in range(seen_by_all, end, TOKENS):
        sums, total, peak = attend(
            q, sums, total, peak, pool_ptr, table_ptr, head_at, first, end, start + i,
            scale, KV_HEADS, HEAD_DIM, D, BLOCK_TOKENS, BLOCK_ELEMENTS, TOKENS, True, UPCAST,
        )  # fmt: skip
    out_at = out_ptr + row[:, None] * out_stride + head_d
    tl.store(out_at, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_value)
