"""The forward pass as one call of compiled code, on the CPU in bfloat16. See `Executor`.

What is computed for a row has the same bits whatever its batch mates are, in how many chunks its
context was computed, and with how many threads.

Weights are held once, packed; the embedding is read where its file is mapped. Adapters are read
where the worker's host memory has them. Logits are written only for rows whose sampling looks at
more than the best: the head is run once more for those, unless the last step had such rows too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from services.common.adapter_container import EMBEDDING_LAYER, ContainerHeader
from services.common.base_model import ModelConfig
from services.worker.engine.api import EngineInfo
from services.worker.engine.executor import Ints, Pass
from services.worker.engine.model import Weights
from services.worker.engine.native_memory import BlockMemory
from services.worker.engine.native_weights import load_weights
from services.worker.engine.sampling import Draw, SamplingRow, needs_all_scores, sample
from services.worker.lora.layout import LoraPair
from services.worker.lora.weights import AdapterWeights
from services.worker.native.library import (
    Library,
    ModelShape,
    Module,
    NativeAdapter,
    NativeModel,
    PassRows,
    ScoreRows,
)

Floats = NDArray[np.float32]

_LOGIT_BYTES_MAX: Final = 2**26  # of rows that are drawn together
SEGMENT: Final = np.dtype(  # `SegmentRows`, for many at once
    [("start", np.int32), ("rows", np.int32), ("blocks", np.uint64), ("adapter", np.uint64)]
)


class NativeExecutor:
    """See `Executor`."""

    def __init__(
        self, library: Library, config: ModelConfig, info: EngineInfo, *, threads: int
    ) -> None:
        """Without weights yet. Raises NativeError for shapes that it does not compute."""
        self._config = config
        self._info = info
        self._isa, self._threads = library.isa, threads
        self._model = NativeModel(library, _shape_of(config, info, threads=threads))
        self._memory = BlockMemory(info.pool_blocks, info.block_bytes)
        self._model.set_cache(self._memory.address, info.pool_blocks)
        self._adapters: dict[str, _Adapter] = {}
        self._embedding: torch.Tensor | None = None
        self._hidden = np.empty((0, config.hidden_size), dtype=np.float32)
        self._logits = np.empty((0, config.vocab_size), dtype=np.float32)
        self._expects_logits = False

    def load(self, weights: Weights) -> None:
        """`weights`: in bf16. Raises BaseModelError."""
        self._embedding = load_weights(
            self._model, self._config, weights, max_positions=self._info.max_context_tokens
        )

    @property
    def description(self) -> str:
        return f"native cpu bfloat16 {self._isa}, {self._threads} threads"

    def begin_adapter(
        self, digest: str, header: ContainerHeader, payload: memoryview, blocks: Sequence[int]
    ) -> None:
        assert digest not in self._adapters
        weights = AdapterWeights(header, payload, self._config, dtype=torch.bfloat16)
        self._adapters[digest] = _Adapter(weights, self._model.open_adapter())
        self._memory.give_back(blocks)

    def extend_adapter(self, digest: str, layers: int) -> None:
        self._adapters[digest].extend(layers)

    def remove_adapter(self, digest: str) -> None:
        del self._adapters[digest]

    def ready_layers(self, digest: str) -> int:
        return self._adapters[digest].ready_layers

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        used = self._memory.use(blocks)
        self._model.clear_blocks(used.ctypes.data, len(used))

    def run(self, passes: Sequence[Pass], until_layers: Sequence[int]) -> "NativeScores | None":
        last = self._config.num_layers
        hidden = self._hidden_of(passes, until_layers)
        calls = [
            self._call(rows, until, values)
            for rows, until, values in zip(passes, until_layers, hidden, strict=True)
        ]
        wanted = [
            _Wanted(rows, values)
            for rows, until, values in zip(passes, until_layers, hidden, strict=True)
            if until == last and len(rows.wanted)
        ]
        count = sum(len(part.rows.wanted) for part in wanted)
        with_logits = self._expects_logits and count <= self.head_rows_max
        best = self._compute(calls, count, with_logits=with_logits)
        for rows, until, values in zip(passes, until_layers, hidden, strict=True):
            rows.layers = until
            rows.state = None if until == last else values
        return NativeScores(self, best, wanted) if wanted else None

    def head(self, hidden: Floats, digests: Sequence[str | None]) -> "_Best":
        """Logits of rows `[rows, hidden]` that have passed all layers, the same bits as in `run`.

        They are overwritten by the next call.
        """
        last, count = self._config.num_layers, len(hidden)
        table = np.zeros(count, dtype=SEGMENT)
        blocks, wanted = np.zeros(1, dtype=np.int32), np.arange(count, dtype=np.int32)
        table["rows"], table["blocks"] = 1, blocks.ctypes.data
        table["adapter"] = self._handles(digests)
        rows = PassRows(
            rows=count,
            segments=count,
            segment=table.ctypes.data,
            first_layer=last,
            until_layer=last,
            hidden=hidden.ctypes.data,
            wanted=count,
            wanted_rows=wanted.ctypes.data,
        )
        call = _Call(rows, (table, blocks, wanted, hidden))
        return self._compute([call], count, with_logits=True)

    def expect(self, *, logits: bool) -> None:
        """Whether the next rows are likely to need their logits, too."""
        self._expects_logits = logits

    @property
    def head_rows_max(self) -> int:
        """How many rows `head` takes at once, so that their logits stay within bounds."""
        return max(1, _LOGIT_BYTES_MAX // (4 * self._config.vocab_size))

    def _compute(self, calls: Sequence["_Call"], count: int, *, with_logits: bool) -> "_Best":
        """`count`: rows whose next token is wanted, of all calls together."""
        ids, highest = np.empty(count, dtype=np.int32), np.empty(count, dtype=np.float32)
        scores = ScoreRows(best=ids.ctypes.data, best_score=highest.ctypes.data)
        logits: Floats | None = None
        if with_logits:
            logits = self._logits_of(count)
            offsets = np.arange(count, dtype=np.uint64) * np.uint64(logits.strides[0])
            pointers = offsets + np.uint64(logits.ctypes.data)
            scores.logits = pointers.ctypes.data
        self._model.run([call.rows for call in calls], scores if count else None)
        return _Best(ids, highest, logits)

    def _logits_of(self, count: int) -> Floats:
        if len(self._logits) < count:
            self._logits = np.empty((count, self._config.vocab_size), dtype=np.float32)
        return self._logits[:count]

    def _hidden_of(self, passes: Sequence[Pass], until_layers: Sequence[int]) -> list[Floats]:
        """Memory `[rows, hidden]` of each pass: its own while it is under way, else shared."""
        last = self._config.num_layers
        whole = [
            rows.num_rows if rows.state is None and until == last else 0
            for rows, until in zip(passes, until_layers, strict=True)
        ]
        if len(self._hidden) < sum(whole):
            self._hidden = np.empty((sum(whole), self._config.hidden_size), dtype=np.float32)
        hidden: list[Floats] = []
        first = 0
        for rows, count in zip(passes, whole, strict=True):
            if count:
                hidden.append(self._hidden[first : first + count])
                first += count
            elif rows.state is None:
                shape = (rows.num_rows, self._config.hidden_size)
                hidden.append(np.empty(shape, dtype=np.float32))
            else:
                assert isinstance(rows.state, np.ndarray)
                hidden.append(rows.state)
        return hidden

    def _call(self, rows: Pass, until: int, hidden: Floats) -> "_Call":
        table, blocks = self._segments(rows)
        is_end = until == self._config.num_layers
        token_ids = np.ascontiguousarray(rows.token_ids, dtype=np.int32)
        wanted = np.ascontiguousarray(rows.wanted, dtype=np.int32)
        native = PassRows(
            rows=rows.num_rows,
            segments=len(table),
            token_ids=token_ids.ctypes.data,
            segment=table.ctypes.data,
            first_layer=rows.layers,
            until_layer=until,
            hidden=hidden.ctypes.data,
            wanted=len(wanted) if is_end else 0,
            wanted_rows=wanted.ctypes.data,
        )
        return _Call(native, (table, blocks, token_ids, wanted, hidden))

    def _segments(self, rows: Pass) -> tuple[NDArray[np.void], Ints]:
        """`calumma_segment` of each segment, and the block ids that they point to."""
        segments = rows.segments
        counts = [-(-segment.end // self._info.block_tokens) for segment in segments]
        ids = chain.from_iterable(
            segment.blocks[:count] for segment, count in zip(segments, counts, strict=True)
        )
        blocks = np.fromiter(ids, dtype=np.int32, count=sum(counts))
        table = np.empty(len(segments), dtype=SEGMENT)
        table["start"] = [segment.start for segment in segments]
        table["rows"] = [segment.rows for segment in segments]
        firsts = np.cumsum([0, *counts[:-1]], dtype=np.uint64)
        table["blocks"] = firsts * np.uint64(blocks.itemsize) + np.uint64(blocks.ctypes.data)
        table["adapter"] = self._handles([segment.digest for segment in segments])
        return table, blocks

    def _handles(self, digests: Sequence[str | None]) -> list[int]:
        adapters = self._adapters
        return [0 if digest is None else adapters[digest].handle for digest in digests]


@dataclass(frozen=True, slots=True)
class _Call:
    """A pass as the library takes it, and the memory that it points to."""

    rows: PassRows
    kept: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Best:
    """Of each wanted row: the likeliest token, its logit, and all logits if they were written."""

    ids: Ints
    scores: Floats
    logits: Floats | None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A pass that has reached the end, and what came out of its last layer."""

    rows: Pass
    hidden: Floats

    def digests(self) -> list[str | None]:
        """The adapter of each wanted row."""
        ends = np.cumsum([segment.rows for segment in self.rows.segments])
        places = np.searchsorted(ends, self.rows.wanted, side="right")
        return [self.rows.segments[place].digest for place in places]


