"""An adapter on the device: views into the blob it came in, checked against the base model.

A module's pair is A `[rank, in]` and Bᵀ `[rank, out]`, one row per rank in both. The scale is
folded into Bᵀ in the compute dtype; that copies Bᵀ unless the scale is 1, and A is never copied
unless the dtype changes or the device is not the host.

Adapted linears share their input in groups: q/k/v and gate/up. The engine has one linear per group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from services.common.adapter_container import (
    ContainerError,
    ContainerHeader,
    ModuleEntry,
    read_header,
)
from services.common.base_model import ModelConfig, linear_shapes
from services.worker.engine.api import AdapterIncompatibleError

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class LoraPair:
    """`a [rank, in]`, `bt [rank, out]` with the scale folded in."""

    a: Tensor
    bt: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """One adapter. `layers[layer]` has a pair for each adapted module."""

    layers: tuple[Mapping[str, LoraPair], ...]
    rank: int  # the largest


def load_adapter(
    blob: bytes | bytearray | memoryview,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> AdapterWeights:
    """Read a container blob. Keeps a writable blob alive. Raises AdapterIncompatibleError."""
    header = _checked_header(blob, config)
    payload = _payload(blob, header).to(device)
    if not bool(torch.isfinite(payload.sum(dtype=torch.float32))):
        raise AdapterIncompatibleError("the weights are not finite")
    payload = payload.to(dtype)
    layers: list[dict[str, LoraPair]] = [{} for _ in range(config.num_layers)]
    for entry in header.modules:
        layers[entry.layer][entry.module] = _pair(payload, entry, header.dtype)
    return AdapterWeights(tuple(layers), header.rank)


def _checked_header(blob: bytes | bytearray | memoryview, config: ModelConfig) -> ContainerHeader:
    try:
        header = read_header(blob)
    except ContainerError as error:
        raise AdapterIncompatibleError(str(error)) from error
    if len(blob) != header.total_bytes:
        raise AdapterIncompatibleError(f"{len(blob)} bytes, expected {header.total_bytes}")
    shapes = linear_shapes(config)
    seen: set[tuple[int, str]] = set()
    for entry in header.modules:
        at = f"layer {entry.layer} {entry.module}"
        if not 0 <= entry.layer < config.num_layers or entry.module not in shapes:
            raise AdapterIncompatibleError(f"{at} is not in the base model")
        if (entry.in_features, entry.out_features) != shapes[entry.module]:
            raise AdapterIncompatibleError(
                f"{at} is {entry.in_features} to {entry.out_features},"
                f" the base model's is {shapes[entry.module][0]} to {shapes[entry.module][1]}"
            )
        if (entry.layer, entry.module) in seen:
            raise AdapterIncompatibleError(f"{at} is given twice")
        seen.add((entry.layer, entry.module))
    return header


def _payload(blob: bytes | bytearray | memoryview, header: ContainerHeader) -> Tensor:
    # torch refuses to promise that nobody writes to read-only memory, so that is copied.
    buffer = bytearray(blob) if memoryview(blob).readonly else blob
    raw = np.frombuffer(buffer, dtype=np.uint8, offset=header.payload_offset)
    return torch.from_numpy(raw).view(_DTYPES[header.dtype])


def _pair(payload: Tensor, entry: ModuleEntry, stored_dtype: str) -> LoraPair:
    start = entry.offset // _DTYPES[stored_dtype].itemsize
    middle = start + entry.rank * entry.in_features
    end = middle + entry.rank * entry.out_features
    a = payload[start:middle].view(entry.rank, entry.in_features)
    bt = payload[middle:end].view(entry.rank, entry.out_features)
    return LoraPair(a, bt if entry.scale == 1.0 else bt * entry.scale)


def output_slices(config: ModelConfig) -> dict[str, slice]:
    """Columns of each module in the output of its group's linear."""
    shapes = linear_shapes(config)
    slices: dict[str, slice] = {}
    for modules in GROUPS.values():
        first = 0
        for module in modules:
            slices[module] = slice(first, first + shapes[module][1])
            first += shapes[module][1]
    return slices
