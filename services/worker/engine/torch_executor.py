"""The forward pass in plain torch, on any device: no compiler, no kernels of our own.

On the CPU a KV position is committed when it is first written, so the caller's account in blocks
is what is used; adapters are read where the worker's host memory has them. On CUDA the KV cache is
allocated whole at start, and adapters are copied into memory beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.common.adapter_container import ContainerHeader
from services.worker.engine.attention import Attention
from services.worker.engine.executor import Pass
from services.worker.engine.kv import PagedCache
from services.worker.engine.model import Batch, Model
from services.worker.engine.sampling import HostScores
from services.worker.lora.cpu import LoraBatch, LoraSegment
from services.worker.lora.outer import AdaptedRows, adapted_rows
from services.worker.lora.stack import AdapterStack
from services.worker.lora.weights import AdapterWeights, Transfer


@dataclass(frozen=True, slots=True)
class _State:
    """`hidden [rows, hidden]` fp32 is what came out of the last layer that a pass has passed."""

    batch: Batch
    hidden: Tensor


class TorchExecutor:
    """See `Executor`."""

    def __init__(
        self, model: Model, cache: PagedCache, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = model
        self._config = model.config
        self._cache = cache
        self._dtype = dtype
        self._device = device
        self._stack = AdapterStack(model.config)
        self._adapters: dict[str, AdapterWeights] = {}
        self._transfer = Transfer(device) if device.type == "cuda" else None

    @property
    def description(self) -> str:
        return f"torch {self._device.type} {str(self._dtype).removeprefix('torch.')}"

    def begin_adapter(
        self, digest: str, header: ContainerHeader, payload: memoryview, blocks: Sequence[int]
    ) -> None:
        del blocks  # the payload is where it stays, or a copy in memory of its own
        assert digest not in self._adapters
        self._adapters[digest] = AdapterWeights(
            header, payload, self._config, dtype=self._dtype, transfer=self._transfer
        )

    def extend_adapter(self, digest: str, layers: int) -> None:
        self._adapters[digest].extend(layers)

    def remove_adapter(self, digest: str) -> None:
        del self._adapters[digest]
        self._stack.drop(digest)

    def ready_layers(self, digest: str) -> int:
        return self._adapters[digest].ready_layers

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        self._cache.clear(blocks)

    @torch.inference_mode()
    def run(self, passes: Sequence[Pass], until_layers: Sequence[int]) -> HostScores | None:
        wanted: list[Tensor] = []
        heads: list[LoraSegment] = []
        for rows, until in zip(passes, until_layers, strict=True):
            hidden = self._advance(rows, until)
            if rows.layers == self._config.num_layers and len(rows.wanted):
                wanted.append(hidden[torch.from_numpy(rows.wanted).to(self._device)])
                heads += _wanted_rows(rows, first=len(heads))
        if not wanted:
            return None
        return HostScores(self._model.head(torch.cat(wanted), self._outer(heads, is_head=True)))

    def hidden(self, rows: Pass) -> Tensor:
        """What came out of the last layer that a pass under way has passed, `[rows, hidden]`."""
        assert isinstance(rows.state, _State)
        return rows.state.hidden

    def _advance(self, rows: Pass, until: int) -> Tensor:
        """Take the rows to a layer. Returns what comes out of it."""
        is_last = until == self._config.num_layers
        if rows.state is None:
            batch = self._batch(rows, is_alone=not is_last)
            rows.state = _State(batch, self._model.embed(batch))
        state = rows.state
        assert isinstance(state, _State)
        self._model.run(state.hidden, state.batch, slice(rows.layers, until))
        rows.layers = until
        if is_last:
            rows.state = None
        return state.hidden

    def _batch(self, rows: Pass, *, is_alone: bool) -> Batch:
        """`is_alone`: it is to stop on its way, because its adapter is still coming."""
        segments = _lora_segments(rows)
        return Batch(
            token_ids=torch.from_numpy(rows.token_ids).to(self._device),
            positions=torch.from_numpy(rows.positions).to(self._device),
            attention=Attention(
                self._config,
                self._cache,
                rows.segments,
                positions=rows.positions,
                dtype=self._dtype,
                device=self._device,
            ),
            lora=self._lora_batch(segments, is_stackable=not is_alone),
            embedding_lora=self._outer(segments, is_head=False),
        )

    def _lora_batch(
        self, segments: Sequence[LoraSegment], *, is_stackable: bool
    ) -> LoraBatch | None:
        if all(segment.digest is None for segment in segments):
            return None
        return LoraBatch(self._stack, segments, self._adapters, is_stackable=is_stackable)

    def _outer(self, segments: Sequence[LoraSegment], *, is_head: bool) -> list[AdaptedRows]:
        """Of the embedding or the head: the rows whose adapter has a pair there."""
        digests = {segment.digest for segment in segments if segment.digest is not None}
        adapters = {digest: self._adapters[digest] for digest in digests}
        pairs = {
            digest: pair
            for digest, adapter in adapters.items()
            if (pair := adapter.head if is_head else adapter.embedding)
        }
        return adapted_rows(segments, pairs, device=self._device) if pairs else []


def _lora_segments(rows: Pass) -> list[LoraSegment]:
    segments: list[LoraSegment] = []
    row = 0
    for segment in rows.segments:
        end = row + segment.rows
        segments.append(LoraSegment(segment.digest, slice(row, end)))
        row = end
    return segments


def _wanted_rows(rows: Pass, *, first: int) -> list[LoraSegment]:
    """Of the head: its rows from `first` on are the wanted ones."""
    digests = [segment.digest for segment in rows.segments for _ in range(segment.rows)]
    return [
        LoraSegment(digests[row], slice(first + index, first + index + 1))
        for index, row in enumerate(rows.wanted)
    ]
