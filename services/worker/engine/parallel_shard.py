"""What one of several devices holds of a model: whose heads, whose rows and columns of each linear.

As in Megatron-LM (Shoeybi et al. 2019, section 3) and, for adapters, S-LoRA (Sheng et al. 2023,
section 6): q, k, v, gate and up are split by outputs, o and down by inputs, so that the first of
two linears needs no communication and the second one sum. Each shard has its own heads, and so its
own part of the KV cache. Norms and the embedding are whole everywhere: of the embedding a step
reads only its tokens' rows, and a split one would cost one more sum. The head is read whole by
every step, so it is split by tokens; its logits are gathered where they are sampled.

A bias behind a sum is added once: shard 0 has it, the others have zeros.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from torch import Tensor

from services.common.base_model import ModelConfig
from services.common.model_tensors import HEAD

Side = Literal["outputs", "inputs"]

# By which side each linear of a layer is split.
SPLITS: Final[Mapping[str, Side]] = {
    "q_proj": "outputs",
    "k_proj": "outputs",
    "v_proj": "outputs",
    "o_proj": "inputs",
    "gate_proj": "outputs",
    "up_proj": "outputs",
    "down_proj": "inputs",
}
SHARDS_MAX: Final = 16


class ShardingError(ValueError):
    """The model can't be split over so many devices; the message says what does not divide."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` equal parts of a model. Number 0 is in the worker's process."""

    index: int
    count: int

    def part(self, size: int) -> slice:
        """Its range of `size` things. Ranges differ by one at most, and cover all of them."""
        return slice(size * self.index // self.count, size * (self.index + 1) // self.count)

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The shape of this part of a model: a model with fewer heads and a smaller FFN.

        Raises ShardingError.
        """
        check_divides(whole, self.count)
        return replace(
            whole,
            num_heads=whole.num_heads // self.count,
            num_kv_heads=whole.num_kv_heads // self.count,
            intermediate_size=whole.intermediate_size // self.count,
        )

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """This shard's part of a model's tensor, by its name in the model folder."""
        if name == HEAD:
            return tensor[self.part(len(tensor))]
        module, _, kind = name.rpartition(".")
        side = SPLITS.get(module.rpartition(".")[2])
        if side is None:
            return tensor
        if side == "outputs":
            return tensor[self.part(len(tensor))]
        if kind == "weight":
            return tensor[:, self.part(tensor.shape[1])]
        return tensor if self.index == 0 else tensor.new_zeros(tensor.shape)


def part_of(shard: Shard | None, size: int) -> slice:
    """A shard's range of `size` things; all of them where there is one device only."""
    return slice(0, size) if shard is None else shard.part(size)


def check_divides(config: ModelConfig, count: int) -> None:
    """Raises ShardingError, which names what can't be split evenly."""
    if not 2 <= count <= SHARDS_MAX:
        raise ShardingError(f"{count} shards; 2 to {SHARDS_MAX} are supported")
    sizes = {
        "attention heads": config.num_heads,
        "key/value heads": config.num_kv_heads,
        "rows of the feed-forward network": config.intermediate_size,
    }
    for what, size in sizes.items():
        if size % count:
            raise ShardingError(
                f"{size} {what} can't be split evenly over {count} shards; "
                f"supported: numbers that divide {_list(sizes)}"
            )


def _list(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{size} {what}" for what, size in sizes.items())
