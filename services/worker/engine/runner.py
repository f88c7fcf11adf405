"""The engine with a model: sequences, one ragged forward pass per step, and sampling.

`step` reads from top to bottom: order the items, form passes, run the executor, draw tokens. What
computes, and where, is the executor's (`services.worker.engine.executor`).

A prompt chunk whose adapter is still arriving passes the layers that are there in a pass of its
own, which waits in its sequence for the rest of the layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from services.common.adapter_container import ContainerHeader
from services.worker.engine.api import (
    EngineInfo,
    SampledToken,
    SequenceFailure,
    SequenceSpec,
    StepItem,
)
from services.worker.engine.executor import Executor, Ints, Pass, Segment
from services.worker.engine.sampling import Draw, SamplingRow


@dataclass(slots=True)
class _Sequence:
    """`token_ids` are all known tokens; keys and values of the first `computed` are cached.

    Those of a `part`, a pass under way, come next; they are cached in the layers that it passed.
    """

    spec: SequenceSpec
    token_ids: list[int]
    blocks: list[int]
    computed: int
    part: Pass | None = field(default=None)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A step item with its sequence."""

    sequence: _Sequence
    num_tokens: int
    until_layer: int | None

    @property
    def is_alone(self) -> bool:
        return self.until_layer is not None or self.sequence.part is not None

    @property
    def end(self) -> int:
        return self.sequence.computed + self.num_tokens

    @property
    def reaches_end(self) -> bool:
        return self.end == len(self.sequence.token_ids)

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.token_ids[self.sequence.computed : self.end]


