"""Attention over the paged cache on CUDA.

Rows of sequences that decode are one query each. `decode_attention` takes the query heads that
share a KV head together, cuts the context into parts so that few sequences still fill the device,
and adds the parts up in their order. How a context is cut depends on its length alone, read on the
device: a captured graph replays with other lengths, and a row's result does not depend on others.

Rows of prompts go through `prefill_attention`, tile by tile: some positions of one sequence with
all query heads of a KV head, causal over the whole context, part of which was there before.

A key or value behind the end of a context is never read, so blocks may hold anything there.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from services.worker.engine.triton_attention_kernels import (
    decode_kernel,
    prefill_kernel,
    reduce_kernel,
)
from services.worker.engine.triton_ops import CacheShape
from services.worker.engine.triton_support import launch, power_of_two

_DOT_MIN = 16  # the smallest side of a product on tensor cores
_LOG2_E: Final = 1.4426950408889634
PARTS: Final = 16  # of a context, at most
PART_TOKENS_MIN: Final = 128  # of a part: less is not worth a program


@dataclass(frozen=True, slots=True)
class AttentionTuning:
    """How the kernels are cut."""

    decode_tokens: int = 64  # of the context, at a time
    decode_warps: int = 4
    decode_stages: int = 3
    prefill_rows: int = 64  # positions times query heads of a KV head
    prefill_tokens: int = 64
    prefill_warps: int = 4
    prefill_stages: int = 2


def attention_tuning(capability: int, head_dim: int) -> AttentionTuning:
    """What suits a compute capability (80, 90, 100); it was not measured.

    Tiles are as large as registers allow. Before 90 these also hold the operands of products, and
    heads that are no power of two need masks.
    """
    if head_dim > 128:
        return AttentionTuning(decode_tokens=32, prefill_tokens=32, prefill_warps=8)
    if power_of_two(head_dim) > head_dim:
        return AttentionTuning(prefill_tokens=32, prefill_warps=8)
    if capability >= 100:
        return AttentionTuning(prefill_warps=8)
    return AttentionTuning() if capability >= 90 else AttentionTuning(prefill_tokens=32)


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """Room for the parts of `rows` contexts, fp32."""

    outputs: Tensor  # [rows, heads, PARTS, head_dim]
    weights: Tensor  # [rows, heads, PARTS]: log2 of the sum of exponents

    @staticmethod
    def empty(rows: int, heads: int, head_dim: int, device: torch.device) -> "DecodeScratch":
        options: Any = {"dtype": torch.float32, "device": device}
        return DecodeScratch(
            torch.empty((rows, heads, PARTS, head_dim), **options),
            torch.empty((rows, heads, PARTS), **options),
        )


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Prompt rows of a step on the device, all int32.

    `segments [n, 3]`: first row, rows, position of the first row. `tiles [m, 2]`: segment, and
    which of its rows comes first, a multiple of `prefill_positions`.
    """

    segments: Tensor
    tiles: Tensor


