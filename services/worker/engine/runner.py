"""The torch engine: sequences and adapters on one device, one ragged forward pass per step.

`step` reads from top to bottom: order the items, form the batch, run the model, draw tokens. A
prompt chunk whose adapter is still arriving passes the layers that are there, by itself; what comes
out of them waits in its sequence for the rest of the layers.

Device memory: on the CPU a KV position is committed when it is first written, so the caller's
account in blocks is what is used. On CUDA the KV cache is allocated whole at start, in slots of the
longest context, so `memory_bytes` limits how many sequences there can be.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from services.common.adapter_container import ContainerHeader
from services.common.base_model import ModelConfig, ModelNotFoundError, load_config, model_identity
from services.worker.engine.api import (
    EngineInfo,
    EngineSettings,
    SampledToken,
    SequenceFailure,
    SequenceSpec,
    StepItem,
)
from services.worker.engine.attention import Attention, Segment
from services.worker.engine.kv import KVCache, bytes_per_token
from services.worker.engine.model import Batch, Model, Weights
from services.worker.engine.sampling import Draw, SamplingRow, sample
from services.worker.lora.cpu import LoraBatch, LoraSegment
from services.worker.lora.outer import AdaptedRows, adapted_rows
from services.worker.lora.stack import AdapterStack
from services.worker.lora.weights import AdapterWeights, Transfer

_DEFAULT_CONTEXT_TOKENS = 2048
_DEFAULT_MEMORY_BYTES = 2 * 2**30


@dataclass(slots=True)
class _Part:
    """A chunk that has passed the first `layers` layers: `hidden` is what came out of them."""

    batch: Batch
    hidden: Tensor
    layers: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.hidden)


@dataclass(slots=True)
class _Sequence:
    """`token_ids` are all known tokens; keys and values of the first `computed` are cached.

    Those of a `part`, which come next, are cached in the layers that it has passed.
    """

    spec: SequenceSpec
    slot: int
    token_ids: list[int] = field(default_factory=list[int])
    computed: int = 0
    part: _Part | None = None

    @property
    def cached(self) -> int:
        """How many positions of its slot were written, in some layers at least."""
        return self.computed + (self.part.num_tokens if self.part else 0)


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
    def reaches_end(self) -> bool:
        return self.sequence.computed + self.num_tokens == len(self.sequence.token_ids)

    @property
    def token_ids(self) -> list[int]:
        first = self.sequence.computed
        return self.sequence.token_ids[first : first + self.num_tokens]


class TorchEngine:
    """See `Engine`."""

    def __init__(
        self, info: EngineInfo, model: Model, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._info = info
        self._model = model
        self._config = model.config
        self._dtype = dtype
        self._device = device
        self._kv = KVCache(
            model.config,
            slots=info.max_sequences,
            positions=info.max_context_tokens,
            dtype=dtype,
            device=device,
        )
        self._stack = AdapterStack(model.config)
        self._adapters: dict[str, AdapterWeights] = {}
        self._transfer = Transfer(device) if device.type == "cuda" else None
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
        del blocks  # the payload is where it stays, or a copy in memory of its own
        assert digest not in self._adapters
        self._adapters[digest] = AdapterWeights(
            header, payload, self._config, dtype=self._dtype, transfer=self._transfer
        )

    def extend_adapter(self, digest: str, layers: int) -> None:
        self._adapters[digest].extend(layers)

    def remove_adapter(self, digest: str) -> None:
        assert all(item.spec.adapter_digest != digest for item in self._sequences.values())
        del self._adapters[digest]
        self._stack.drop(digest)

    def open_sequence(self, spec: SequenceSpec) -> None:
        assert spec.sequence_id not in self._sequences
        assert 0 < len(spec.token_ids) <= self._info.max_context_tokens
        assert spec.adapter_digest is None or spec.adapter_digest in self._adapters
        slot = self._kv.take_slot()
        self._sequences[spec.sequence_id] = _Sequence(spec, slot, list(spec.token_ids))

    def close_sequence(self, sequence_id: str) -> None:
        if sequence := self._sequences.pop(sequence_id, None):
            self._kv.release_slot(sequence.slot, length=sequence.cached)

    @torch.inference_mode()
    def step(self, items: Sequence[StepItem]) -> list[SampledToken | SequenceFailure]:
        chunks = [self._chunk_of(item) for item in items]
        alone = [chunk for chunk in chunks if chunk.is_alone]
        together = sorted((chunk for chunk in chunks if not chunk.is_alone), key=_row_order)
        computed = together + [chunk for chunk in alone if chunk.until_layer is None]
        drawing = [chunk for chunk in computed if chunk.reaches_end]
        hidden = [self._run_together(together)] if together else []
        hidden += [rows for chunk in alone if (rows := self._run_alone(chunk)) is not None]
        for chunk in computed:
            chunk.sequence.computed += chunk.num_tokens
        if not drawing:
            return []
        logits = self._model.head(torch.cat(hidden), self._head_lora(drawing))
        draws = sample(logits, [_sampling_row(chunk.sequence) for chunk in drawing])
        results = {
            chunk.sequence.spec.sequence_id: _advance(chunk.sequence, draw)
            for chunk, draw in zip(drawing, draws, strict=True)
        }
        return [results[item.sequence_id] for item in items if item.sequence_id in results]

    def check_integrity(self) -> None:
        slots = [sequence.slot for sequence in self._sequences.values()]
        assert len(slots) == len(set(slots))
        self._kv.check_integrity(used=set(slots))
        for sequence in self._sequences.values():
            assert sequence.cached <= len(sequence.token_ids)
            part_layers = sequence.part.layers if sequence.part else 0
            assert part_layers <= self._ready_layers(sequence)

    def _chunk_of(self, item: StepItem) -> _Chunk:
        sequence = self._sequences[item.sequence_id]
        assert (item.until_layer or self._config.num_layers) <= self._ready_layers(sequence)
        return _Chunk(sequence, item.num_tokens, item.until_layer)

    def _ready_layers(self, sequence: _Sequence) -> int:
        digest = sequence.spec.adapter_digest
        return self._config.num_layers if digest is None else self._adapters[digest].ready_layers

    def _run_together(self, chunks: Sequence[_Chunk]) -> Tensor:
        """Pass all layers. Returns the rows `[drawing, hidden]` whose next token is wanted."""
        batch = self._form_batch(chunks)
        hidden = self._model.embed(batch)
        self._model.run(hidden, batch, slice(None))
        return hidden[batch.last_rows]

    def _run_alone(self, chunk: _Chunk) -> Tensor | None:
        """Pass the layers that are left or there. Returns the rows that are wanted, at the end."""
        sequence = chunk.sequence
        if sequence.part is None:
            batch = self._form_batch([chunk])
            sequence.part = _Part(batch, self._model.embed(batch))
        part = sequence.part
        assert part.num_tokens == chunk.num_tokens
        assert chunk.until_layer is None or part.layers < chunk.until_layer
        self._model.run(part.hidden, part.batch, slice(part.layers, chunk.until_layer))
        if chunk.until_layer is not None:
            part.layers = chunk.until_layer
            return None
        sequence.part = None
        return part.hidden[part.batch.last_rows]

    def _form_batch(self, chunks: Sequence[_Chunk]) -> Batch:
        """`chunks`: in `_row_order`, or one that runs alone."""
        segments = [Segment(c.sequence.slot, c.sequence.computed, c.num_tokens) for c in chunks]
        lengths = torch.tensor([segment.rows for segment in segments])
        assert all(item.rows > 0 and item.end <= self._kv.positions for item in segments)
        slots = torch.tensor([segment.slot for segment in segments]).repeat_interleave(lengths)
        positions = torch.cat([torch.arange(item.start, item.end) for item in segments])
        ends = lengths.cumsum(0) - 1
        wanted = torch.tensor([chunk.reaches_end for chunk in chunks])
        token_ids = torch.tensor([token_id for chunk in chunks for token_id in chunk.token_ids])
        adapters = _segments_of(chunks)
        return Batch(
            token_ids=token_ids.to(self._device),
            positions=positions.to(self._device),
            last_rows=ends[wanted].to(self._device),
            attention=Attention(
                self._config, self._kv, segments, kv_rows=self._kv.rows_of(slots, positions)
            ),
            lora=self._lora_batch(adapters, is_stackable=not chunks[0].is_alone),
            embedding_lora=self._embedding_lora(adapters),
        )

    def _lora_batch(
        self, segments: Sequence[LoraSegment], *, is_stackable: bool
    ) -> LoraBatch | None:
        if all(segment.digest is None for segment in segments):
            return None
        return LoraBatch(self._stack, segments, self._adapters, is_stackable=is_stackable)

    def _embedding_lora(self, segments: Sequence[LoraSegment]) -> list[AdaptedRows]:
        digests = {s.digest for s in segments if s.digest is not None}
        pairs = {d: pair for d in digests if (pair := self._adapters[d].embedding)}
        return adapted_rows(segments, pairs, device=self._device) if pairs else []

    def _head_lora(self, drawing: Sequence[_Chunk]) -> list[AdaptedRows]:
        """`drawing`: the chunks of the rows that go into the head, in their order."""
        digests = [chunk.sequence.spec.adapter_digest for chunk in drawing]
        pairs = {d: pair for d in set(digests) if d if (pair := self._adapters[d].head)}
        if not pairs:
            return []
        segments = [LoraSegment(digest, slice(row, row + 1)) for row, digest in enumerate(digests)]
        return adapted_rows(segments, pairs, device=self._device)


def build_torch_engine(settings: EngineSettings) -> TorchEngine:
    """Load the model of a folder. Raises BaseModelError and ValueError."""
    if settings.model is None:
        raise ModelNotFoundError("the torch engine needs a model folder")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    config = load_config(settings.model)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    device = torch.device(settings.device)
    info = _describe(settings, settings.model, config, dtype)
    weights = Weights(settings.model, dtype=dtype, device=device)
    model = Model(config, weights, max_positions=info.max_context_tokens, dtype=dtype)
    return TorchEngine(info, model, dtype=dtype, device=device)


def _describe(
    settings: EngineSettings, folder: Path, config: ModelConfig, dtype: torch.dtype
) -> EngineInfo:
    identity = model_identity(folder)
    # Within its sliding window a model attends to everything, which is what is computed here.
    context = min(
        settings.max_context_tokens or _DEFAULT_CONTEXT_TOKENS,
        config.max_positions,
        config.sliding_window or config.max_positions,
    )
    memory_bytes = settings.memory_bytes or _DEFAULT_MEMORY_BYTES
    token_bytes = bytes_per_token(config, dtype)
    sequences = settings.max_sequences
    if settings.device == "cuda":
        sequences = min(sequences, memory_bytes // (token_bytes * context))
    block_bytes = settings.block_tokens * token_bytes
    if sequences < 1 or memory_bytes < block_bytes:
        raise ValueError(f"{memory_bytes} bytes hold no sequence of {context} tokens")
    return EngineInfo(
        description=f"torch {settings.device} {settings.dtype}",
        model_name=identity.name,
        model_digest=identity.digest,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        max_sequences=sequences,
        max_context_tokens=context,
        pool_blocks=memory_bytes // block_bytes,
        block_tokens=settings.block_tokens,
        block_bytes=block_bytes,
        num_layers=config.num_layers,
    )


def _segments_of(chunks: Sequence[_Chunk]) -> list[LoraSegment]:
    segments: list[LoraSegment] = []
    row = 0
    for chunk in chunks:
        end = row + chunk.num_tokens
        segments.append(LoraSegment(chunk.sequence.spec.adapter_digest, slice(row, end)))
        row = end
    return segments


def _row_order(chunk: _Chunk) -> tuple[int, int]:
    """Single rows by slot, then chunks by length: what attention and adapters rely on."""
    return chunk.num_tokens, chunk.sequence.slot


def _sampling_row(sequence: _Sequence) -> SamplingRow:
    return SamplingRow(sequence.spec.sampling, sequence.token_ids, sequence.spec.prompt_tokens)


def _advance(sequence: _Sequence, draw: Draw | None) -> SampledToken | SequenceFailure:
    if draw is None:
        return SequenceFailure(sequence.spec.sequence_id, "the logits are not finite")
    sequence.token_ids.append(draw.token_id)
    return SampledToken(sequence.spec.sequence_id, draw.token_id, draw.logprob, draw.top)
