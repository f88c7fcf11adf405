"""The Llama family on CUDA: torch's matrix products, and Triton kernels for all between them.

The residual stream is fp32, as in `model`. What a linear adds to it is added by the norm that
follows, so a pass under way is two tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)

from services.common.base_model import ModelConfig
from services.common.model_tensors import EMBEDDING, FINAL_NORM, HEAD
from services.worker.engine.cuda_lora import RowsLora
from services.worker.engine.linear import Linear
from services.worker.engine.rotation import rotation_tables
from services.worker.engine.triton_attention import (
    AttentionTuning,
    DecodeScratch,
    PrefillPlan,
    decode_attention,
    prefill_attention,
)
from services.worker.engine.triton_ops import (
    CacheShape,
    HeadRules,
    add_norm,
    finish_gate_up,
    finish_qkv,
)


class WeightSource(Protocol):
    """Weights by name, on the device and in the dtype of the engine. See `model.Weights`."""

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor: ...

    def linear(
        self, parts: Sequence[tuple[str, int]], *, in_features: int, bias: bool
    ) -> Linear: ...


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The first rows: one of each sequence. `blocks [rows, …]`, `lengths [rows]`, int32."""

    blocks: Tensor
    lengths: Tensor
    scratch: DecodeScratch


@dataclass(frozen=True, slots=True)
class PromptRows:
    """The rest: prompts, in segments. `blocks [segments, …]` int32."""

    blocks: Tensor
    plan: PrefillPlan


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that pass the layers together, all int32 `[rows]`. `slots`: see `finish_qkv`."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    decode: DecodeRows | None
    prompts: PromptRows | None
    lora: RowsLora | None


@dataclass(slots=True)
class Residual:
    """The stream `hidden [rows, hidden]` fp32, and what is yet to be added to it, if anything."""

    hidden: Tensor
    added: Tensor | None = None

    def of_rows(self, index: Tensor) -> "Residual":
        added = None if self.added is None else self.added.index_select(0, index)
        return Residual(self.hidden.index_select(0, index), added)


@dataclass(frozen=True, slots=True)
class Scored:
    """Logits `[rows, vocab]` in the model's dtype, and `x [rows, hidden]` that they are made of."""

    logits: Tensor
    x: Tensor

    @staticmethod
    def empty(rows: int, config: ModelConfig, like: Tensor) -> "Scored":
        return Scored(
            like.new_empty((rows, config.vocab_size)), like.new_empty((rows, config.hidden_size))
        )

    def first(self, rows: int) -> "Scored":
        return Scored(self.logits[:rows], self.x[:rows])


