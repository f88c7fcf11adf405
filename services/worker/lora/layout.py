"""What an adapter's rows mean to the engine: which linears they adapt, checked against the model.

A module's pair is A `[rank, in]` and Bᵀ `[rank, out]`, one row per rank in both, and a scale.
Adapted linears share their input in groups: q/k/v and gate/up. The engine has one linear per group.
The embedding comes before the layers and the output head behind them; each has one pair.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from services.common.adapter_container import EMBEDDING, EMBEDDING_LAYER, HEAD, ContainerHeader
from services.common.base_model import ModelConfig, linear_shapes, outer_shapes
from services.worker.engine.api import AdapterIncompatibleError

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True, slots=True)
class LoraPair:
    """`a [rank, in]`, `bt [rank, out]`: what is added to a row x is `scale * x aᵀ bt`."""

    a: Tensor
    bt: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def check_fits(header: ContainerHeader, config: ModelConfig) -> None:
    """Raises AdapterIncompatibleError, which names the first module that the model has not."""
    seen: set[tuple[int, str]] = set()
    shapes = {chunk.layer: _shapes(chunk.layer, config) for chunk in header.layers}
    for entry in header.modules:
        at = f"layer {entry.layer} {entry.module}"
        shape = shapes[entry.layer].get(entry.module)
        if shape is None:
            raise AdapterIncompatibleError(f"{at} is not in the base model")
        if (entry.in_features, entry.out_features) != shape:
            raise AdapterIncompatibleError(
                f"{at} is {entry.in_features} to {entry.out_features},"
                f" the base model's is {shape[0]} to {shape[1]}"
            )
        if (entry.layer, entry.module) in seen:
            raise AdapterIncompatibleError(f"{at} is given twice")
        seen.add((entry.layer, entry.module))


def _shapes(layer: int, config: ModelConfig) -> dict[str, tuple[int, int]]:
    """`(in_features, out_features)` of what adapters may target there, by module."""
    outer = outer_shapes(config)
    if layer == EMBEDDING_LAYER:
        return {EMBEDDING: outer[EMBEDDING]}
    if layer == config.num_layers:
        return {HEAD: outer[HEAD]}
    return linear_shapes(config) if layer < config.num_layers else {}


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
