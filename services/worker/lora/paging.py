"""Where an adapter's rank rows lie in the blocks of the pool, and how kernels find them.

A *page* is up to 8 rank rows of one side of one module, A `[rows, in]` or Bᵀ `[rows, out]`,
contiguous, within one block, and begins at a multiple of 8 elements. Pages follow each other as in
the payload, so a block holds one range of the payload wherever rows are a multiple of 8 elements
wide: a copy for each block. A page that does not fit into what is left of a block begins the next.

The rows of the embedding and of the output head are as wide as the vocabulary, and 8 of them may
not fit into a block: their pages have as many rows as do. No kernel reads them by the table.

The *table* of an adapter has, for every layer and every linear in the order of `LINEARS`,

    scale · A's pages [pages] · Bᵀ's pages [pages]

as int64: the bits of the scale in fp32, and for each page `element // 8 * 16 + rows`, where
`element` is counted from the start of the pool; 0 is no page. `pages`: those of the largest linear.

Elements are those of the pool's type. A payload of another type is converted on the way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.common.adapter_container import DTYPE_BYTES, ContainerHeader, ModuleEntry
from services.common.base_model import LINEARS
from services.worker.lora.worklist import PAGE_ROWS

Int64s = NDArray[np.int64]

ALIGN_ELEMENTS: Final = 8  # 16 bytes of a 16-bit type: the widest load
ROWS_RADIX: Final = 16  # of a table entry: its last digit is the rows of the page, 0 to 8
SIDE_A: Final = 0
SIDE_BT: Final = 1
_PLACE_OF: Final = {name: place for place, name in enumerate(LINEARS)}
_NO_PLACE: Final = len(LINEARS)  # the outer modules


class PageTooWideError(ValueError):
    """A page does not fit into a block; the message names the module."""


@dataclass(frozen=True, slots=True)
class Pages:
    """All pages of an adapter in the payload's order, as columns of one length.

    `place`: of the module among `LINEARS`, or `len(LINEARS)` for embedding and head. `first_rank`
    and `rows`: which rank rows. `block`: numbered from 0. `element`: from the block's start.
    `payload_element`: from the payload's start.
    """

    layer: Int64s
    place: Int64s
    side: Int64s
    first_rank: Int64s
    rows: Int64s
    width: Int64s
    block: Int64s
    element: Int64s
    payload_element: Int64s


@dataclass(frozen=True, slots=True)
class Copy:
    """Consecutive elements of the payload that go to consecutive elements of one block."""

    payload_element: int
    block: int
    element: int
    elements: int


@dataclass(frozen=True)
class Placement:
    """An adapter laid out over blocks. `scales`: by layer and place among `LINEARS`."""

    pages: Pages
    scales: dict[tuple[int, int], float]

    @property
    def blocks(self) -> int:
        """How many blocks it takes."""
        return int(self.pages.block[-1]) + 1

    @cached_property
    def table_pages(self) -> int:
        """Pages per side of the table, 0 if the adapter has no linear."""
        ends = self.pages.first_rank + self.pages.rows
        return -(-int(ends[self.pages.place != _NO_PLACE].max(initial=0)) // PAGE_ROWS)

    def copies(self, first_layer: int, until_layer: int) -> list[Copy]:
        """What brings the rows of layers `first_layer` to `until_layer - 1` into the blocks."""
        pages = self.pages
        wanted = (pages.layer >= first_layer) & (pages.layer < until_layer)
        block, start = pages.block[wanted], pages.element[wanted]
        sizes = (pages.rows * pages.width)[wanted]
        is_first = np.ones(len(block), dtype=bool)
        is_first[1:] = start[1:] != start[:-1] + sizes[:-1]  # also where a block begins, at 0
        first = np.flatnonzero(is_first)
        elements = np.add.reduceat(sizes, first) if len(first) else sizes
        columns = (pages.payload_element[wanted][first], block[first], start[first], elements)
        return [Copy(*map(int, row)) for row in zip(*columns, strict=True)]

    def table(self, blocks: Sequence[int], *, block_elements: int, num_layers: int) -> Int64s:
        """The table `[num_layers, linears, 1 + 2 pages]` of an adapter that has these blocks."""
        assert len(blocks) >= self.blocks
        count = self.table_pages
        table = np.zeros((num_layers, len(LINEARS), 1 + 2 * count), dtype=np.int64)
        for at, scale in self.scales.items():
            table[at][0] = int(np.float32(scale).view(np.int32))
        pages = self.pages
        inner = pages.place != _NO_PLACE
        element = np.asarray(blocks, dtype=np.int64)[pages.block] * block_elements + pages.element
        entry = element // ALIGN_ELEMENTS * ROWS_RADIX + pages.rows
        column = 1 + pages.side * count + pages.first_rank // PAGE_ROWS
        table[pages.layer[inner], pages.place[inner], column[inner]] = entry[inner]
        return table


def place(header: ContainerHeader, *, block_elements: int) -> Placement:
    """Lay an adapter out over blocks of so many elements. Raises PageTooWideError."""
    assert block_elements % ALIGN_ELEMENTS == 0
    sides = np.array(
        [side for entry in header.modules for side in _sides(entry, header, block_elements)],
        dtype=np.int64,
    )
    layer, module_place, side, width, rank, page_rows, payload = sides.T
    counts = -(-rank // page_rows)
    index = np.repeat(np.arange(len(sides)), counts)
    number = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    first_rank = number * page_rows[index]
    rows = np.minimum(page_rows[index], rank[index] - first_rank)
    block, element = _packed(rows * width[index], block_elements)
    pages = Pages(
        layer=layer[index],
        place=module_place[index],
        side=side[index],
        first_rank=first_rank,
        rows=rows,
        width=width[index],
        block=block,
        element=element,
        payload_element=payload[index] + first_rank * width[index],
    )
    return Placement(pages, _scales(header))


def _sides(
    entry: ModuleEntry, header: ContainerHeader, block_elements: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A and Bᵀ: (layer, place, side, width, rank, rows of a page, payload element)."""
    at = _PLACE_OF.get(entry.module, _NO_PLACE)
    rows = _page_rows(entry, at, block_elements)
    payload = entry.offset // DTYPE_BYTES[header.dtype]
    bt_payload = payload + entry.rank * entry.in_features
    return (
        (entry.layer, at, SIDE_A, entry.in_features, entry.rank, rows, payload),
        (entry.layer, at, SIDE_BT, entry.out_features, entry.rank, rows, bt_payload),
    )