class CudaModel:
    """Weights of a base model on a device. A forward pass is `embed`, `run` and `head`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        pool: Tensor,
        *,
        cache: CacheShape,
        tuning: AttentionTuning,
        max_positions: int,
    ) -> None:
        """`pool [elements]`: KV cache and adapters, of the engine's dtype."""
        self.config = config
        self._pool = pool
        self._cache = cache
        self._tuning = tuning
        self._embedding = weights.get(EMBEDDING, (config.vocab_size, config.hidden_size))
        cos, sin = rotation_tables(config, max_positions, pool.device)
        half = config.head_dim // 2
        turns = cos[:, 0, :half].contiguous(), sin[:, 0, half:].contiguous()
        self._layers = [
            _Layer(config, weights, index=index, turns=turns) for index in range(config.num_layers)
        ]
        self._norm = weights.get(FINAL_NORM, (config.hidden_size,)).float()
        self._head = self._embedding
        if not config.tie_embeddings:
            self._head = weights.get(HEAD, (config.vocab_size, config.hidden_size))

    def embed(self, token_ids: Tensor) -> Residual:
        return Residual(F.embedding(token_ids, self._embedding).float())

    def run(self, residual: Residual, rows: Rows, layers: slice) -> None:
        """Pass some layers, from where `residual` is. It is changed in place."""
        for index in range(layers.start, layers.stop):
            self._attend(index, residual, rows)
            self._feed_forward(index, residual, rows.lora)

    def head(self, residual: Residual) -> Scored:
        """Of rows that passed all layers."""
        rows = len(residual.hidden)
        scored = Scored.empty(rows, self.config, self._pool)
        self.head_into(residual, scored)
        return scored

    def head_into(self, residual: Residual, scored: Scored) -> None:
        self._norm_into(residual, self._norm, scored.x)
        torch.mm(scored.x, self._head.t(), out=scored.logits)

    def _attend(self, index: int, residual: Residual, rows: Rows) -> None:
        layer, lora = self._layers[index], rows.lora
        x = self._normed(residual, layer.input_norm)
        if lora is not None:
            lora.begin(x, "qkv", layer=index)
        qkv = layer.qkv(x)
        finish_qkv(
            qkv,
            rows.positions,
            rows.slots,
            self._pool,
            rules=layer.rules,
            cache=self._cache,
            layer=index,
            lora=None if lora is None else lora.end(qkv, x, "qkv", layer=index),
        )
        attended = self._attended(index, qkv, rows)
        if lora is not None:
            lora.begin_residual(attended, residual.hidden, "o", layer=index)
        y = layer.o(attended)
        if lora is not None:
            lora.end_residual(y, attended, "o", layer=index)
        residual.added = y

    def _attended(self, index: int, qkv: Tensor, rows: Rows) -> Tensor:
        """`[rows, heads * head_dim]`"""
        heads, head_dim = self.config.num_heads, self.config.head_dim
        out = qkv.new_empty((len(qkv), heads, head_dim))
        q = qkv[:, : heads * head_dim]
        first = 0
        if rows.decode is not None:
            first = len(rows.decode.lengths)
            decode_attention(
                q[:first],
                self._pool,
                rows.decode.blocks,
                rows.decode.lengths,
                out[:first],
                scratch=rows.decode.scratch,
                cache=self._cache,
                layer=index,
                tuning=self._tuning,
            )
        if rows.prompts is not None:
            prefill_attention(
                q,
                self._pool,
                rows.prompts.blocks,
                rows.prompts.plan,
                out,
                cache=self._cache,
                layer=index,
                tuning=self._tuning,
            )
        return out.view(len(qkv), -1)

    def _feed_forward(self, index: int, residual: Residual, lora: RowsLora | None) -> None:
        layer = self._layers[index]
        x = self._normed(residual, layer.ffn_norm)
        if lora is not None:
            lora.begin(x, "gate_up", layer=index)
        gate_up = layer.gate_up(x)
        fused = None if lora is None else lora.end(gate_up, x, "gate_up", layer=index)
        act = gate_up.new_empty((len(gate_up), self.config.intermediate_size))
        finish_gate_up(gate_up, act, lora=fused)
        if lora is not None:
            lora.begin_residual(act, residual.hidden, "down", layer=index)
        y = layer.down(act)
        if lora is not None:
            lora.end_residual(y, act, "down", layer=index)
        residual.added = y

    def _normed(self, residual: Residual, weight: Tensor) -> Tensor:
        x = torch.empty_like(residual.hidden, dtype=self._pool.dtype)
        self._norm_into(residual, weight, x)
        return x

    def _norm_into(self, residual: Residual, weight: Tensor, x: Tensor) -> None:
        add_norm(residual.hidden, residual.added, weight, x, eps=self.config.rms_norm_eps)
        residual.added = None


class _Layer:
    """The weights of one layer. Norms are fp32."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        *,
        index: int,
        turns: tuple[Tensor, Tensor],
    ) -> None:
        at = f"model.layers.{index}"
        hidden, ffn = config.hidden_size, config.intermediate_size
        q_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.input_norm = weights.get(f"{at}.input_layernorm.weight", (hidden,)).float()
        self.qkv = weights.linear(
            [(f"{at}.self_attn.q_proj", q_width)]
            + [(f"{at}.self_attn.{name}_proj", kv_width) for name in "kv"],
            in_features=hidden,
            bias=config.attention_bias,
        )
        self.o = weights.linear(
            [(f"{at}.self_attn.o_proj", hidden)], in_features=q_width, bias=config.output_bias
        )
        self.ffn_norm = weights.get(f"{at}.post_attention_layernorm.weight", (hidden,)).float()
        self.gate_up = weights.linear(
            [(f"{at}.mlp.{name}_proj", ffn) for name in ("gate", "up")],
            in_features=hidden,
            bias=config.mlp_bias,
        )
        self.down = weights.linear(
            [(f"{at}.mlp.down_proj", hidden)], in_features=ffn, bias=config.mlp_bias
        )
        norms: Tensor | None = None
        if config.qk_norm:
            norms = torch.stack(
                [
                    weights.get(f"{at}.self_attn.{name}_norm.weight", (config.head_dim,)).float()
                    for name in "qk"
                ]
            )
        cos, sin = turns if config.rotates[index] else (None, None)
        self.rules = HeadRules(norms=norms, eps=config.rms_norm_eps, cos=cos, sin=sin)
