"""The Llama family: Llama 2 and 3, Mistral, Qwen 2, 2.5 and 3, as one small forward pass.

All tokens of a step, whatever their sequence, are rows of one matrix `[rows, hidden]`; only
attention and adapters look at whose row is whose. The residual stream is fp32 in every dtype, which
costs nothing and halves the error of bf16. q/k/v and gate/up are one linear each.

Rotation, norms and their order follow the reference implementation (transformers), so that fp32
greedy output equals its output token for token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)

from services.common.base_model import (
    LinearRope,
    Llama3Rope,
    ModelConfig,
    ModelIncompleteError,
    weight_files,
)
from services.worker.engine.attention import Attention
from services.worker.engine.linear import Linear, make_linear
from services.worker.lora.cpu import LoraBatch
from services.worker.lora.outer import AdaptedRows


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that pass the layers together. `last_rows`: whose next token is wanted, maybe none."""

    token_ids: Tensor
    positions: Tensor
    last_rows: Tensor
    attention: Attention
    lora: LoraBatch | None
    embedding_lora: Sequence[AdaptedRows]


class Model:
    """Weights of a base model on a device. A forward pass is `embed`, `run` and `head`."""

    def __init__(
        self, config: ModelConfig, weights: "Weights", *, max_positions: int, dtype: torch.dtype
    ) -> None:
        self.config = config
        embedding = weights.get(
            "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
        )
        self._embedding = embedding
        self._layers = [
            _Layer(config, weights, index=index, dtype=dtype) for index in range(config.num_layers)
        ]
        self._norm = _Norm(config, weights, "model.norm.weight")
        tied = config.tie_embeddings
        self._head = make_linear(
            embedding if tied else weights.get("lm_head.weight", tuple(embedding.shape))
        )
        self._cos, self._sin = rotation_tables(config, max_positions, embedding.device)
        self._dtype = dtype

    def embed(self, batch: Batch) -> Tensor:
        """What goes into the first layer, `[rows, hidden]` fp32."""
        hidden = F.embedding(batch.token_ids, self._embedding).float()
        for adapted in batch.embedding_lora:
            adapted.add_embedding(hidden, batch.token_ids)
        return hidden

    def run(self, hidden: Tensor, batch: Batch, layers: slice) -> None:
        """Pass some layers, from where `hidden [rows, hidden]` is. It is changed in place."""
        rotation = self._cos[batch.positions], self._sin[batch.positions]
        for layer in self._layers[layers]:
            layer(hidden, batch, rotation)

    def head(self, hidden: Tensor, lora: Sequence[AdaptedRows]) -> Tensor:
        """Logits `[rows, vocab]` in the model's dtype of rows that passed all layers."""
        x = self._norm(hidden).to(self._dtype)
        logits = self._head(x)
        for adapted in lora:
            adapted.add_head(logits, x)
        return logits


class _Layer:
    def __init__(
        self, config: ModelConfig, weights: "Weights", *, index: int, dtype: torch.dtype
    ) -> None:
        at = f"model.layers.{index}"
        hidden, ffn = config.hidden_size, config.intermediate_size
        q_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self._index = index
        self._dtype = dtype
        self._input_norm = _Norm(config, weights, f"{at}.input_layernorm.weight")
        self._qkv = weights.linear(
            [(f"{at}.self_attn.q_proj", q_width)]
            + [(f"{at}.self_attn.{name}_proj", kv_width) for name in "kv"],
            in_features=hidden,
            bias=config.attention_bias,
        )
        self._rotate = _Rotation(config, weights, at)
        self._o = weights.linear(
            [(f"{at}.self_attn.o_proj", hidden)], in_features=q_width, bias=config.output_bias
        )
        self._ffn_norm = _Norm(config, weights, f"{at}.post_attention_layernorm.weight")
        self._gate_up = weights.linear(
            [(f"{at}.mlp.{name}_proj", ffn) for name in ("gate", "up")],
            in_features=hidden,
            bias=config.mlp_bias,
        )
        self._down = weights.linear(
            [(f"{at}.mlp.down_proj", hidden)], in_features=ffn, bias=config.mlp_bias
        )
        self._ffn = ffn

    def __call__(self, hidden: Tensor, batch: Batch, rotation: tuple[Tensor, Tensor]) -> None:
        """`hidden [rows, hidden]` fp32, changed in place."""
        x = self._input_norm(hidden).to(self._dtype)
        qkv = self._adapted(self._qkv, "qkv", x, batch)
        self._rotate(qkv, rotation)
        hidden += self._adapted(self._o, "o", batch.attention(self._index, qkv), batch)
        x = self._ffn_norm(hidden).to(self._dtype)
        gate_up = self._adapted(self._gate_up, "gate_up", x, batch)
        x = F.silu(gate_up[:, : self._ffn]).mul_(gate_up[:, self._ffn :])
        hidden += self._adapted(self._down, "down", x, batch)

    def _adapted(self, linear: Linear, group: str, x: Tensor, batch: Batch) -> Tensor:
        y = linear(x)
        if batch.lora is not None:
            batch.lora.add_to(y, x, layer=self._index, group=group)
        return y


