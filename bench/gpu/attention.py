"""Attention of a whole model's decoding step: paged, against torch on contexts that lie dense.

Torch's has less to do: no block table, and no copy of the contexts is counted.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)

from bench.gpu.ceilings import Ceilings
from bench.gpu.extent import Extent
from bench.gpu.timing import Work, by_turns
from bench.report import Row
from services.worker.engine.triton_attention import (
    DecodeScratch,
    attention_tuning,
    decode_attention,
)
from services.worker.engine.triton_ops import CacheShape

_BLOCK_TOKENS = 16
_CAPABILITY = 90  # without a GPU


def measure(extent: Extent, ceilings: Ceilings, is_time_left: Callable[[], bool]) -> list[Row]:
    """All numbers of rows and lengths of contexts that there is time for."""
    rows: list[Row] = []
    for context in extent.contexts:
        for batch in extent.rows:
            if not is_time_left():
                rows.append(_row(batch, context, "skipped: no time was left"))
                continue
            try:
                rows += _one(extent, ceilings, batch, context)
            except torch.OutOfMemoryError:
                rows.append(_row(batch, context, "skipped: no memory was left"))
    return rows


def _row(batch: int, context: int, variant: str, **values: float) -> Row:
    empty = dict.fromkeys(("ms", "share_of_bandwidth", "error", "spread"))
    return {"rows": batch, "context": context, "attention": variant, **(empty | values)}


def _one(extent: Extent, ceilings: Ceilings, batch: int, context: int) -> list[Row]:
    config = extent.large
    cache = CacheShape(config.num_layers, config.num_kv_heads, _BLOCK_TOKENS, config.head_dim)
    per_row = -(-context // _BLOCK_TOKENS)
    options: dict[str, Any] = {"dtype": extent.dtype, "device": extent.device}
    pool = torch.empty(batch * per_row * cache.block_elements, **options).normal_()
    order = torch.randperm(batch * per_row, generator=torch.Generator().manual_seed(3))
    table = order.view(batch, per_row).int().to(extent.device)
    q = torch.empty((batch, config.num_heads * config.head_dim), **options).normal_()
    lengths = torch.full((batch,), context, dtype=torch.int32, device=extent.device)
    out = torch.empty((batch, config.num_heads, config.head_dim), **options)
    scratch = DecodeScratch.empty(batch, config.num_heads, config.head_dim, extent.device)
    capability = torch.cuda.get_device_capability()[0] * 10 if extent.is_gpu else _CAPABILITY
    tuning = attention_tuning(capability, config.head_dim)

    def ours_in(layer: int) -> None:
        decode_attention(
            q, pool, table, lengths, out, scratch=scratch, cache=cache, layer=layer, tuning=tuning
        )

    keys, values = _gathered(pool, table, cache, context)

    def dense_in(layer: int) -> Tensor:
        queries = q.view(batch, config.num_heads, 1, config.head_dim)
        return F.scaled_dot_product_attention(queries, keys[layer], values[layer], enable_gqa=True)

    works: dict[str, Work] = {
        "ours, paged": _all_layers(ours_in, config.num_layers),
        "torch, dense": _all_layers(dense_in, config.num_layers),
    }
    times = by_turns(works, extent)
    ours_in(0)
    error = float((out.float() - dense_in(0).view(out.shape).float()).abs().max())
    floor_s = 2 * keys.nbytes / ceilings.memory_bytes_s
    return [
        _row(
            batch,
            context,
            name,
            ms=taken.median_s * 1e3,
            share_of_bandwidth=floor_s / taken.median_s,
            error=error,
            spread=taken.spread,
        )
        for name, taken in times.items()
    ]


def _gathered(
    pool: Tensor, table: Tensor, cache: CacheShape, context: int
) -> tuple[Tensor, Tensor]:
    """Keys and values `[layers, rows, kv_heads, context, head_dim]`."""
    shape = (-1, cache.layers, 2, cache.kv_heads, cache.block_tokens, cache.head_dim)
    blocks = pool.view(shape)[table.long()]  # [rows, blocks, layers, 2, heads, tokens, dim]
    dense = blocks.permute(3, 2, 0, 4, 1, 5, 6).flatten(4, 5)[..., :context, :]
    return dense[0].contiguous(), dense[1].contiguous()


def _all_layers(in_layer: Callable[[int], object], layers: int) -> Work:
    def work() -> None:
        for layer in range(layers):
            in_layer(layer)

    return work
