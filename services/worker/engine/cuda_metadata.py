"""What a forward pass on CUDA is told: token ids, positions, where contexts lie, whose adapter.

All of it is int32 in one array, built on the host with numpy and copied once. Parts begin at
multiples of 128 bytes, so kernels compile for aligned pointers. Where a part lies depends on the
shapes of those before it only: a captured graph reads fixed places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from services.worker.engine.executor import Ints, Segment
from services.worker.engine.triton_attention import prefill_tiles
from services.worker.lora.device_pool import AdapterPool
from services.worker.lora.triton_lora import DECODE_TUNING, PREFILL_TUNING, LoraTuning
from services.worker.lora.worklist import Work, plan

_ALIGN: Final = 32  # int32s
_NOT_KEPT: Final = -1  # the slot of a row whose key and value go nowhere
_BASE: Final = -1  # the slot of a row without an adapter

Places = dict[str, tuple[int, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Tunings:
    """How kernels of adapters are cut: where few rows of one adapter meet, and where many do."""

    decode: LoraTuning = DECODE_TUNING
    prompts: LoraTuning = PREFILL_TUNING


@dataclass(frozen=True, slots=True)
class PlannedAdapters:
    """The adapters of rows: the work list, its tuning, and who is who in it."""

    work: Work
    tuning: LoraTuning
    digests: tuple[str, ...]  # by slot
    row_slots: Ints

    @property
    def tile_pages(self) -> int:
        """Pages over all tiles: what expand goes through."""
        return int(self.work.tiles[:, 3].sum())


def places_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Places, int]:
    """Where each part begins, and the size of all."""
    places: Places = {}
    at = 0
    for name, shape in shapes.items():
        places[name] = (at, shape)
        size = int(np.prod(shape))
        at += size + -size % _ALIGN
    return places, at


def packed(parts: Mapping[str, Ints]) -> tuple[Ints, Places]:
    """All parts in one array."""
    places, size = places_of({name: part.shape for name, part in parts.items()})
    array = np.zeros(size, dtype=np.int32)
    for name, part in parts.items():
        at, _ = places[name]
        array[at : at + part.size] = part.ravel()
    return array, places


def views_of(array: Tensor, places: Places) -> dict[str, Tensor]:
    return {
        name: array[at : at + int(np.prod(shape))].view(shape)
        for name, (at, shape) in places.items()
    }


def to_device(array: Ints, device: torch.device) -> Tensor:
    """A copy that steps do not wait for; its host memory is kept until it is done."""
    return staged(array, device).to(device, non_blocking=True)


def staged(array: Ints, device: torch.device) -> Tensor:
    """In pinned memory where there is a device to copy to."""
    host = torch.empty(array.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
    host.numpy()[...] = array
    return host


def decode_parts(
    segments: Sequence[Segment],
    token_ids: Ints,
    *,
    rows: int,
    table_blocks: int,
    block_tokens: int,
) -> dict[str, Ints]:
    """Segments of one row, padded to `rows`: what is behind them has no context and is not kept."""
    count = len(segments)
    positions = np.fromiter((segment.start for segment in segments), np.int32, count)
    parts = _decode_zeros(rows, table_blocks)
    parts["token_ids"][:count] = token_ids
    parts["positions"][:count] = positions
    parts["lengths"][:count] = positions + 1
    table = parts["blocks"]
    for row, segment in enumerate(segments):
        used = positions[row] // block_tokens + 1
        table[row, :used] = segment.blocks[:used]
    last = table[np.arange(count), positions // block_tokens]
    parts["slots"][:count] = last * block_tokens + positions % block_tokens
    return parts


def _decode_zeros(rows: int, table_blocks: int) -> dict[str, Ints]:
    return {
        "token_ids": np.zeros(rows, dtype=np.int32),
        "positions": np.zeros(rows, dtype=np.int32),
        "slots": np.full(rows, _NOT_KEPT, dtype=np.int32),
        "lengths": np.zeros(rows, dtype=np.int32),
        "blocks": np.zeros((rows, table_blocks), dtype=np.int32),
    }


def decode_shapes(rows: int, table_blocks: int) -> dict[str, tuple[int, ...]]:
    """Of `decode_parts`."""
    return {name: part.shape for name, part in _decode_zeros(rows, table_blocks).items()}


def ragged_parts(
    segments: Sequence[Segment],
    token_ids: Ints,
    positions: Ints,
    wanted: Ints,
    *,
    block_tokens: int,
    tile_positions: int,
) -> dict[str, Ints]:
    """Segments of any length, those of one row first.

    Beside the parts of decoding: `wanted`, and for prompts `prompt_blocks`, `segments`, `tiles`.
    """
    decoding = next((i for i, one in enumerate(segments) if one.rows > 1), len(segments))
    table = block_table(segments, block_tokens)
    rows = np.array([segment.rows for segment in segments], dtype=np.int32)
    blocks = table[np.repeat(np.arange(len(segments)), rows), positions // block_tokens]
    parts: dict[str, Ints] = {
        "token_ids": token_ids,
        "positions": positions,
        "slots": (blocks * block_tokens + positions % block_tokens).astype(np.int32),
        "wanted": wanted,
    }
    if decoding:
        parts["blocks"] = table[:decoding]
        parts["lengths"] = positions[:decoding] + 1
    if decoding < len(segments):
        prompts = segments[decoding:]
        first = np.cumsum(rows) - rows
        starts = np.array([one.start for one in prompts], dtype=np.int32)
        parts["prompt_blocks"] = table[decoding:]
        parts["segments"] = np.stack([first[decoding:], rows[decoding:], starts], axis=1)
        parts["tiles"] = prefill_tiles(rows[decoding:], tile_positions)
    return {name: part.astype(np.int32, copy=False) for name, part in parts.items()}


def block_table(segments: Sequence[Segment], block_tokens: int) -> Ints:
    """Blocks of each context, `[segments, …]`; those that are shorter are padded with 0."""
    counts = [-(-segment.end // block_tokens) for segment in segments]
    table = np.zeros((len(segments), max(counts)), dtype=np.int32)
    for row, (segment, count) in enumerate(zip(segments, counts, strict=True)):
        table[row, :count] = segment.blocks[:count]
    return table


def plan_adapters(
    segments: Sequence[Segment], adapters: AdapterPool, tunings: Tunings, *, padding: int = 0
) -> PlannedAdapters | None:
    """None where no row has an adapter with linears. `padding`: rows of nobody, behind the others.

    Kernels finish the rows of the plan only; what others hold would be anything.
    """
    slots: dict[str, int] = {}
    for segment in segments:
        if segment.digest is not None and adapters[segment.digest].pages:
            slots.setdefault(segment.digest, len(slots))
    if not slots:
        return None
    rows = np.array([segment.rows for segment in segments])
    of_segments = [slots.get(segment.digest or "", _BASE) for segment in segments]
    row_slots = np.repeat(np.array([*of_segments, _BASE], dtype=np.int32), [*rows, padding])
    is_long = int(np.bincount(row_slots[row_slots >= 0]).max()) > tunings.decode.tile_rows
    tuning = tunings.prompts if is_long and int(rows.max()) > 1 else tunings.decode
    work = plan(
        row_slots,
        np.array([adapters[digest].table_at for digest in slots], dtype=np.int32),
        np.array([adapters[digest].pages for digest in slots], dtype=np.int32),
        tile_rows=tuning.tile_rows,
        item_pages=tuning.item_pages,
    )
    return PlannedAdapters(work, tuning, tuple(slots), row_slots)
