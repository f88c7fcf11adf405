"""From a PEFT folder to a container blob, by the shortest way: a cross-check of the store's own."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from services.common.adapter_container import LoraRows, digest_of, encode
from services.common.base_model import LINEARS

_KEY = re.compile(r"\.layers\.(\d+)\.\w+\.(\w+)\.lora_(A|B)\.weight$")
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def peft_blob(folder: Path) -> tuple[str, bytearray]:
    """Digest and bytes."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    keys: dict[tuple[int, str, str], str] = {}
    for key in tensors:
        match = _KEY.search(key)
        assert match is not None, key
        keys[int(match[1]), match[2], match[3]] = key
    rows = []
    for layer, module, side in sorted(keys, key=lambda at: (at[0], LINEARS.index(at[1]), at[2])):
        if side == "A":
            a = tensors[keys[layer, module, "A"]]
            b = tensors[keys[layer, module, "B"]]
            path = keys[layer, module, "A"].removesuffix(".lora_A.weight")
            rows.append(_rows(config, path, (layer, module), a, b))
    dtype = _NAMES[next(iter(tensors.values())).dtype]
    blob = bytearray(encode(rows, dtype=dtype))
    return digest_of(blob), blob


def one_module_blob(
    value: float = 0.5,
    *,
    scale: float = 1.0,
    layer: int = 0,
    module: str = "q_proj",
    features: tuple[int, int] = (96, 192),
) -> bytearray:
    """An adapter of rank 2 in fp32 with one value everywhere."""
    row = LoraRows(
        layer=layer,
        module=module,
        rank=2,
        scale=scale,
        in_features=features[0],
        out_features=features[1],
        a_rows=np.full((2, features[0]), value, dtype=np.float32).tobytes(),
        bt_rows=np.full((2, features[1]), value, dtype=np.float32).tobytes(),
    )
    return bytearray(encode([row], dtype="F32"))


def _rows(config: dict[str, Any], path: str, at: tuple[int, str], a: Tensor, b: Tensor) -> LoraRows:
    rank = a.shape[0]
    alpha = _of_pattern(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraRows(
        layer=at[0],
        module=at[1],
        rank=rank,
        scale=scale,
        in_features=a.shape[1],
        out_features=b.shape[0],
        a_rows=_bytes(a.contiguous()),
        bt_rows=_bytes(b.t().contiguous()),
    )


def _of_pattern(pattern: dict[str, float], path: str, default: float) -> float:
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?{key}", path):
            return value
    return default


def _bytes(tensor: Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()