class NativeScores:
    """See `Scores`. Good until the executor's next call."""

    def __init__(self, executor: NativeExecutor, best: _Best, wanted: Sequence[_Wanted]) -> None:
        self._executor = executor
        self._best = best
        self._wanted = wanted

    def draw(self, rows: Sequence[SamplingRow]) -> list[Draw | None]:
        ids, is_finite = self._best.ids.tolist(), np.isfinite(self._best.scores).tolist()
        assert len(rows) == len(ids)
        draws = [
            Draw(token_id, None, ()) if finite else None
            for token_id, finite in zip(ids, is_finite, strict=True)
        ]
        needy = [index for index, row in enumerate(rows) if needs_all_scores(row)]
        self._executor.expect(logits=bool(needy))
        for part, logits in self._logits(needy):
            drawn = sample(torch.from_numpy(logits), [rows[index] for index in part])
            for index, draw in zip(part, drawn, strict=True):
                draws[index] = draw
        return draws

    def _logits(self, needy: Sequence[int]) -> Iterator[tuple[Sequence[int], Floats]]:
        """The logits of these rows, some at a time."""
        if not needy:
            return
        if self._best.logits is not None:
            yield needy, self._best.logits[needy]
            return
        hidden = np.concatenate([part.hidden[part.rows.wanted] for part in self._wanted])
        digests = [digest for part in self._wanted for digest in part.digests()]
        most = self._executor.head_rows_max
        for first in range(0, len(needy), most):
            part = needy[first : first + most]
            best = self._executor.head(hidden[part], [digests[index] for index in part])
            assert best.logits is not None
            yield part, best.logits


