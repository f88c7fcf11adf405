"""Adapters in blocks of the one pool on the device, which they share with the KV cache.

An adapter's rank rows are copied from host memory into the pages of its blocks (`paging`), a range
of its payload at a time, on a stream of their own: `extend` returns when they are there, and no
step waits. Kernels find them by its table, which lies with those of others in one tensor that never
moves, so captured graphs keep their pointers.

The rows of the embedding and of the head are as wide as the vocabulary. They are few, no kernel
reads them, and they lie beside the pool. Their bytes are in the caller's account nevertheless.

Copies wait for what the device was given before the adapter began: its blocks were others' then.

Threads: `begin` and `extend` may run beside steps. `ready_layers` is set last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, Final

import torch
from torch import Tensor

from services.common.adapter_container import (
    DTYPE_BYTES,
    EMBEDDING_LAYER,
    ContainerHeader,
    ModuleEntry,
)
from services.common.base_model import LINEARS, ModelConfig, linear_shapes
from services.worker.engine.api import AdapterIncompatibleError
from services.worker.lora.layout import LoraPair, check_fits
from services.worker.lora.paging import ALIGN_ELEMENTS, PageTooWideError, Placement, place
from services.worker.lora.worklist import PAGE_ROWS

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# A page takes 8 bytes of a table, and 8 rows of the pool. Room for tables is 1/256 of the pool's,
# several times what full adapters need, and at least that of a few large ones.
_POOL_BYTES_PER_TABLE_BYTE: Final = 256
_TABLE_PAGES_MIN: Final = 64
_TABLES_MIN: Final = 16


def accounted_block_bytes(config: ModelConfig, block_elements: int) -> int:
    """Of so many bytes of an adapter's payload a block holds at least these; below 1: none.

    A page that does not fit into the rest of a block leaves it empty. A payload has 2 bytes for
    each value at least, whatever the pool's type.
    """
    widest = max(max(shape) for shape in linear_shapes(config).values())
    return (block_elements - PAGE_ROWS * widest) * min(DTYPE_BYTES.values())


def has_aligned_rows(config: ModelConfig) -> bool:
    """Whether all rank rows are whole loads of the kernels."""
    shapes = linear_shapes(config).values()
    return all(width % ALIGN_ELEMENTS == 0 for shape in shapes for width in shape)


@dataclass(slots=True)
class PooledAdapter:
    """One adapter. `pages`: of its largest linear, 0 if it has none. `table_at`: its table's place.

    Rows of layers below `ready_layers` are there; `embedding` and `head` once all are.
    """

    header: ContainerHeader
    blocks: tuple[int, ...]
    placement: Placement | None  # None: no linear is adapted
    payload: Tensor | None  # None once all of it is there
    table_at: int | None = field(default=None)
    ready_layers: int = field(default=0)
    embedding: LoraPair | None = field(default=None)
    head: LoraPair | None = field(default=None)

    @property
    def pages(self) -> int:
        return 0 if self.placement is None else self.placement.table_pages


class AdapterPool:
    """All adapters on the device."""

    def __init__(self, config: ModelConfig, pool: Tensor, *, block_elements: int) -> None:
        """`pool [elements]`: all of its values, in the engine's dtype."""
        self._config = config
        self._pool = pool
        self._block_elements = block_elements
        self._adapters: dict[str, PooledAdapter] = {}
        self._copies = _Copies(pool.device)
        layer_tables = config.num_layers * len(LINEARS)
        least = _TABLES_MIN * layer_tables * (1 + 2 * _TABLE_PAGES_MIN)
        room = pool.nbytes // _POOL_BYTES_PER_TABLE_BYTE // torch.int64.itemsize
        self.tables = torch.zeros(max(least, room), dtype=torch.int64, device=pool.device)
        self._table_room = _Room(len(self.tables))

    def __getitem__(self, digest: str) -> PooledAdapter:
        return self._adapters[digest]

    def begin(
        self, digest: str, header: ContainerHeader, payload: memoryview, blocks: Sequence[int]
    ) -> None:
        """See `Executor.begin_adapter`. Raises AdapterIncompatibleError."""
        assert digest not in self._adapters
        assert len(payload) == header.payload_bytes
        check_fits(header, self._config)
        placement = self._placed(header)
        assert placement is None or placement.blocks <= len(blocks)
        self._copies.wait_for_steps()
        rows = torch.frombuffer(payload, dtype=_DTYPES[header.dtype])
        self._adapters[digest] = PooledAdapter(header, tuple(blocks), placement, rows)

    def extend(self, digest: str, layers: int) -> None:
        """See `Executor.extend_adapter`. Raises AdapterIncompatibleError and MemoryError."""
        adapter = self._adapters[digest]
        first = adapter.ready_layers
        assert first < layers <= self._config.num_layers
        try:
            self._copies.run(lambda: self._bring(adapter, first, layers))
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error
        if layers == self._config.num_layers:
            adapter.payload = None
        adapter.ready_layers = layers

    def remove(self, digest: str) -> None:
        adapter = self._adapters.pop(digest)
        if adapter.table_at is not None:
            self._table_room.give(adapter.table_at, self._table_elements(adapter))

    def steps_queued(self) -> None:
        """All that the device was given until now may read blocks that are free already."""
        self._copies.steps_queued()

    def _placed(self, header: ContainerHeader) -> Placement | None:
        inner = tuple(entry for entry in header.modules if entry.module in LINEARS)
        if not inner:
            return None
        try:
            return place(replace(header, modules=inner), block_elements=self._block_elements)
        except PageTooWideError as error:
            raise AdapterIncompatibleError(str(error)) from error

    def _bring(self, adapter: PooledAdapter, first: int, until: int) -> None:
        if adapter.placement is not None:
            if adapter.table_at is None:
                self._write_table(adapter, adapter.placement)
            self._copy_pages(adapter, adapter.placement, first, until)
        is_last = until == self._config.num_layers
        for entry in adapter.header.modules:
            if entry.layer == EMBEDDING_LAYER and first == 0:
                adapter.embedding = self._pair(adapter, entry)
            if entry.layer == self._config.num_layers and is_last:
                adapter.head = self._pair(adapter, entry)

    def _write_table(self, adapter: PooledAdapter, placement: Placement) -> None:
        table = placement.table(
            adapter.blocks,
            block_elements=self._block_elements,
            num_layers=self._config.num_layers,
        )
        at = self._table_room.take(table.size)
        if at is None:
            raise MemoryError("there is no room for the page table of one more adapter")
        adapter.table_at = at
        self.tables[at : at + table.size].copy_(torch.from_numpy(table).view(-1))

    def _table_elements(self, adapter: PooledAdapter) -> int:
        return self._config.num_layers * len(LINEARS) * (1 + 2 * adapter.pages)

    def _copy_pages(
        self, adapter: PooledAdapter, placement: Placement, first: int, until: int
    ) -> None:
        """One copy for each block that the layers touch."""
        assert adapter.payload is not None
        is_finite: list[Tensor] = []
        for copy in placement.copies(first, until):
            at = adapter.blocks[copy.block] * self._block_elements + copy.element
            rows = adapter.payload[copy.payload_element : copy.payload_element + copy.elements]
            target = self._pool[at : at + copy.elements]
            if rows.dtype == target.dtype:
                target.copy_(rows, non_blocking=True)
            else:
                target.copy_(rows.to(target.device, non_blocking=True))
                is_finite.append(target.isfinite().all())
        self._check_finite(is_finite)

    def _pair(self, adapter: PooledAdapter, entry: ModuleEntry) -> LoraPair:
        assert adapter.payload is not None
        start = entry.offset // adapter.payload.itemsize
        split = start + entry.rank * entry.in_features
        end = split + entry.rank * entry.out_features
        options: dict[str, Any] = {"device": self._pool.device, "non_blocking": True}
        rows = adapter.payload[start:end].to(**options).to(self._pool.dtype)
        if adapter.payload.dtype != rows.dtype:
            self._check_finite([rows.isfinite().all()])
        elif rows.device.type == "cpu":
            rows = rows.clone()  # the payload is not kept
        a = rows[: split - start].view(entry.rank, entry.in_features)
        return LoraPair(a, rows[split - start :].view(entry.rank, entry.out_features), entry.scale)

    def _check_finite(self, is_finite: Sequence[Tensor]) -> None:
        """What the store published is finite; a change of type may have made it infinite."""
        if is_finite and not bool(torch.stack(list(is_finite)).all()):
            raise AdapterIncompatibleError(f"not all weights are finite as {self._pool.dtype}")


