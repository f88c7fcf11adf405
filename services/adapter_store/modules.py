"""The modules of a base model that an adapter can be for, and what PEFT calls their tensors.

In the order of a forward pass, which is the order of the blob: the embedding, the linears of each
layer, the output head. PEFT writes a linear's pair as `lora_A.weight` `[rank, in]` and
`lora_B.weight` `[out, rank]`. An embedding's has no `.weight`, and is of the same shapes when a
token is taken for a one-hot vector of the vocabulary: `lora_embedding_A` `[rank, vocabulary]`,
`lora_embedding_B` `[hidden, rank]`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from services.common.adapter_container import EMBEDDING, EMBEDDING_LAYER, HEAD
from services.common.base_model import LINEARS, ModelConfig, linear_shapes, outer_shapes

PREFIX: Final = "base_model.model."  # of every tensor's name
EMBEDDING_PATH: Final = f"model.{EMBEDDING}"
_ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")

Side = Literal["A", "B"]


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the base model. `layer`: as in the blob, so -1 for the embedding."""

    layer: int
    name: str  # "q_proj"
    path: str  # "model.layers.0.self_attn.q_proj"
    in_features: int
    out_features: int

    def tensor_name(self, side: Side) -> str:
        """What PEFT calls the tensor of one side."""
        kind = f"lora_embedding_{side}" if self.name == EMBEDDING else f"lora_{side}.weight"
        return f"{PREFIX}{self.path}.{kind}"


def modules_of(model: ModelConfig) -> Iterator[Module]:
    """Embedding, layers, output head; in a layer q, k, v, o, gate, up, down."""
    outer, shapes = outer_shapes(model), linear_shapes(model)
    yield Module(EMBEDDING_LAYER, EMBEDDING, EMBEDDING_PATH, *outer[EMBEDDING])
    for layer in range(model.num_layers):
        for name in LINEARS:
            block = "self_attn" if name in _ATTENTION else "mlp"
            yield Module(layer, name, f"model.layers.{layer}.{block}.{name}", *shapes[name])
    yield Module(model.num_layers, HEAD, HEAD, *outer[HEAD])
