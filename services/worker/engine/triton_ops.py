"""The kernels between the linears of a layer: norms, rotation, cache writes, SiLU.

The residual stream is fp32. A layer is

    x = add_norm(hidden, what the layer before added)     one kernel
    qkv = x Wᵀ;  finish_qkv: + LoRA, norms of heads, rotation, keys and values into the cache
    attention;   y = its output times Wᵀ;  x = add_norm(hidden, y)
    gate_up = x Wᵀ;  finish_gate_up: + LoRA, SiLU of gate times up
    y = its output times Wᵀ

With a `LoraStep`, what `shrink` left in its planes is expanded where the values are in registers
anyway. Rows then come in the order of the work list, base rows last.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from services.common.base_model import LINEARS
from services.worker.engine.triton_ops_kernels import (
    add_norm_kernel,
    finish_gate_up_kernel,
    finish_qkv_kernel,
)
from services.worker.engine.triton_support import launch, power_of_two
from services.worker.lora.triton_lora import LinearGroup, LoraStep

_PLAIN_TILE_ROWS = 16  # rows that a program takes without a work list
_FFN_COLUMNS = 128
_PROGRAMS_MAX = 132 * 8  # as many as a large GPU runs at once; each takes several tasks if need be


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Keys and values within a block: `[layers, 2, kv_heads, block_tokens, head_dim]`."""

    layers: int
    kv_heads: int
    block_tokens: int
    head_dim: int

    @property
    def head_elements(self) -> int:
        """Keys, or values, of one head in one layer."""
        return self.block_tokens * self.head_dim

    @property
    def block_elements(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_elements

    def layer_at(self, layer: int) -> int:
        """Where the keys of a layer begin in a block; its values follow them."""
        return layer * 2 * self.kv_heads * self.head_elements


@dataclass(frozen=True, slots=True)
class HeadRules:
    """What is done to heads of q and k. `norms [2, head_dim]` fp32: q's and k's weights, or None.

    `cos`, `sin [positions, head_dim / 2]` fp32: a head (a, b), in halves, becomes
    (a cos - b sin, b cos + a sin). None in layers that do not rotate.
    """

    norms: Tensor | None
    eps: float
    cos: Tensor | None
    sin: Tensor | None


@dataclass(frozen=True, slots=True)
class GroupLora:
    """The adapters of a step in one group of one layer, after `shrink`."""

    step: LoraStep
    group: LinearGroup
    layer: int

    @property
    def place(self) -> int:
        return self.layer * len(LINEARS) + self.group.first


def add_norm(
    hidden: Tensor, added: Tensor | None, weight: Tensor, out: Tensor, *, eps: float
) -> None:
    """`hidden [rows, width]` fp32 += `added`, then `out` = RMSNorm of it times `weight` fp32."""
    rows, width = hidden.shape
    launch(
        add_norm_kernel,
        (rows,),
        hidden,
        added if added is not None else hidden,
        weight,
        out,
        hidden.stride(0),
        added.stride(0) if added is not None else 0,
        out.stride(0),
        eps,
        **add_norm_constants(width, has_added=added is not None),
    )


def add_norm_constants(width: int, *, has_added: bool) -> dict[str, Any]:
    block = power_of_two(width)
    return {
        "WIDTH": width,
        "BLOCK": block,
        "HAS_ADDED": has_added,
        "num_warps": max(1, min(16, block // 512)),
    }


def finish_qkv(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    pool: Tensor,
    *,
    rules: HeadRules,
    cache: CacheShape,
    layer: int,
    lora: GroupLora | None = None,
) -> None:
    """Finish q in place, and write k and v into the cache.

    `qkv [rows, (heads + 2 kv_heads) * head_dim]`; `positions [rows]` int32; `slots [rows]` int32:
    block * block_tokens + place in the block, or -1 for a row that is not kept.
    """
    heads = qkv.shape[1] // cache.head_dim - 2 * cache.kv_heads
    constants = qkv_constants(heads, cache, rules, lora)
    tiles = _tiles_max(len(qkv), lora)
    step = lora.step if lora is not None else None
    launch(
        finish_qkv_kernel,
        (min(_PROGRAMS_MAX, tiles * (heads + 2 * cache.kv_heads)),),
        qkv,
        positions,
        slots,
        pool,
        rules.norms if rules.norms is not None else qkv,
        rules.cos if rules.cos is not None else qkv,
        rules.sin if rules.sin is not None else qkv,
        step.tables if step is not None else slots,
        step.work if step is not None else slots,
        step.planes if step is not None else slots,
        len(qkv),
        qkv.stride(0),
        rules.eps,
        cache.layer_at(layer),
        step.plane_elements(lora.group) if step is not None and lora is not None else 0,
        step.shape.tiles_at if step is not None else 0,
        lora.place if lora is not None else 0,
        **constants,
        num_warps=finish_warps(lora),
        num_stages=2,
    )


def qkv_constants(
    heads: int, cache: CacheShape, rules: HeadRules, lora: GroupLora | None
) -> dict[str, Any]:
    half = cache.head_dim // 2
    return {
        "HEADS": heads,
        "KV_HEADS": cache.kv_heads,
        "HALF": half,
        "HALF_BLOCK": max(16, power_of_two(half)),
        "BLOCK_TOKENS": cache.block_tokens,
        "BLOCK_ELEMENTS": cache.block_elements,
        "HAS_NORM": rules.norms is not None,
        "ROTATES": rules.cos is not None,
        **_lora_constants(lora),
    }


def finish_gate_up(gate_up: Tensor, out: Tensor, *, lora: GroupLora | None = None) -> None:
    """`out [rows, ffn]` = SiLU(gate) * up, of `gate_up [rows, 2 * ffn]`."""
    constants = gate_up_constants(out.shape[1], lora)
    step = lora.step if lora is not None else None
    launch(
        finish_gate_up_kernel,
        (min(_PROGRAMS_MAX, _tiles_max(len(out), lora) * constants["TILES"]),),
        gate_up,
        out,
        step.pool if step is not None else gate_up,
        step.tables if step is not None else gate_up,
        step.work if step is not None else gate_up,
        step.planes if step is not None else gate_up,
        len(out),
        gate_up.stride(0),
        out.stride(0),
        step.plane_elements(lora.group) if step is not None and lora is not None else 0,
        step.shape.tiles_at if step is not None else 0,
        lora.place if lora is not None else 0,
        **constants,
        num_warps=finish_warps(lora),
        num_stages=2,
    )


def gate_up_constants(ffn: int, lora: GroupLora | None) -> dict[str, Any]:
    columns = min(_FFN_COLUMNS, max(16, power_of_two(ffn)))
    return {
        "FFN": ffn,
        "COLUMNS": columns,
        "TILES": -(-ffn // columns),
        **_lora_constants(lora),
    }


def finish_warps(lora: GroupLora | None) -> int:
    return 4 if lora is None else lora.step.tuning.expand_warps


def _lora_constants(lora: GroupLora | None) -> dict[str, Any]:
    if lora is None:
        return {"HAS_LORA": False, "SPLITS": 1, "M": _PLAIN_TILE_ROWS}
    return {
        "HAS_LORA": True,
        "SPLITS": lora.step.tuning.splits,
        "M": lora.step.tuning.tile_rows,
    }


def _tiles_max(rows: int, lora: GroupLora | None) -> int:
    return -(-rows // _PLAIN_TILE_ROWS) if lora is None else lora.step.shape.rows
