"""Which rows of a step meet which rank rows: the work of the LoRA kernels, planned on the host.

Rows that use the same adapter are brought together, wherever they are in the step, and cut into
*tiles* of at most `tile_rows`. What the kernels go through:

  - shrink (x Aᵀ): *items*, a tile and a few pages of its adapter's rank rows;
  - expand (s B):  tiles of adapters, each with all pages of its adapter;
  - kernels that touch every row anyway: all tiles, those of base rows last.

One plan serves all layers and all linears: where an adapter has fewer pages than its largest
module, or none, its page table says so. So the plan is as small as the batch, and one array of
int32 brings it to the device:

    counts [8] · rows [shape.rows] · tiles [shape.rows, 8] · items [shape.items, 8]

A tile or item is (first place in `rows`, how many, where its adapter's page table begins, pages of
the adapter, first page row of its products, first page, 0, 0). Products lie row by row, the pages
of a row side by side. Sections begin at places that depend on `WorkShape` alone: a captured graph
replays with other counts.

Everything is sorted by adapter, then by row, so the same step gives the same plan.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]

PAGE_ROWS: Final = 8  # rank rows of a page
FIELDS: Final = 8  # of a tile or item: 32 bytes, one sector of memory
COUNTS: Final = 8
ITEM_COUNT: Final = 0  # places among the counts
ADAPTER_TILE_COUNT: Final = 1
TILE_COUNT: Final = 2


class WorkTooLargeError(ValueError):
    """A step has more work than the array was made for."""


@dataclass(frozen=True, slots=True)
class WorkShape:
    """Room of a plan: rows of the step, shrink items, and page rows of products."""

    rows: int
    items: int
    page_rows: int

    @property
    def tiles_at(self) -> int:
        return COUNTS + self.rows + -self.rows % FIELDS

    @property
    def items_at(self) -> int:
        return self.tiles_at + self.rows * FIELDS

    @property
    def size(self) -> int:
        return self.items_at + self.items * FIELDS


@dataclass(frozen=True, slots=True)
class Work:
    """A planned step. `tiles [n, 8]`, those of adapters first; `items [n, 8]`."""

    rows: Ints  # indices of the step's rows, in the order of the tiles
    tiles: Ints
    adapter_tiles: int
    items: Ints
    page_rows: int

    @property
    def bucket(self) -> WorkShape:
        """The smallest shape of powers of two that holds this."""
        return WorkShape(
            _power_of_two(len(self.rows)),
            _power_of_two(len(self.items)),
            _power_of_two(self.page_rows),
        )

    def pack(self, shape: WorkShape, *, out: Ints | None = None) -> Ints:
        """The array `[shape.size]` for the kernels, or `out`, which may hold an older one.

        Raises WorkTooLargeError.
        """
        _check_room(self, shape)
        packed = np.zeros(shape.size, dtype=np.int32) if out is None else out
        packed[ITEM_COUNT] = len(self.items)
        packed[ADAPTER_TILE_COUNT] = self.adapter_tiles
        packed[TILE_COUNT] = len(self.tiles)
        packed[COUNTS : COUNTS + len(self.rows)] = self.rows
        packed[shape.tiles_at : shape.tiles_at + self.tiles.size] = self.tiles.ravel()
        packed[shape.items_at : shape.items_at + self.items.size] = self.items.ravel()
        return packed


def plan(row_slots: Ints, tables: Ints, pages: Ints, *, tile_rows: int, item_pages: int) -> Work:
    """Plan a step.

    `row_slots [rows]`: the slot of each row's adapter, -1 for the base model. `tables [slots]`:
    where each slot's page table begins. `pages [slots]`: pages of its adapter's largest linear. An
    adapter without linears has no slot: its rows are rows of the base model here.
    """
    order = np.argsort(row_slots, kind="stable")
    base_rows = int(np.searchsorted(row_slots[order], 0))
    order = np.concatenate((order[base_rows:], order[:base_rows]))
    tiles = _tiles(row_slots[order], tile_rows)
    slots = tiles[:, 2]
    adapter_tiles = len(slots) - int(np.count_nonzero(slots < 0))
    used = slots[:adapter_tiles]
    assert pages[used].all()
    tiles[:adapter_tiles, 3] = pages[used]
    tiles[:adapter_tiles, 2] = tables[used]
    tiles[adapter_tiles:, 2] = 0
    page_rows = np.cumsum(tiles[:, 1] * tiles[:, 3])
    tiles[1:, 4] = page_rows[:-1]
    return Work(
        rows=order.astype(np.int32),
        tiles=tiles,
        adapter_tiles=adapter_tiles,
        items=_items(tiles[:adapter_tiles], item_pages),
        page_rows=int(page_rows[-1]) if len(page_rows) else 0,
    )


def _tiles(slots: Ints, tile_rows: int) -> Ints:
    """Runs of equal slots, cut to `tile_rows`; a tile's third field is its slot for now."""
    is_edge = np.ones(len(slots) + 1, dtype=bool)
    np.not_equal(slots[1:], slots[:-1], out=is_edge[1:-1])
    edges = np.flatnonzero(is_edge)
    starts = edges[:-1]
    sizes = edges[1:] - starts
    counts = -(-sizes // tile_rows)
    run, place = _repeated(counts)
    tiles = np.zeros((len(run), FIELDS), dtype=np.int32)
    passed = place * tile_rows
    first = starts[run]
    tiles[:, 0] = first + passed
    tiles[:, 1] = np.minimum(tile_rows, sizes[run] - passed)
    tiles[:, 2] = slots[first]
    return tiles


def _items(tiles: Ints, item_pages: int) -> Ints:
    tile, place = _repeated(-(-tiles[:, 3] // item_pages))
    items: Ints = tiles[tile]
    items[:, 5] = place * item_pages
    return items


def _repeated(counts: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each index as often as its count says, and which of its repetitions it is."""
    index = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    return index, np.arange(len(index)) - (ends - counts)[index]


def _check_room(work: Work, shape: WorkShape) -> None:
    for what, needed, room in (
        ("rows", len(work.rows), shape.rows),
        ("items", len(work.items), shape.items),
        ("page rows", work.page_rows, shape.page_rows),
    ):
        if needed > room:
            raise WorkTooLargeError(f"{needed} {what}, there is room for {room}")


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