class ModelEngine:
    """See `Engine`."""

    def __init__(self, info: EngineInfo, executor: Executor) -> None:
        self._info = info
        self._executor = executor
        self._sequences: dict[str, _Sequence] = {}

    @property
    def info(self) -> EngineInfo:
        return self._info

    def begin_adapter(
        self,
        digest: str,
        header: ContainerHeader,
        payload: memoryview,
        *,
        blocks: tuple[int, ...] = (),
    ) -> None:
        self._executor.begin_adapter(digest, header, payload, blocks)

    def extend_adapter(self, digest: str, layers: int) -> None:
        self._executor.extend_adapter(digest, layers)

    def remove_adapter(self, digest: str) -> None:
        assert all(item.spec.adapter_digest != digest for item in self._sequences.values())
        self._executor.remove_adapter(digest)

    def open_sequence(self, spec: SequenceSpec) -> None:
        assert spec.sequence_id not in self._sequences
        assert len(self._sequences) < self._info.max_sequences
        assert 0 < len(spec.token_ids) <= self._info.max_context_tokens
        assert spec.computed_tokens == len(spec.blocks) * self._info.block_tokens
        assert spec.computed_tokens < len(spec.token_ids)
        if spec.adapter_digest is not None:
            self._executor.ready_layers(spec.adapter_digest)  # it must be known
        self._sequences[spec.sequence_id] = _Sequence(
            spec, list(spec.token_ids), list(spec.blocks), spec.computed_tokens
        )

    def close_sequence(self, sequence_id: str) -> None:
        self._sequences.pop(sequence_id, None)

    def step(self, items: Sequence[StepItem]) -> list[SampledToken | SequenceFailure]:
        chunks = [self._chunk_of(item) for item in items]
        together = sorted((chunk for chunk in chunks if not chunk.is_alone), key=_row_order)
        alone = [chunk for chunk in chunks if chunk.is_alone]
        passes = [_form_pass(together)] if together else []
        passes += [chunk.sequence.part or _form_pass([chunk]) for chunk in alone]
        last = self._info.num_layers
        until = [last] * bool(together) + [self._until(chunk) for chunk in alone]
        scores = self._executor.run(passes, until)

        for chunk, part in zip(alone, passes[bool(together) :], strict=True):
            chunk.sequence.part = None if chunk.until_layer is None else part
        computed = together + [chunk for chunk in alone if chunk.until_layer is None]
        drawing = [chunk for chunk in computed if chunk.reaches_end]
        for chunk in computed:
            chunk.sequence.computed += chunk.num_tokens
        if scores is None:
            return []
        draws = scores.draw([_sampling_row(chunk.sequence) for chunk in drawing])
        results = {
            chunk.sequence.spec.sequence_id: _advance(chunk.sequence, draw)
            for chunk, draw in zip(drawing, draws, strict=True)
        }
        return [results[item.sequence_id] for item in items if item.sequence_id in results]

    def check_integrity(self) -> None:
        """Assert that sequences agree with their blocks, and write to blocks of their own only."""
        block_tokens = self._info.block_tokens
        holders: dict[int, int] = {}
        for sequence in self._sequences.values():
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            assert all(0 <= block < self._info.pool_blocks for block in sequence.blocks)
            for block in sequence.blocks:
                holders[block] = holders.get(block, 0) + 1
        for sequence in self._sequences.values():
            part = sequence.part
            cached = sequence.computed + (part.num_rows if part else 0)
            assert cached <= len(sequence.token_ids)
            assert cached <= len(sequence.blocks) * block_tokens
            unfinished = sequence.blocks[sequence.computed // block_tokens :]
            assert all(holders[block] == 1 for block in unfinished)
            assert part is None or part.layers <= self._ready_layers(sequence)

    def _chunk_of(self, item: StepItem) -> _Chunk:
        sequence = self._sequences[item.sequence_id]
        if item.new_blocks:
            sequence.blocks.extend(item.new_blocks)
            self._executor.clear_blocks(item.new_blocks)
        chunk = _Chunk(sequence, item.num_tokens, item.until_layer)
        assert 0 < item.num_tokens <= len(sequence.token_ids) - sequence.computed
        assert chunk.end <= len(sequence.blocks) * self._info.block_tokens
        assert (item.until_layer or self._info.num_layers) <= self._ready_layers(sequence)
        part = sequence.part
        assert part is None or part.num_rows == item.num_tokens
        assert part is None or part.layers <= self._until(chunk)
        return chunk

    def _until(self, chunk: _Chunk) -> int:
        """The last layer is left to the item that ends the pass: the head belongs to it."""
        last = self._info.num_layers
        return last if chunk.until_layer is None else min(chunk.until_layer, last - 1)

    def _ready_layers(self, sequence: _Sequence) -> int:
        digest = sequence.spec.adapter_digest
        return self._info.num_layers if digest is None else self._executor.ready_layers(digest)


def _form_pass(chunks: Sequence[_Chunk]) -> Pass:
    """`chunks`: in `_row_order`, or one that runs alone."""
    segments = tuple(
        Segment(
            chunk.sequence.spec.adapter_digest,
            chunk.sequence.computed,
            chunk.num_tokens,
            chunk.sequence.blocks,
        )
        for chunk in chunks
    )
    ends = np.cumsum([segment.rows for segment in segments]) - 1
    wanted = ends[[chunk.reaches_end for chunk in chunks]]
    return Pass(
        segments=segments,
        token_ids=_ints([token_id for chunk in chunks for token_id in chunk.token_ids]),
        positions=_ints([p for segment in segments for p in range(segment.start, segment.end)]),
        wanted=_ints(wanted),
    )


def _ints(values: object) -> Ints:
    return np.asarray(values, dtype=np.int32)


def _row_order(chunk: _Chunk) -> tuple[int, int]:
    """Single rows by the length of their contexts, then chunks: what executors rely on."""
    return chunk.num_tokens, chunk.end


def _sampling_row(sequence: _Sequence) -> SamplingRow:
    return SamplingRow(sequence.spec.sampling, sequence.token_ids, sequence.spec.prompt_tokens)


def _advance(sequence: _Sequence, draw: Draw | None) -> SampledToken | SequenceFailure:
    if draw is None:
        return SequenceFailure(sequence.spec.sequence_id, "the logits are not finite")
    sequence.token_ids.append(draw.token_id)
    return SampledToken(sequence.spec.sequence_id, draw.token_id, draw.logprob, draw.top)