class _Norm:
    """RMSNorm, fp32 in and out."""

    def __init__(self, config: ModelConfig, weights: "Weights", name: str) -> None:
        self._weight = weights.get(name, (config.hidden_size,)).float()
        self._eps = config.rms_norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self._weight.shape, self._weight, self._eps)


class _Rotation:
    """Rotary embedding of the q and k heads in place, after their norms where a model has them."""

    def __init__(self, config: ModelConfig, weights: "Weights", at: str) -> None:
        self._heads = config.num_heads + config.num_kv_heads  # q and k; v stays as it is
        self._head_dim = config.head_dim
        self._eps = config.rms_norm_eps
        self._norm: Tensor | None = None
        if config.qk_norm:
            shape = (config.head_dim,)
            q = weights.get(f"{at}.self_attn.q_norm.weight", shape).float()
            k = weights.get(f"{at}.self_attn.k_norm.weight", shape).float()
            self._norm = torch.cat(
                [q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1)]
            )

    def __call__(self, qkv: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
        cos, signed_sin = rotation
        heads = qkv.view(len(qkv), -1, self._head_dim)[:, : self._heads]
        x = heads
        if self._norm is not None:
            x = F.rms_norm(x.float(), (self._head_dim,), None, self._eps) * self._norm
        rotated = x * cos
        rotated.addcmul_(x.roll(self._head_dim // 2, -1), signed_sin)
        heads.copy_(rotated)


def rotation_tables(
    config: ModelConfig, positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine `[positions, 1, head_dim]`: rotated x is x cos + roll(x, d/2) sin."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    frequencies = _scaled(1.0 / config.rope_theta ** (half / config.head_dim), config)
    angles = torch.outer(torch.arange(positions).float(), frequencies).unsqueeze(1)
    cos = torch.cat([angles.cos(), angles.cos()], dim=-1)
    signed_sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)
    return cos.to(device), signed_sin.to(device)


def _scaled(frequencies: Tensor, config: ModelConfig) -> Tensor:
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearRope(factor=factor):
            return frequencies / factor
        case Llama3Rope() as rope:
            return _llama3_frequencies(frequencies, rope)
        case _:
            assert_never(config.rope_scaling)


def _llama3_frequencies(frequencies: Tensor, rope: Llama3Rope) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, a linear blend between."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_positions / wavelengths  # over the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * frequencies / rope.factor + keep * frequencies


class Weights:
    """Tensors of a model folder by name, on the device and in the dtype of the engine."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._file_of: dict[str, Path] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                self._file_of.update(dict.fromkeys(file.keys(), path))

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Raises ModelIncompleteError for a tensor that is missing or of another shape."""
        if name not in self._file_of:
            raise ModelIncompleteError(f"the weights lack {name}")
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelIncompleteError(f"{name} is {tuple(tensor.shape)}, expected {shape}")
        return tensor.to(self._device, self._dtype)

    def linear(self, parts: Sequence[tuple[str, int]], *, in_features: int, bias: bool) -> Linear:
        """One linear of several stacked `(name, out_features)`."""
        weight = torch.cat([self.get(f"{at}.weight", (out, in_features)) for at, out in parts])
        if not bias:
            return make_linear(weight)
        return make_linear(weight, torch.cat([self.get(f"{at}.bias", (n,)) for at, n in parts]))
