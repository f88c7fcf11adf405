"""From the tensors of a model folder to the packed weights of the native step.

Tensor by tensor: a linear is read, packed and dropped before the next one is read, so a model needs
little more memory while it is loaded than afterwards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from services.common.base_model import ModelConfig
from services.worker.engine.model import Weights
from services.worker.engine.rotation import rotation_tables
from services.worker.native.library import Linear, NativeModel, Norm


def load_weights(
    model: NativeModel, config: ModelConfig, weights: Weights, *, max_positions: int
) -> Tensor:
    """Returns the embedding, which must stay. `weights`: in bf16. Raises BaseModelError."""
    embedding = weights.get("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    embedding = embedding.contiguous()
    model.set_embedding(embedding.data_ptr())
    layers = _Layers(model, config, weights)
    for layer in range(config.num_layers):
        layers.load(layer)
    _set_norm(model, (0, Norm.FINAL), weights.get("model.norm.weight", (config.hidden_size,)))
    tied = config.tie_embeddings
    head = embedding if tied else weights.get("lm_head.weight", tuple(embedding.shape))
    _set_linear(model, (0, Linear.HEAD), head, None)
    _set_rotation(model, config, max_positions)
    return embedding


class _Layers:
    def __init__(self, model: NativeModel, config: ModelConfig, weights: Weights) -> None:
        self._model = model
        self._config = config
        self._weights = weights
        # Where linears are stacked: fresh memory for each would leave holes between packed ones.
        self._scratch = torch.empty(0, dtype=torch.bfloat16)

    def load(self, layer: int) -> None:
        config = self._config
        hidden, ffn = config.hidden_size, config.intermediate_size
        q_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        qkv = [("self_attn.q_proj", q_width)]
        qkv += [(f"self_attn.{name}_proj", kv_width) for name in "kv"]
        o, down = [("self_attn.o_proj", hidden)], [("mlp.down_proj", hidden)]
        gate_up = [(f"mlp.{name}_proj", ffn) for name in ("gate", "up")]
        self._model.set_rotates(layer, rotates=config.rotates[layer])
        self._norm((layer, Norm.INPUT), "input_layernorm", hidden)
        self._linear((layer, Linear.QKV), qkv, hidden, has_bias=config.attention_bias)
        if config.qk_norm:
            self._norm((layer, Norm.Q), "self_attn.q_norm", config.head_dim)
            self._norm((layer, Norm.K), "self_attn.k_norm", config.head_dim)
        self._linear((layer, Linear.O), o, q_width, has_bias=config.output_bias)
        self._norm((layer, Norm.FFN), "post_attention_layernorm", hidden)
        self._linear((layer, Linear.GATE_UP), gate_up, hidden, has_bias=config.mlp_bias)
        self._linear((layer, Linear.DOWN), down, ffn, has_bias=config.mlp_bias)

    def _linear(
        self,
        at: tuple[int, Linear],
        parts: Sequence[tuple[str, int]],
        in_features: int,
        *,
        has_bias: bool,
    ) -> None:
        """One linear of several stacked `(name, out_features)`."""
        names = [(f"model.layers.{at[0]}.{name}", out) for name, out in parts]
        weights = [self._weights.get(f"{name}.weight", (out, in_features)) for name, out in names]
        bias: Tensor | None = None
        if has_bias:
            bias = torch.cat([self._weights.get(f"{name}.bias", (out,)) for name, out in names])
        _set_linear(self._model, at, self._stacked(weights), bias)

    def _stacked(self, weights: Sequence[Tensor]) -> Tensor:
        """Overwritten by the next one."""
        if len(weights) == 1:
            return weights[0]
        size = sum(weight.numel() for weight in weights)
        if len(self._scratch) < size:
            self._scratch = torch.empty(size, dtype=torch.bfloat16)
        shape = (sum(len(weight) for weight in weights), weights[0].shape[1])
        return torch.cat(list(weights), out=self._scratch[:size].view(shape))

    def _norm(self, at: tuple[int, Norm], name: str, size: int) -> None:
        weight = self._weights.get(f"model.layers.{at[0]}.{name}.weight", (size,))
        _set_norm(self._model, at, weight)


def _set_linear(
    model: NativeModel, at: tuple[int, Linear], weight: Tensor, bias: Tensor | None
) -> None:
    rows = weight.contiguous()
    assert rows.dtype == torch.bfloat16
    terms = None if bias is None else bias.float().contiguous()
    model.set_linear(
        at,
        rows.data_ptr(),
        (rows.shape[0], rows.shape[1]),
        bias=None if terms is None else terms.data_ptr(),
    )


def _set_norm(model: NativeModel, at: tuple[int, Norm], weight: Tensor) -> None:
    values = weight.float().contiguous()
    model.set_norm(at, values.data_ptr(), len(values))


def _set_rotation(model: NativeModel, config: ModelConfig, max_positions: int) -> None:
    """The library turns halves of a head, so it needs each angle once."""
    cos, signed_sin = rotation_tables(config, max_positions, torch.device("cpu"))
    half = config.head_dim // 2
    cosines = cos[:, 0, :half].contiguous()
    sines = signed_sin[:, 0, half:].contiguous()
    model.set_rotation(cosines.data_ptr(), sines.data_ptr())
