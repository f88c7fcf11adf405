"""Small PEFT adapter folders with random weights, written with numpy alone.

The layout is the one PEFT saves: adapter_config.json and adapter_model.safetensors. `read_tensors`
is an independent reader, for tests that compute what an adapter should do.
"""

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
OUTER = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class LoraPair:
    """What was written for one module, as float32: A `[rank, in]`, B `[out, rank]`."""

    path: str  # "model.layers.0.self_attn.q_proj"
    rank: int
    scale: float
    a: Array
    b: Array

    @property
    def delta(self) -> Array:
        """What PEFT adds to the weight, `[out, in]`."""
        return np.float32(self.scale) * (self.b @ self.a)


def write_peft_folder(
    path: Path,
    *,
    shapes: Mapping[str, tuple[int, int]],
    num_layers: int,
    rank: int = 8,
    alpha: float = 16,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    dtype: str = "BF16",
    seed: int = 0,
    base_model: str = "",
    config: Mapping[str, Any] | None = None,
) -> list[LoraPair]:
    """Write an adapter for every layer. `shapes`: module to (in_features, out_features).

    "embed_tokens" and "lm_head" are once in a model, whatever `num_layers` is.
    `config` adds fields to adapter_config.json. Returns the pairs as written, rounded to `dtype`.
    """
    generator = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    pairs: list[LoraPair] = []
    for name, module in _paths(target_modules, num_layers):
        in_features, out_features = shapes[module]
        r = _of(rank_pattern, name, rank)
        scale = _of(alpha_pattern, name, alpha) / (math.sqrt(r) if use_rslora else r)
        a = to_bits(generator.normal(0, 0.1, (r, in_features)), dtype)
        b = to_bits(generator.normal(0, 0.1, (out_features, r)), dtype)
        kind = "lora_embedding_{}" if module == "embed_tokens" else "lora_{}.weight"
        tensors[f"base_model.model.{name}.{kind.format('A')}"] = a
        tensors[f"base_model.model.{name}.{kind.format('B')}"] = b
        pairs.append(LoraPair(name, r, scale, from_bits(a, dtype), from_bits(b, dtype)))
    path.mkdir(parents=True, exist_ok=True)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "target_modules": list(target_modules),
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": dict(alpha_pattern or {}),
        "use_rslora": use_rslora,
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        **(config or {}),
    }
    (path / CONFIG_FILE).write_text(json.dumps(fields), encoding="utf-8")
    (path / WEIGHTS_FILE).write_bytes(safetensors_bytes(tensors, dtype))
    return pairs


def safetensors_bytes(tensors: Mapping[str, Array], dtype: str) -> bytes:
    """A safetensors file of these bit patterns, in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, bits in tensors.items():
        end = offset + bits.nbytes
        header[name] = {"dtype": dtype, "shape": list(bits.shape), "data_offsets": [offset, end]}
        offset = end
    return with_header(header, b"".join(bits.tobytes() for bits in tensors.values()))


def with_header(header: Mapping[str, Any] | bytes, data: bytes) -> bytes:
    """A safetensors file with this header, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def read_tensors(data: bytes) -> dict[str, Array]:
    """Bit patterns by name of a well-formed file."""
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors: dict[str, Array] = {}
    for name, entry in header.items():
        begin, end = (8 + size + position for position in entry["data_offsets"])
        width = np.uint32 if entry["dtype"] == "F32" else np.uint16
        tensors[name] = np.frombuffer(data[begin:end], dtype=width).reshape(entry["shape"])
    return tensors


def to_bits(values: Array, dtype: str) -> Array:
    """Bit patterns of `values` rounded to "BF16", "F16" or "F32"."""
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    if dtype == "F32":
        return bits
    rounding = ((bits >> 16) & 1) + np.uint32(0x7FFF)  # to nearest, ties to even
    return ((bits + rounding) >> 16).astype(np.uint16)


def from_bits(bits: Array, dtype: str) -> Array:
    """The float32 values of bit patterns."""
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    if dtype == "F32":
        return bits.view(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _paths(target_modules: Sequence[str], num_layers: int) -> Iterator[tuple[str, str]]:
    """Path and name of each module."""
    for layer in range(num_layers):
        for module in target_modules:
            if module not in OUTER:
                block = "self_attn" if module in ATTENTION else "mlp"
                yield f"model.layers.{layer}.{block}.{module}", module
    yield from ((OUTER[module], module) for module in target_modules if module in OUTER)


def _of(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def write_tiny_model(folder: Path, *, num_layers: int = 2) -> dict[str, tuple[int, int]]:
    """A base model's config.json, too small to be useful. Returns the shapes of its linears."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return {
        "q_proj": (32, 32),
        "k_proj": (32, 16),
        "v_proj": (32, 16),
        "o_proj": (32, 32),
        "gate_proj": (32, 48),
        "up_proj": (32, 48),
        "down_proj": (48, 32),
    }
