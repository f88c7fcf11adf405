"""The plan of a step: every row once, with all pages of its adapter, at fixed places."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.lora.worklist import (
    ADAPTER_TILE_COUNT,
    COUNTS,
    FIELDS,
    ITEM_COUNT,
    TILE_COUNT,
    Work,
    WorkShape,
    WorkTooLargeError,
    plan,
)

TABLES = [700, 0, 300, 100]  # of the adapters in slots 0 to 3
PAGES = [2, 1, 16, 5]


def _plan(slots: Sequence[int], *, tile_rows: int = 4, item_pages: int = 2) -> Work:
    tables, pages = np.array(TABLES, dtype=np.int32), np.array(PAGES, dtype=np.int32)
    row_slots = np.array(slots, dtype=np.int32)
    return plan(row_slots, tables, pages, tile_rows=tile_rows, item_pages=item_pages)


rows = st.lists(st.integers(-1, 3), max_size=60)


@settings(deadline=None)
@given(rows, st.sampled_from([1, 4, 16]))
def test_every_row_is_in_one_tile_of_its_adapter(slots: list[int], tile_rows: int) -> None:
    work = _plan(slots, tile_rows=tile_rows)
    seen: list[int] = []
    for index, (first, count, table, pages, *_) in enumerate(work.tiles.tolist()):
        members = work.rows[first : first + count].tolist()
        seen += members
        assert 1 <= count <= tile_rows
        (slot,) = {slots[row] for row in members}
        expected = (TABLES[slot], PAGES[slot]) if slot >= 0 else (0, 0)
        assert (table, pages) == expected
        assert (index < work.adapter_tiles) == (slot >= 0)
    assert sorted(seen) == list(range(len(slots)))


@settings(deadline=None)
@given(rows, st.sampled_from([1, 2, 8]))
def test_items_cover_every_page_of_every_adapter_tile_once(
    slots: list[int], item_pages: int
) -> None:
    work = _plan(slots, item_pages=item_pages)
    covered = [
        (*item[:5], page)
        for item in work.items.tolist()
        for page in range(item[5], min(item[5] + item_pages, item[3]))
    ]
    expected = [
        (*tile[:5], page)
        for tile in work.tiles[: work.adapter_tiles].tolist()
        for page in range(tile[3])
    ]
    assert covered == expected


@settings(deadline=None)
@given(rows)
def test_products_of_tiles_do_not_overlap(slots: list[int]) -> None:
    work = _plan(slots)
    end = 0
    for _, count, _, pages, page_row, *_ in work.tiles[: work.adapter_tiles].tolist():
        assert page_row == end
        end += count * pages
    assert work.page_rows == end


def test_rows_of_one_adapter_come_together_in_their_order() -> None:
    work = _plan([2, -1, 0, 2, 0, -1])
    assert work.rows.tolist() == [2, 4, 0, 3, 1, 5]


def test_the_sections_of_a_packed_plan_depend_on_the_shape_alone() -> None:
    shape = WorkShape(rows=9, items=20, page_rows=64)
    for slots in ([1, 0, 1], [2, -1, 3, 0]):
        work = _plan(slots)
        packed = work.pack(shape)
        assert len(packed) == shape.size
        assert packed[[ITEM_COUNT, ADAPTER_TILE_COUNT, TILE_COUNT]].tolist() == [
            len(work.items),
            work.adapter_tiles,
            len(work.tiles),
        ]
        assert packed[COUNTS : COUNTS + len(slots)].tolist() == work.rows.tolist()
        tiles = packed[shape.tiles_at : shape.items_at].reshape(-1, FIELDS)
        assert np.array_equal(tiles[: len(work.tiles)], work.tiles)
        items = packed[shape.items_at :].reshape(-1, FIELDS)
        assert np.array_equal(items[: len(work.items)], work.items)


def test_a_plan_may_take_the_place_of_an_older_one() -> None:
    shape = WorkShape(rows=9, items=20, page_rows=64)
    out = _plan([2, -1, 3, 0, 1, 2]).pack(shape)
    work = _plan([1, 1])
    assert work.pack(shape, out=out) is out
    assert out[[ITEM_COUNT, ADAPTER_TILE_COUNT, TILE_COUNT]].tolist() == [1, 1, 1]
    assert np.array_equal(out[shape.tiles_at : shape.tiles_at + FIELDS], work.tiles[0])
    assert np.array_equal(out[shape.items_at : shape.items_at + FIELDS], work.items[0])


def test_tiles_and_items_begin_at_sectors_of_memory() -> None:
    shape = WorkShape(rows=9, items=20, page_rows=64)
    assert shape.tiles_at % FIELDS == 0
    assert shape.items_at % FIELDS == 0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (WorkShape(2, 64, 64), "3 rows, there is room for 2"),
        (WorkShape(4, 8, 64), "10 items, there is room for 8"),
        (WorkShape(4, 64, 18), "19 page rows, there is room for 18"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(shape: WorkShape, message: str) -> None:
    with pytest.raises(WorkTooLargeError, match=message):
        _plan([2, 0, 1], tile_rows=4, item_pages=2).pack(shape)


@settings(deadline=None)
@given(rows)
def test_a_bucket_holds_its_plan(slots: list[int]) -> None:
    work = _plan(slots)
    bucket = work.bucket
    assert len(work.pack(bucket)) == bucket.size
    assert all(size & (size - 1) == 0 for size in (bucket.rows, bucket.items, bucket.page_rows))
