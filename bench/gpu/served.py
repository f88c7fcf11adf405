"""An engine with the owner of its blocks, for sequences that decode together."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.common.adapter_container import ContainerHeader
from services.worker.engine.api import SampledToken, Sampling, SequenceSpec, StepItem
from services.worker.engine.runner import ModelEngine


@dataclass(slots=True)
class Served:
    """Blocks are given away from the last one on, so that none are in order."""

    engine: ModelEngine
    free: list[int] = field(default_factory=list[int])
    held: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    lengths: dict[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        self.free = list(range(self.engine.info.pool_blocks))

    def add_adapter(self, digest: str, header: ContainerHeader, payload: memoryview) -> None:
        self.begin_adapter(digest, header, payload)
        self.engine.extend_adapter(digest, self.engine.info.num_layers)

    def begin_adapter(self, digest: str, header: ContainerHeader, payload: memoryview) -> None:
        count = -(-header.payload_bytes // self.engine.info.block_bytes)
        self.held[digest] = self._take(count)
        part = payload[: header.payload_bytes]
        self.engine.begin_adapter(digest, header, part, blocks=tuple(self.held[digest]))

    def remove_adapter(self, digest: str) -> None:
        self.engine.remove_adapter(digest)
        self.free += self.held.pop(digest)

    def open(
        self, count: int, prompt_tokens: int, adapters: Sequence[str | None], sampling: Sampling
    ) -> list[SampledToken]:
        """Compute the prompts of `count` sequences, their adapters by turns."""
        items: list[StepItem] = []
        vocab = self.engine.info.vocab_size
        for index in range(count):
            name = f"s{index}"
            prompt = tuple((7 * i + index) % vocab for i in range(prompt_tokens))
            digest = adapters[index % len(adapters)]
            self.engine.open_sequence(
                SequenceSpec(name, prompt, prompt_tokens, digest, sampling, 10**6)
            )
            self.lengths[name] = 0
            self.held[name] = []
            items.append(self._item(name, prompt_tokens))
        return [one for item in items for one in self._step([item])]

    def decode(self) -> list[SampledToken]:
        return self._step([self._item(name, 1) for name in self.lengths])

    def close_all(self) -> None:
        for name in list(self.lengths):
            self.engine.close_sequence(name)
            self.free += self.held.pop(name)
            del self.lengths[name]

    def _step(self, items: list[StepItem]) -> list[SampledToken]:
        results = self.engine.step(items)
        drawn = [one for one in results if isinstance(one, SampledToken)]
        assert len(drawn) == len(items), results
        return drawn

    def _item(self, name: str, tokens: int) -> StepItem:
        self.lengths[name] += tokens
        needed = -(-self.lengths[name] // self.engine.info.block_tokens) - len(self.held[name])
        new = self._take(needed)
        self.held[name] += new
        return StepItem(name, tokens, new_blocks=tuple(new))

    def _take(self, count: int) -> list[int]:
        if count > len(self.free):
            raise MemoryError(f"{count} blocks are wanted, {len(self.free)} are free")
        return [self.free.pop() for _ in range(count)]
