"""Decoding steps as CUDA graphs: one launch a step, whatever the number of layers.

A graph is made for a number of rows, rounded up to a bucket, without adapters or with them, by
regime (`cuda_lora`). What differs from step to step lies in one array of int32 at a fixed place,
which one copy from pinned memory fills; grids cover the most work of a bucket, and kernels read how
much there is. Rows of padding have no context and are not kept.

Without CUDA the same steps run kernel by kernel: Triton's interpreter has no graphs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from services.worker.engine.cuda_lora import (
    FUSED_PAGES_MAX,
    Regime,
    RowsLora,
    SideStream,
    choose_regime,
)
from services.worker.engine.cuda_metadata import (
    PlannedAdapters,
    decode_parts,
    decode_shapes,
    packed,
    places_of,
    staged,
    views_of,
)
from services.worker.engine.cuda_model import CudaModel, DecodeRows, Rows, Scored
from services.worker.engine.executor import Ints, Segment
from services.worker.engine.triton_attention import DecodeScratch
from services.worker.lora.triton_lora import (
    LoraStep,
    LoraTuning,
    linear_groups,
    plane_elements_max,
)
from services.worker.lora.worklist import WorkShape

ROW_BUCKETS: Final[tuple[int, ...]] = (1, 2, 4, 8, *range(16, 257, 8))
_PAGES_MAX: Final = 64  # of an adapter in a graph: rank 512; others run kernel by kernel
_WARM_UP_RUNS: Final = 2  # the first ones compile and allocate, which a graph can't hold


@dataclass(slots=True)
class _Program:
    """A step of one bucket. `graph` is None without CUDA."""

    shape: WorkShape | None
    bucket: int
    rows: Rows
    graph: Any


class DecodeGraphs:
    """Called from one thread, on one stream."""

    def __init__(
        self,
        model: CudaModel,
        pool: Tensor,
        tables: Tensor,
        *,
        rows_max: int,
        table_blocks: int,
        block_tokens: int,
        tuning: LoraTuning,
    ) -> None:
        """`tables`: page tables of adapters. `table_blocks`: of the longest context."""
        self._model = model
        self._pool = pool
        self._tables = tables
        self._device = pool.device
        self._table_blocks = table_blocks
        self._block_tokens = block_tokens
        self._tuning = tuning
        self._buckets = [rows for rows in ROW_BUCKETS if rows < rows_max]
        self._buckets.append(min(rows for rows in ROW_BUCKETS if rows >= self._last(rows_max)))
        self._groups = linear_groups(model.config)
        self._side = SideStream(pool.device)
        self._programs: dict[tuple[int, Regime | None], _Program] = {}
        self._memory: Any = None  # of all graphs: they never run at the same time
        largest = self._work_shape(self._buckets[-1], Regime.WORK_LIST)
        _, size = places_of(self._part_shapes(self._buckets[-1], largest))
        self._metadata = torch.zeros(size, dtype=torch.int32, device=self._device)
        self._planes = torch.empty(
            plane_elements_max(largest, self._tuning), dtype=torch.float32, device=self._device
        )
        config = model.config
        self._scratch = DecodeScratch.empty(
            self._buckets[-1], config.num_heads, config.head_dim, self._device
        )
        self._scored = Scored.empty(self._buckets[-1], config, pool)

    def padding(self, rows: int) -> int:
        """How many rows of nobody so many rows get."""
        return self._bucket(rows) - rows if rows <= self._buckets[-1] else 0

    def can_run(self, rows: int, planned: PlannedAdapters | None) -> bool:
        """Whether there is a bucket for so many rows and their adapters."""
        if not 0 < rows <= self._buckets[-1]:
            return False
        if planned is None:
            return True
        shape = self._work_shape(self._bucket(rows), _regime(planned))
        work = planned.work
        return len(work.items) <= shape.items and work.page_rows <= shape.page_rows

    def run(
        self, segments: Sequence[Segment], token_ids: Ints, planned: PlannedAdapters | None
    ) -> Scored:
        """One step of segments of one row each. What it returns lasts until the next one."""
        bucket = self._bucket(len(segments))
        program = self._program(bucket, None if planned is None else _regime(planned))
        parts = decode_parts(
            segments,
            token_ids,
            rows=bucket,
            table_blocks=self._table_blocks,
            block_tokens=self._block_tokens,
        )
        if planned is not None and program.shape is not None:
            # What is behind the last item is never read.
            used = program.shape.items_at + planned.work.items.size
            parts["work"] = planned.work.pack(program.shape)[:used]
        self._fill(packed(parts)[0])
        if program.graph is None:
            self._forward(program)
        else:
            program.graph.replay()
        return self._scored.first(len(segments))

    def warm_up(self) -> None:
        """Make all graphs, so that no step has to."""
        for bucket in reversed(self._buckets):
            for regime in (None, Regime.FUSED, Regime.WORK_LIST):
                self._program(bucket, regime)

    def _last(self, rows_max: int) -> int:
        return min(rows_max, ROW_BUCKETS[-1])

    def _bucket(self, rows: int) -> int:
        return min(bucket for bucket in self._buckets if bucket >= rows)

    def _fill(self, array: Ints) -> None:
        self._metadata[: len(array)].copy_(staged(array, self._device), non_blocking=True)

    def _program(self, bucket: int, regime: Regime | None) -> _Program:
        key = bucket, regime
        if key not in self._programs:
            self._programs[key] = self._made(bucket, regime)
        return self._programs[key]

    def _made(self, bucket: int, regime: Regime | None) -> _Program:
        shape = None if regime is None else self._work_shape(bucket, regime)
        places, size = places_of(self._part_shapes(bucket, shape))
        parts = views_of(self._metadata, places)
        rows = Rows(
            token_ids=parts["token_ids"],
            positions=parts["positions"],
            slots=parts["slots"],
            decode=DecodeRows(parts["blocks"], parts["lengths"], self._scratch),
            prompts=None,
            lora=None if regime is None or shape is None else self._lora(parts, shape, regime),
        )
        program = _Program(shape, bucket, rows, None)
        if self._device.type == "cuda":
            idle = np.zeros(size, dtype=np.int32)
            at, _ = places["slots"]
            idle[at : at + bucket] = -1
            self._fill(idle)
            self._capture(program)
        return program

    def _lora(self, parts: dict[str, Tensor], shape: WorkShape, regime: Regime) -> RowsLora:
        step = LoraStep(
            pool=self._pool,
            tables=self._tables,
            work=parts["work"],
            planes=self._planes,
            shape=shape,
            tuning=self._tuning,
        )
        return RowsLora(regime, step, self._groups, self._side)

    def _capture(self, program: _Program) -> None:
        for _ in range(_WARM_UP_RUNS):
            self._forward(program)
        graph: Any = torch.cuda.CUDAGraph()
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        # Only this thread's calls are the graph's: adapters are loaded from others.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            self._forward(program)
        program.graph = graph

    def _forward(self, program: _Program) -> None:
        residual = self._model.embed(program.rows.token_ids)
        self._model.run(residual, program.rows, slice(0, self._model.config.num_layers))
        self._model.head_into(residual, self._scored.first(program.bucket))

    def _part_shapes(self, bucket: int, shape: WorkShape | None) -> dict[str, tuple[int, ...]]:
        shapes = decode_shapes(bucket, self._table_blocks)
        return shapes if shape is None else shapes | {"work": (shape.size,)}

    def _work_shape(self, bucket: int, regime: Regime) -> WorkShape:
        """Room for the most work of a bucket."""
        tuning = self._tuning
        if regime is Regime.FUSED:
            pages = FUSED_PAGES_MAX
            return WorkShape(bucket, pages, pages * min(bucket, tuning.tile_rows))
        return WorkShape(bucket, bucket * _PAGES_MAX // tuning.item_pages, bucket * _PAGES_MAX)


def _regime(planned: PlannedAdapters) -> Regime:
    return choose_regime(planned.tile_pages, tile_rows=planned.tuning.tile_rows)
