"""The LoRA kernels against fp64: any ranks together, and nothing read that is not there."""

import pytest
import torch

from services.worker.lora.triton_lora import LinearGroup, LoraStep, add_masked_dense, expand, shrink
from services.worker.lora.worklist import WorkShape
from tests.engine.triton_world import (
    DEVICE,
    TOLERANCES,
    Adapters,
    Shapes,
    assert_close,
    group_of,
    random,
)

RANKS = (1, 4, 8, 12, 16, 40, 64, 128)
SHAPES: Shapes = {"q_proj": (48, 40), "k_proj": (48, 24), "v_proj": (48, 24), "o_proj": (40, 48)}
QKV = ("q_proj", "k_proj", "v_proj")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _adapters(dtype: torch.dtype, *ranks: int) -> Adapters:
    adapters = Adapters(SHAPES, dtype)
    for rank in ranks:
        adapters.add(dict.fromkeys(SHAPES, rank))
    return adapters


def _added(
    y: torch.Tensor, x: torch.Tensor, step: LoraStep, group: LinearGroup, *, layer: int
) -> torch.Tensor:
    y, x = y.to(DEVICE), x.to(DEVICE)
    shrink(x, step, group, layer=layer)
    expand(y, step, group, layer=layer)
    return y.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_of_all_ranks_in_one_step_equal_fp64(dtype: torch.dtype) -> None:
    adapters = _adapters(dtype, *RANKS)
    slots = [3, 0, -1, 7, 1, 2, 5, 4, 6, 3]
    x, y = random(len(slots), 48, dtype=dtype), random(len(slots), 88, dtype=dtype, seed=1)
    got = _added(y.clone(), x, adapters.step(slots), group_of(SHAPES, QKV), layer=1)
    assert_close(got, y.double() + adapters.delta(x, slots, QKV, 1), dtype)


@pytest.mark.parametrize("rank", RANKS)
def test_one_adapter_of_any_rank_equals_fp64(rank: int) -> None:
    adapters = _adapters(torch.float32, rank)
    x, y = random(2, 40, dtype=torch.float32), random(2, 48, dtype=torch.float32, seed=1)
    got = _added(y.clone(), x, adapters.step([0, 0]), group_of(SHAPES, ("o_proj",)), layer=0)
    assert_close(got, y.double() + adapters.delta(x, [0, 0], ["o_proj"], 0), torch.float32)


def test_rows_of_the_base_model_keep_their_bits() -> None:
    adapters = _adapters(torch.bfloat16, 8)
    x, y = random(3, 48, dtype=torch.bfloat16), random(3, 88, dtype=torch.bfloat16, seed=1)
    got = _added(y.clone(), x, adapters.step([-1, 0, -1]), group_of(SHAPES, QKV), layer=0)
    assert torch.equal(got[[0, 2]], y[[0, 2]])
    assert not torch.equal(got[1], y[1])


def test_a_step_of_base_rows_only_changes_nothing() -> None:
    adapters = _adapters(torch.float32, 8)
    x, y = random(3, 48, dtype=torch.float32), random(3, 88, dtype=torch.float32, seed=1)
    got = _added(y.clone(), x, adapters.step([-1, -1, -1]), group_of(SHAPES, QKV), layer=0)
    assert torch.equal(got, y)


def test_modules_of_an_adapter_may_have_ranks_of_their_own_or_none() -> None:
    adapters = Adapters(SHAPES, torch.float32)
    adapters.add({"q_proj": 20, "v_proj": 3})
    adapters.add({"k_proj": 9})
    adapters.add({"o_proj": 4})
    slots = [1, 0, 2, 1]
    x, y = random(4, 48, dtype=torch.float32), random(4, 88, dtype=torch.float32, seed=1)
    got = _added(y.clone(), x, adapters.step(slots), group_of(SHAPES, QKV), layer=1)
    assert_close(got, y.double() + adapters.delta(x, slots, QKV, 1), torch.float32)