def prefill_positions(heads: int, cache: CacheShape, tuning: AttentionTuning) -> int:
    """Positions of a tile."""
    group = power_of_two(heads // cache.kv_heads)
    return max(_DOT_MIN, tuning.prefill_rows, group) // group


def prefill_tiles(rows: np.ndarray[Any, np.dtype[np.int32]], positions: int) -> Any:
    """Tiles `[m, 2]` int32 of segments of so many rows, the long ones of each segment first."""
    counts = -(-rows // positions)
    segment = np.repeat(np.arange(len(rows)), counts)
    place = np.repeat(np.cumsum(counts), counts) - 1 - np.arange(len(segment))
    return np.stack([segment, place * positions], axis=1).astype(np.int32)


def decode_attention(
    q: Tensor,
    pool: Tensor,
    blocks: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    scratch: DecodeScratch,
    cache: CacheShape,
    layer: int,
    tuning: AttentionTuning,
) -> None:
    """`out [rows, heads, head_dim]`: attention of one query per context.

    `q [rows, heads * head_dim]`, with any stride between rows; `blocks [rows, …]` int32: where each
    context lies; `lengths [rows]` int32: its tokens, the query's own included. Zeros for length 0.
    """
    rows, heads, head_dim = out.shape
    assert head_dim == cache.head_dim
    assert heads % cache.kv_heads == 0
    launch(
        decode_kernel,
        (rows, cache.kv_heads, PARTS),
        q,
        pool,
        blocks,
        lengths,
        scratch.outputs,
        scratch.weights,
        head_dim**-0.5 * _LOG2_E,
        q.stride(0),
        blocks.stride(0),
        cache.layer_at(layer),
        **decode_constants(heads, cache, tuning),
        num_warps=tuning.decode_warps,
        num_stages=tuning.decode_stages,
    )
    launch(
        reduce_kernel,
        (rows, heads),
        scratch.outputs,
        scratch.weights,
        lengths,
        out,
        out.stride(0),
        **reduce_constants(heads, cache, tuning),
        num_warps=2,
    )


def decode_constants(heads: int, cache: CacheShape, tuning: AttentionTuning) -> dict[str, Any]:
    return {
        **_cache_constants(heads, cache),
        "M": max(_DOT_MIN, power_of_two(heads // cache.kv_heads)),
        "TOKENS": tuning.decode_tokens,
        "PARTS": PARTS,
        "PART_TOKENS_MIN": PART_TOKENS_MIN,
    }


def reduce_constants(heads: int, cache: CacheShape, tuning: AttentionTuning) -> dict[str, Any]:
    return {
        "HEADS": heads,
        "HEAD_DIM": cache.head_dim,
        "D": power_of_two(cache.head_dim),
        "TOKENS": tuning.decode_tokens,
        "PARTS": PARTS,
        "PART_TOKENS_MIN": PART_TOKENS_MIN,
    }


def prefill_attention(
    q: Tensor,
    pool: Tensor,
    blocks: Tensor,
    plan: PrefillPlan,
    out: Tensor,
    *,
    cache: CacheShape,
    layer: int,
    tuning: AttentionTuning,
) -> None:
    """`out [rows, heads, head_dim]`: causal attention of prompt rows, each over its context.

    `q [rows, heads * head_dim]`, with any stride between rows; `blocks [segments, …]` int32.
    """
    _, heads, head_dim = out.shape
    assert head_dim == cache.head_dim
    assert heads % cache.kv_heads == 0
    launch(
        prefill_kernel,
        (len(plan.tiles), cache.kv_heads),
        q,
        pool,
        blocks,
        plan.segments,
        plan.tiles,
        out,
        head_dim**-0.5 * _LOG2_E,
        q.stride(0),
        blocks.stride(0),
        out.stride(0),
        cache.layer_at(layer),
        **prefill_constants(heads, cache, tuning),
        num_warps=tuning.prefill_warps,
        num_stages=tuning.prefill_stages,
    )


def prefill_constants(heads: int, cache: CacheShape, tuning: AttentionTuning) -> dict[str, Any]:
    return {
        **_cache_constants(heads, cache),
        "GROUP_BLOCK": power_of_two(heads // cache.kv_heads),
        "POSITIONS": prefill_positions(heads, cache, tuning),
        "TOKENS": tuning.prefill_tokens,
    }


def _cache_constants(heads: int, cache: CacheShape) -> dict[str, Any]:
    return {
        "KV_HEADS": cache.kv_heads,
        "GROUP": heads // cache.kv_heads,
        "HEAD_DIM": cache.head_dim,
        "D": max(_DOT_MIN, power_of_two(cache.head_dim)),
        "BLOCK_TOKENS": cache.block_tokens,
        "BLOCK_ELEMENTS": cache.block_elements,
    }
