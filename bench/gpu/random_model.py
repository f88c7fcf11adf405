"""Models and adapters of random values: on the device, or as files for those who read files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from services.common.adapter_container import (
    DTYPE_BYTES,
    ContainerHeader,
    LayerChunk,
    ModuleEntry,
)
from services.common.base_model import LINEARS, ModelConfig, linear_shapes
from services.common.model_tensors import expected_tensors
from services.worker.engine.linear import Linear, make_linear

_DEVIATION = 0.02
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class RandomWeights:
    """See `WeightSource`."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        return torch.empty(shape, dtype=self._dtype, device=self._device).normal_(std=_DEVIATION)

    def linear(self, parts: Sequence[tuple[str, int]], *, in_features: int, bias: bool) -> Linear:
        assert not bias
        return make_linear(self.get("", (sum(width for _, width in parts), in_features)))


def write_model(folder: Path, config: ModelConfig) -> None:
    """A folder that the engine loads. Values are larger than those of `RandomWeights`."""
    torch.manual_seed(1)
    tensors = {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape) * 0.1
        for name, shape in expected_tensors(config)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": list(config.eos_token_ids),
    }
    (folder / "config.json").write_text(json.dumps(fields))


def adapter_header(config: ModelConfig, rank: int, dtype: torch.dtype) -> ContainerHeader:
    """Of an adapter of every linear. Nobody checks its digests here."""
    kind = _NAMES[dtype]
    modules: list[ModuleEntry] = []
    layers: list[LayerChunk] = []
    at = 0
    for layer in range(config.num_layers):
        first = at
        for module, (inputs, outputs) in linear_shapes(config).items():
            assert module in LINEARS
            modules.append(ModuleEntry(layer, module, rank, 1.0, inputs, outputs, at))
            at += rank * (inputs + outputs) * DTYPE_BYTES[kind]
        layers.append(LayerChunk(layer, first, at - first, ""))
    return ContainerHeader(kind, tuple(modules), tuple(layers), 0, at)


def payload(size_bytes: int, dtype: torch.dtype, *, is_pinned: bool) -> memoryview:
    """Random rows in host memory, for any adapter of so many bytes at most."""
    values = torch.empty(size_bytes // dtype.itemsize, dtype=dtype, pin_memory=is_pinned)
    values.normal_(std=_DEVIATION)
    rows: Any = values.view(torch.uint8).numpy()
    return memoryview(rows)
