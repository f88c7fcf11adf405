"""Safetensors files of zeros, written from names, types and shapes alone."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.common.base_model import ModelConfig
from services.common.model_tensors import expected_tensors

Tensors = dict[str, tuple[str, tuple[int, ...]]]
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "F8_E4M3": 1, "U8": 1}


def tensors_of(config: ModelConfig) -> Tensors:
    """Type and shape of each tensor of a model, by name."""
    return {name: ("BF16", shape) for name, shape in expected_tensors(config)}


def file_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def write_file(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    path.write_bytes(file_bytes(tensors))
