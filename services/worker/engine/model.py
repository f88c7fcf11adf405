"""The Llama family: Llama 2 and 3, Mistral, Qwen 2 to 3, SmolLM 2 and 3, as one forward pass.

All tokens of a step, whatever their sequence, are rows of one matrix `[rows, hidden]`; only
attention and adapters look at whose row is whose. The residual stream is fp32 in every dtype, which
costs nothing and halves the error of bf16. q/k/v and gate/up are one linear each.

Rotation, norms and their order follow the reference implementation (transformers), so that fp32
greedy output equals its output token for token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)

from services.common.base_model import (
    ModelConfig,
    ModelIncompleteError,
    UnsupportedModelError,
    load_config,
)
from services.common.model_tensors import EMBEDDING, FINAL_NORM, HEAD, checked_tensors
from services.worker.engine.attention import Attention
from services.worker.engine.linear import Linear, make_linear
from services.worker.engine.parallel_group import ShardGroup
from services.worker.engine.parallel_shard import Shard, part_of
from services.worker.engine.rotation import rotation_tables
from services.worker.engine.sizing import check_weights_fit, host_bytes_available, weights_bytes
from services.worker.lora.cpu import LoraBatch
from services.worker.lora.outer import AdaptedRows


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that pass the layers together."""

    token_ids: Tensor
    positions: Tensor
    attention: Attention
    lora: LoraBatch | None
    embedding_lora: Sequence[AdaptedRows]


class Model:
    """Weights of a base model on a device. A forward pass is `embed`, `run` and `head`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: "Weights",
        *,
        max_positions: int,
        dtype: torch.dtype,
        group: ShardGroup | None = None,
    ) -> None:
        """`group`: where `config` and `weights` are a shard's, see `parallel_shard`."""
        self.config = config
        self._group = group
        embedding = weights.get(EMBEDDING, (config.vocab_size, config.hidden_size))
        self._embedding = embedding
        self._layers = [
            _Layer(config, weights, index=index, dtype=dtype, group=group)
            for index in range(config.num_layers)
        ]
        self._norm = _Norm(config, weights, FINAL_NORM)
        self._vocab = part_of(None if group is None else group.shard, config.vocab_size)
        head_shape = (self._vocab.stop - self._vocab.start, config.hidden_size)
        tied = config.tie_embeddings
        self._head = make_linear(embedding[self._vocab] if tied else weights.get(HEAD, head_shape))
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
        """Logits `[rows, vocab]` in the model's dtype of rows that passed all layers.

        Of several shards the first one gets them; each other one has those of its own tokens.
        """
        x = self._norm(hidden).to(self._dtype)
        logits = self._head(x)
        for adapted in lora:
            adapted.add_head(logits, x, self._vocab)
        return logits if self._group is None else self._group.gather(logits, self.config.vocab_size)


class _Layer:
    def __init__(
        self,
        config: ModelConfig,
        weights: "Weights",
        *,
        index: int,
        dtype: torch.dtype,
        group: ShardGroup | None,
    ) -> None:
        at = f"model.layers.{index}"
        hidden, ffn = config.hidden_size, config.intermediate_size
        q_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self._index = index
        self._dtype = dtype
        self._group = group
        self._input_norm = _Norm(config, weights, f"{at}.input_layernorm.weight")
        self._qkv = weights.linear(
            [(f"{at}.self_attn.q_proj", q_width)]
            + [(f"{at}.self_attn.{name}_proj", kv_width) for name in "kv"],
            in_features=hidden,
            bias=config.attention_bias,
        )
        self._rotate = _Rotation(config, weights, at, is_rotating=config.rotates[index])
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
        attended = batch.attention(self._index, qkv)
        hidden += self._summed(self._adapted(self._o, "o", attended, batch))
        x = self._ffn_norm(hidden).to(self._dtype)
        gate_up = self._adapted(self._gate_up, "gate_up", x, batch)
        x = F.silu(gate_up[:, : self._ffn]).mul_(gate_up[:, self._ffn :])
        hidden += self._summed(self._adapted(self._down, "down", x, batch))

    def _adapted(self, linear: Linear, group: str, x: Tensor, batch: Batch) -> Tensor:
        y = linear(x)
        if batch.lora is not None:
            batch.lora.add_to(y, x, layer=self._index, group=group)
        return y

    def _summed(self, y: Tensor) -> Tensor:
        """Of a linear whose inputs are split over shards, adapters and all: the sum over them."""
        return y if self._group is None else self._group.sum(y)