def test_many_rows_of_one_adapter_take_several_tiles() -> None:
    adapters = _adapters(torch.float32, 12, 5)
    slots = [0] * 19 + [1] * 3 + [0] * 18 + [-1]
    x, y = random(41, 48, dtype=torch.float32), random(41, 88, dtype=torch.float32, seed=1)
    got = _added(y.clone(), x, adapters.step(slots), group_of(SHAPES, QKV), layer=0)
    assert_close(got, y.double() + adapters.delta(x, slots, QKV, 0), torch.float32)


def test_large_tiles_with_many_pages_give_the_same() -> None:
    adapters = _adapters(torch.float32, 12, 128)
    slots = [1] * 50 + [0] * 20
    x, y = random(70, 48, dtype=torch.float32), random(70, 88, dtype=torch.float32, seed=1)
    step = adapters.step(slots, tile_rows=64, item_pages=8, splits=1)
    got = _added(y.clone(), x, step, group_of(SHAPES, QKV), layer=0)
    assert_close(got, y.double() + adapters.delta(x, slots, QKV, 0), torch.float32)


def test_a_plan_in_a_larger_array_gives_the_same() -> None:
    adapters = _adapters(torch.float32, 12, 5)
    slots, group = [1, 0, -1], group_of(SHAPES, QKV)
    x, y = random(3, 48, dtype=torch.float32), random(3, 88, dtype=torch.float32, seed=1)
    large = adapters.step(slots, shape=WorkShape(rows=16, items=64, page_rows=32))
    small = adapters.step(slots)
    got = _added(y.clone(), x, large, group, layer=0)
    assert torch.equal(got, _added(y.clone(), x, small, group, layer=0))


def test_what_a_row_gets_does_not_depend_on_its_batch_mates() -> None:
    adapters = _adapters(torch.float16, 40, 64, 8)
    group = group_of(SHAPES, QKV)
    x, y = random(4, 48, dtype=torch.float16), random(4, 88, dtype=torch.float16, seed=1)
    together = _added(y.clone(), x, adapters.step([1, 0, 2, 0]), group, layer=0)
    alone = _added(y[1:2].clone(), x[1:2], adapters.step([0]), group, layer=0)
    assert torch.equal(together[1:2], alone)


def test_what_a_projection_adds_may_go_into_the_fp32_residual_stream() -> None:
    adapters = _adapters(torch.bfloat16, 16)
    x, hidden = random(2, 40, dtype=torch.bfloat16), random(2, 48, dtype=torch.float32, seed=1)
    got = _added(hidden.clone(), x, adapters.step([0, 0]), group_of(SHAPES, ("o_proj",)), layer=0)
    assert got.dtype == torch.float32
    assert_close(got, hidden.double() + adapters.delta(x, [0, 0], ["o_proj"], 0), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_dense_products_of_torch_equal_fp64(dtype: torch.dtype) -> None:
    adapters = _adapters(dtype, *RANKS)
    slots = [3, 0, -1, 7, 1, 2, 5, 4, 6, 3]
    x, y = random(len(slots), 48, dtype=dtype), random(len(slots), 88, dtype=dtype, seed=1)
    expected = y.double() + adapters.delta(x, slots, QKV, 1)
    add_masked_dense(
        y,
        x,
        adapters.pool,
        group_of(SHAPES, QKV),
        layer=1,
        tables=adapters.tables,
        row_slots=slots,
    )
    assert_close(y, expected, dtype)


def test_the_tolerance_would_notice_a_missing_rank() -> None:
    adapters = _adapters(torch.bfloat16, 16)
    x = random(4, 48, dtype=torch.bfloat16)
    delta = adapters.delta(x, [0] * 4, QKV, 0)
    a, bt, scale = adapters.rows[0][0, "q_proj"]
    adapters.rows[0][0, "q_proj"] = (a[:-1], bt[:-1], scale)
    difference = (adapters.delta(x, [0] * 4, QKV, 0) - delta).abs().max()
    assert float(difference) > 2 * TOLERANCES[torch.bfloat16] * max(1.0, float(delta.abs().max()))
