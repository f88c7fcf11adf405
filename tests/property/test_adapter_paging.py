"""Paging under any adapter: every rank row is in its place, none is in two, none across blocks."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.common.adapter_container import (
    EMBEDDING,
    EMBEDDING_LAYER,
    HEAD,
    ContainerHeader,
    LoraRows,
    encode,
    read_header,
)
from services.common.base_model import LINEARS
from services.worker.lora.paging import SIDE_A, PageTooWideError, place
from services.worker.lora.worklist import PAGE_ROWS

LAYERS = 3
BLOCK_ELEMENTS = 1024
VOCAB = 300

widths = st.sampled_from([8, 12, 16, 40, 100])  # one is no multiple of 8, another of 16
ranks = st.integers(1, 40)
modules = st.dictionaries(
    st.tuples(st.integers(0, LAYERS - 1), st.sampled_from(LINEARS)),
    st.tuples(ranks, widths, widths),
    min_size=1,
    max_size=8,
)
outers = st.dictionaries(
    st.sampled_from([(EMBEDDING_LAYER, EMBEDDING), (LAYERS, HEAD)]), ranks, max_size=2
)


def _container(
    linears: dict[tuple[int, str], tuple[int, int, int]], outer: dict[tuple[int, str], int]
) -> tuple[ContainerHeader, NDArray[np.float32]]:
    """An adapter whose payload counts its elements from 1."""
    shapes = dict(linears)
    for at, rank in outer.items():
        shapes[at] = (rank, VOCAB, 16) if at[1] == EMBEDDING else (rank, 16, VOCAB)
    rows: list[LoraRows] = []
    count = 1
    for (layer, module), (rank, width_in, width_out) in sorted(shapes.items()):
        a = np.arange(count, count + rank * width_in, dtype=np.float32)
        count += len(a)
        bt = np.arange(count, count + rank * width_out, dtype=np.float32)
        count += len(bt)
        scale = 0.5 + len(rows)
        rows.append(
            LoraRows(layer, module, rank, scale, width_in, width_out, a.tobytes(), bt.tobytes())
        )
    header = read_header(encode(rows, dtype="F32"))
    return header, np.arange(1, count, dtype=np.float32)


adapters = st.builds(_container, modules, outers)


@settings(deadline=None)
@given(adapters)
def test_pages_hold_every_rank_row_once_and_in_order(
    adapter: tuple[ContainerHeader, NDArray[np.float32]],
) -> None:
    header, _ = adapter
    pages = place(header, block_elements=BLOCK_ELEMENTS).pages
    payload_end = 0
    for start, rows, width in zip(pages.payload_element, pages.rows, pages.width, strict=True):
        assert start == payload_end
        assert 1 <= rows <= PAGE_ROWS
        payload_end += rows * width
    assert payload_end * 4 == header.payload_bytes


@settings(deadline=None)
@given(adapters)
def test_pages_lie_within_blocks_without_overlap_and_aligned(
    adapter: tuple[ContainerHeader, NDArray[np.float32]],
) -> None:
    placement = place(adapter[0], block_elements=BLOCK_ELEMENTS)
    pages = placement.pages
    starts = pages.block * BLOCK_ELEMENTS + pages.element
    ends = starts + pages.rows * pages.width
    assert bool((ends[:-1] <= starts[1:]).all())
    assert bool((starts // BLOCK_ELEMENTS == (ends - 1) // BLOCK_ELEMENTS).all())
    assert bool((starts % 8 == 0).all())
    assert int(pages.block[0]) == 0
    assert placement.blocks == int(pages.block[-1]) + 1


@settings(deadline=None)
@given(adapters, st.lists(st.integers(0, LAYERS - 1), max_size=2))
def test_copies_bring_what_the_table_finds(
    adapter: tuple[ContainerHeader, NDArray[np.float32]], parts: list[int]
) -> None:
    header, payload = adapter
    placement = place(header, block_elements=BLOCK_ELEMENTS)
    blocks = np.random.default_rng(0).permutation(placement.blocks + 3).tolist()
    pool = np.zeros((placement.blocks + 3) * BLOCK_ELEMENTS, dtype=np.float32)
    for first, until in pairwise([EMBEDDING_LAYER, *sorted(parts), LAYERS + 1]):
        for copy in placement.copies(first, until):
            at = blocks[copy.block] * BLOCK_ELEMENTS + copy.element
            pool[at : at + copy.elements] = payload[
                copy.payload_element : copy.payload_element + copy.elements
            ]
    table = placement.table(blocks, block_elements=BLOCK_ELEMENTS, num_layers=LAYERS)
    for entry in header.modules:
        if entry.module in LINEARS:
            row = table[entry.layer, LINEARS.index(entry.module)]
            assert np.array([row[0]]).astype(np.int32).view(np.float32)[0] == entry.scale
            at = entry.offset // 4
            a = payload[at : at + entry.rank * entry.in_features]
            assert np.array_equal(_found(pool, row, placement.table_pages, 0, entry.in_features), a)
            at += len(a)
            bt = payload[at : at + entry.rank * entry.out_features]
            assert np.array_equal(
                _found(pool, row, placement.table_pages, 1, entry.out_features), bt
            )
    adapted = {(e.layer, LINEARS.index(e.module)) for e in header.modules if e.module in LINEARS}
    for at_layer in range(LAYERS):
        for linear in range(len(LINEARS)):
            if (at_layer, linear) not in adapted:
                assert not table[at_layer, linear].any()


def _found(
    pool: NDArray[np.float32], row: NDArray[np.int64], pages: int, side: int, width: int
) -> NDArray[np.float32]:
    """All elements of a side of a module, as a kernel finds them."""
    parts = [
        pool[entry // 16 * 8 : entry // 16 * 8 + entry % 16 * width]
        for entry in row[1 + side * pages : 1 + (side + 1) * pages].tolist()
    ]
    return np.concatenate(parts)


@settings(deadline=None)
@given(adapters)
def test_outer_pages_can_be_found_by_their_columns(
    adapter: tuple[ContainerHeader, NDArray[np.float32]],
) -> None:
    header, _ = adapter
    pages = place(header, block_elements=BLOCK_ELEMENTS).pages
    for entry in header.modules:
        if entry.module not in LINEARS:
            mine = (pages.layer == entry.layer) & (pages.side == SIDE_A)
            assert int(pages.rows[mine].sum()) == entry.rank
            assert bool((pages.width[mine] == entry.in_features).all())


def test_one_block_is_one_copy_where_rows_are_multiples_of_eight() -> None:
    header, _ = _container({(0, "q_proj"): (20, 16, 40), (0, "v_proj"): (5, 16, 8)}, {})
    placement = place(header, block_elements=BLOCK_ELEMENTS)
    assert len(placement.copies(0, 1)) == placement.blocks == 2


def test_an_adapter_of_the_head_only_has_an_empty_table() -> None:
    header, _ = _container({}, {(LAYERS, HEAD): 9})
    placement = place(header, block_elements=BLOCK_ELEMENTS)
    table = placement.table(range(placement.blocks), block_elements=1024, num_layers=LAYERS)
    assert table.shape == (LAYERS, len(LINEARS), 1)
    assert not table.any()


def test_a_page_that_is_wider_than_a_block_is_refused_by_name() -> None:
    header, _ = _container({(1, "down_proj"): (9, 100, 16)}, {})
    with pytest.raises(PageTooWideError, match=r"layer 1 down_proj: 8 rows of 100 do not fit"):
        place(header, block_elements=512)


def test_a_row_of_the_head_that_is_wider_than_a_block_is_refused_by_name() -> None:
    header, _ = _container({}, {(LAYERS, HEAD): 1})
    with pytest.raises(PageTooWideError, match=r"layer 3 lm_head: 1 rows of 300 do not fit"):
        place(header, block_elements=256)