def _page_rows(entry: ModuleEntry, at: int, block_elements: int) -> int:
    """8, but fewer for outer modules whose rows are too wide for that."""
    width = max(entry.in_features, entry.out_features)
    rows = min(PAGE_ROWS, block_elements // width)
    needed = 1 if at == _NO_PLACE else min(PAGE_ROWS, entry.rank)
    if rows < needed:
        raise PageTooWideError(
            f"layer {entry.layer} {entry.module}: {needed} rows of {width} do not fit into a block"
            f" of {block_elements} elements"
        )
    return PAGE_ROWS if at != _NO_PLACE else rows


def _packed(sizes: Int64s, block_elements: int) -> tuple[Int64s, Int64s]:
    """Block and element of consecutive pages of these sizes."""
    taken = sizes + -sizes % ALIGN_ELEMENTS
    ends = np.cumsum(taken)
    starts = ends - taken
    firsts: list[int] = []  # the first page of each block
    page = 0
    while page < len(sizes):
        firsts.append(page)
        page = int(np.searchsorted(ends, starts[page] + block_elements, side="right"))
    block = np.repeat(np.arange(len(firsts)), np.diff(firsts, append=len(sizes)))
    return block, starts - starts[firsts][block]


def _scales(header: ContainerHeader) -> dict[tuple[int, int], float]:
    return {
        (entry.layer, _PLACE_OF[entry.module]): entry.scale
        for entry in header.modules
        if entry.module in _PLACE_OF
    }
