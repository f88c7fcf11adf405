"""A simulated engine that gives its sequences blocks itself, for tests that call it directly."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count, islice

from services.worker.engine import SampledToken, SequenceFailure, StepItem
from services.worker.engine.simulated import SimulatedEngine


class OwnBlocks(SimulatedEngine):
    """Every block is given away once."""

    _next_block = 0

    def step(self, items: Sequence[StepItem]) -> list[SampledToken | SequenceFailure]:
        results = super().step([self._with_blocks(item) for item in items])
        self.check_integrity()
        return results

    def _with_blocks(self, item: StepItem) -> StepItem:
        sequence, block_tokens = self._sequences[item.sequence_id], self._info.block_tokens
        end = sequence.computed + item.num_tokens
        missing = max(0, -(-end // block_tokens) - len(sequence.blocks))
        new_blocks = tuple(islice(count(self._next_block), missing))
        self._next_block += missing
        return replace(item, new_blocks=new_blocks)