class _Adapter:
    """An adapter that may still be arriving: `ready_layers` is set when the library knows them."""

    def __init__(self, weights: AdapterWeights, native: NativeAdapter) -> None:
        self._weights = weights  # keeps the rows that the library reads
        self._native = native
        self.handle = native.handle
        self.ready_layers = 0

    def extend(self, layers: int) -> None:
        """Raises AdapterIncompatibleError and NativeError."""
        weights = self._weights
        weights.extend(layers)
        for layer in range(self.ready_layers, layers):
            for module, pair in weights.layers[layer].items():
                self._set(layer, module, pair)
        if weights.embedding is not None and self.ready_layers == 0:
            self._set(EMBEDDING_LAYER, "embed_tokens", weights.embedding)
        if weights.head is not None:
            self._set(len(weights.layers), "lm_head", weights.head)
        self.ready_layers = layers

    def _set(self, layer: int, module: str, pair: LoraPair) -> None:
        assert pair.a.is_contiguous()
        assert pair.bt.is_contiguous()
        rows = (pair.a.data_ptr(), pair.bt.data_ptr())
        at = (layer, Module[module.upper()])
        self._native.set_pair(at, pair.rank, rows, scale=pair.scale)


def _shape_of(config: ModelConfig, info: EngineInfo, *, threads: int) -> ModelShape:
    return ModelShape(
        layers=config.num_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        block_tokens=info.block_tokens,
        max_positions=info.max_context_tokens,
        threads=threads,
        norm_eps=config.rms_norm_eps,
    )