class _Copies:
    """Work on a stream of its own, beside steps; on the CPU, at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        self._steps: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
            self._steps = torch.cuda.Event()  # type: ignore[no-untyped-call]  # likewise
        self._lock = Lock()

    def steps_queued(self) -> None:
        if self._stream is not None:
            with self._lock:
                self._steps.record()

    def wait_for_steps(self) -> None:
        if self._stream is not None:
            with self._lock:
                self._stream.wait_event(self._steps)

    def run(self, work: Callable[[], None]) -> None:
        """Returns when it is done."""
        if self._stream is None:
            work()
            return
        with torch.cuda.stream(self._stream):
            try:
                work()
            finally:
                self._stream.synchronize()


class _Room:
    """Which ranges of a tensor are free: first fit, neighbours are joined."""

    def __init__(self, size: int) -> None:
        self._free = [(0, size)]  # (start, size), ascending
        self._lock = Lock()

    def take(self, size: int) -> int | None:
        """The start of a range, or None where there is none of this size."""
        with self._lock:
            for index, (start, room) in enumerate(self._free):
                if room >= size:
                    rest = (start + size, room - size)
                    self._free[index : index + 1] = [rest] if rest[1] else []
                    return start
        return None

    def give(self, start: int, size: int) -> None:
        with self._lock:
            joined: list[tuple[int, int]] = []
            for first, room in sorted([*self._free, (start, size)]):
                if joined and sum(joined[-1]) == first:
                    joined[-1] = (joined[-1][0], joined[-1][1] + room)
                else:
                    joined.append((first, room))
            self._free = joined