class _Norm:
    """RMSNorm, fp32 in and out."""

    def __init__(self, config: ModelConfig, weights: "Weights", name: str) -> None:
        self._weight = weights.get(name, (config.hidden_size,)).float()
        self._eps = config.rms_norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self._weight.shape, self._weight, self._eps)


class _Rotation:
    """Rotary embedding of the q and k heads in place, after their norms where a model has them.

    Some layers of some models do not rotate.
    """

    def __init__(
        self, config: ModelConfig, weights: "Weights", at: str, *, is_rotating: bool
    ) -> None:
        self._is_rotating = is_rotating
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
        if self._norm is None and not self._is_rotating:
            return
        heads = qkv.view(len(qkv), -1, self._head_dim)[:, : self._heads]
        x = heads
        if self._norm is not None:
            x = F.rms_norm(x.float(), (self._head_dim,), None, self._eps) * self._norm
        if self._is_rotating:
            cos, signed_sin = rotation
            x = torch.addcmul(x * cos, x.roll(self._head_dim // 2, -1), signed_sin)
        heads.copy_(x)


class Weights:
    """Tensors of a model folder by name, on the device and in the dtype of the engine.

    Raises BaseModelError when they are not those of the folder's configuration, and
    EngineMemoryError when there is no room for them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard | None = None,
    ) -> None:
        """`shard`: what is cut out of each tensor; shapes are those of its configuration then."""
        self._dtype = dtype
        self._device = device
        self._shard = shard
        config = load_config(folder)
        self._tensors = checked_tensors(folder, config)
        held = config if shard is None else shard.config(config)
        check_weights_fit(weights_bytes(held, dtype.itemsize), _bytes_available(device))
        if config.tie_embeddings and HEAD in self._tensors:
            self._check_tied_head()

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Raises ModelIncompleteError for a tensor that is missing, or that has other values.

        Those are a shape that is not `shape`, and values that the dtype has no finite number for.
        """
        tensor = self._read(name)
        if self._shard is not None:
            tensor = self._shard.cut(name, tensor)
        if tuple(tensor.shape) != shape:
            raise ModelIncompleteError(f"{name} is {tuple(tensor.shape)}, expected {shape}")
        tensor = tensor.to(self._device, self._dtype)
        if not _is_finite(tensor):
            raise ModelIncompleteError(f"{name} has values that are not finite in {self._dtype}")
        return tensor

    def linear(self, parts: Sequence[tuple[str, int]], *, in_features: int, bias: bool) -> Linear:
        """One linear of several stacked `(name, out_features)`."""
        weight = torch.cat([self.get(f"{at}.weight", (out, in_features)) for at, out in parts])
        if not bias:
            return make_linear(weight)
        return make_linear(weight, torch.cat([self.get(f"{at}.bias", (n,)) for at, n in parts]))

    def _read(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ModelIncompleteError(f"the weights lack {name}")
        path = self._tensors[name].path
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelIncompleteError(f"{path} cannot be read: {error}") from error
        return tensor

    def _check_tied_head(self) -> None:
        """Some checkpoints repeat the embedding as the head that is tied to it."""
        if not torch.equal(self._read(HEAD), self._read(EMBEDDING)):
            raise UnsupportedModelError(
                f"{HEAD} differs from {EMBEDDING}, which tie_word_embeddings says that it is"
            )


def _bytes_available(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_bytes_available()


def _is_finite(tensor: Tensor) -> bool:
    """One pass over memory, at 3 to 4 GB/s on two cores; `isfinite` takes thirty times as long."""
    return all(bool(value.isfinite()) for value in torch.aminmax(tensor))
