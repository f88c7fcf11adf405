"""Adapters of a wanted size for the base model, published through the store as anybody would."""

import json
import struct
from pathlib import Path
from typing import Any, Final

import numpy as np

from calumma.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from services.cli.adapters import FILES, PUBLISH_TIMEOUT_S, publish_requests
from services.common.base_model import ModelConfig, linear_shapes

_DTYPE_BYTES: Final = 2
_ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")


def rank_of(size_bytes: int, config: ModelConfig) -> int:
    """The rank with which a bf16 adapter of all linears has about so many bytes."""
    ins_and_outs = sum(sum(shape) for shape in linear_shapes(config).values())
    return max(1, round(size_bytes / (ins_and_outs * config.num_layers * _DTYPE_BYTES)))


def publish(
    store: "adapter_store_pb2_grpc.AdapterStoreServiceStub", folder: Path, name: str
) -> tuple[str, int]:
    """Publish a folder. Returns the digest and the size in bytes of its blob."""
    metadata = adapter_store_pb2.PublishMetadata(name=name)
    requests = publish_requests(folder, metadata, on_sent=lambda _: None)
    ref = store.Publish(requests, timeout=PUBLISH_TIMEOUT_S).version.ref
    return ref.digest, ref.size_bytes


def write_adapter(folder: Path, config: ModelConfig, *, rank: int, seed: int) -> None:
    """A PEFT folder with small random weights in every linear."""
    generator = np.random.default_rng(seed)
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    offset = 0
    for name, shape in _tensors(config, rank):
        data = _small_numbers(generator, shape[0] * shape[1])
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
        parts.append(data)
    folder.mkdir(parents=True, exist_ok=True)
    config_file, weights_file = FILES
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(linear_shapes(config)),
        "bias": "none",
    }
    (folder / config_file).write_text(json.dumps(fields), encoding="utf-8")
    text = json.dumps(header).encode()
    with (folder / weights_file).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(parts)


def _tensors(config: ModelConfig, rank: int) -> list[tuple[str, tuple[int, int]]]:
    """Names and shapes as PEFT saves them."""
    tensors: list[tuple[str, tuple[int, int]]] = []
    for layer in range(config.num_layers):
        for module, (in_features, out_features) in linear_shapes(config).items():
            block = "self_attn" if module in _ATTENTION else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            tensors.append((f"{name}.lora_A.weight", (rank, in_features)))
            tensors.append((f"{name}.lora_B.weight", (out_features, rank)))
    return tensors


def _small_numbers(generator: np.random.Generator, count: int) -> bytes:
    """So many bf16 numbers of either sign, between 2^-9 and 2^-7."""
    bits = generator.integers(0, 2**16, count, dtype=np.uint16)
    return ((bits & 0x80FF) | 0x3B00).astype("<u2").tobytes()
