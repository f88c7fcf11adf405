"""The kernels between linears against fp64, alone and with the adapters of a step."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from services.worker.engine.triton_ops import (
    CacheShape,
    GroupLora,
    HeadRules,
    add_norm,
    finish_gate_up,
    finish_qkv,
)
from services.worker.lora.triton_lora import shrink
from tests.engine.triton_world import (
    DEVICE,
    Adapters,
    Shapes,
    assert_close,
    group_of,
    random,
)

HEADS, KV_HEADS, HEAD_DIM, FFN = 4, 2, 16, 40
CACHE = CacheShape(2, KV_HEADS, 4, HEAD_DIM)
LAYER = 1
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
SHAPES: Shapes = {
    "q_proj": (48, HEADS * HEAD_DIM),
    "k_proj": (48, KV_HEADS * HEAD_DIM),
    "v_proj": (48, KV_HEADS * HEAD_DIM),
    "gate_proj": (48, FFN),
    "up_proj": (48, FFN),
}
POSITIONS = [0, 5, 17, 3, 9]
SLOTS = [3, 12, 22, -1, 7]  # of the cache; the fourth row is not kept
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _rules(*, has_norm: bool = False, rotates: bool = True) -> HeadRules:
    angles = torch.outer(torch.arange(32.0), 1.0 / 100 ** (torch.arange(HEAD_DIM // 2) / 8))
    norms = 1 + random(2, HEAD_DIM, dtype=torch.float32, seed=3) / 4
    return HeadRules(
        norms.to(DEVICE) if has_norm else None,
        1e-6,
        angles.cos().to(DEVICE) if rotates else None,
        angles.sin().to(DEVICE) if rotates else None,
    )


def _expected(qkv: Tensor, rules: HeadRules) -> Tensor:
    """`[rows, heads, head_dim]` fp64 of q, k and v."""
    heads = qkv.double().view(len(qkv), -1, HEAD_DIM)
    turned = heads[:, : HEADS + KV_HEADS]
    if rules.norms is not None:
        weight = rules.norms.cpu().double().repeat_interleave(torch.tensor([HEADS, KV_HEADS]), 0)
        turned = turned / (turned.square().mean(-1, keepdim=True) + rules.eps).sqrt() * weight
    if rules.cos is not None and rules.sin is not None:
        cos = rules.cos.cpu().double()[POSITIONS].unsqueeze(1)
        sin = rules.sin.cpu().double()[POSITIONS].unsqueeze(1)
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned, heads[:, HEADS + KV_HEADS :]], dim=1)


def _finished(
    qkv: Tensor, rules: HeadRules, lora: GroupLora | None = None
) -> tuple[Tensor, Tensor]:
    """q `[rows, heads, head_dim]`, and the pool, which was NaN before."""
    pool = lora.step.pool if lora else torch.full((8 * CACHE.block_elements,), float("nan")).to(qkv)
    qkv, pool = qkv.clone().to(DEVICE), pool.clone().to(DEVICE)
    finish_qkv(
        qkv,
        torch.tensor(POSITIONS, dtype=torch.int32, device=DEVICE),
        torch.tensor(SLOTS, dtype=torch.int32, device=DEVICE),
        pool,
        rules=rules,
        cache=CACHE,
        layer=LAYER,
        lora=lora,
    )
    q = qkv[:, : HEADS * HEAD_DIM].view(-1, HEADS, HEAD_DIM)
    return q.cpu(), pool.cpu()


def _cached(pool: Tensor) -> Tensor:
    """Keys and values of the rows that were kept, `[kept, 2 * kv_heads, head_dim]`."""
    blocks = pool[: len(pool) // CACHE.block_elements * CACHE.block_elements].view(
        -1, CACHE.layers, 2, KV_HEADS, CACHE.block_tokens, HEAD_DIM
    )
    kept = [blocks[slot // 4, LAYER, :, :, slot % 4] for slot in SLOTS if slot >= 0]
    return torch.stack(kept).view(len(kept), -1, HEAD_DIM)


def _kept(expected: Tensor) -> Tensor:
    return expected[[i for i, slot in enumerate(SLOTS) if slot >= 0], HEADS:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_added", [False, True])
def test_a_norm_behind_a_sum_equals_fp64(dtype: torch.dtype, *, has_added: bool) -> None:
    hidden = random(3, 72, dtype=torch.float32)
    added = random(3, 72, dtype=dtype, seed=1)
    weight = random(72, dtype=torch.float32, seed=2)
    summed = hidden.double() + (added.double() if has_added else 0)
    expected = summed / (summed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    hidden = hidden.clone().to(DEVICE)
    out = torch.empty(3, 72, dtype=dtype, device=DEVICE)
    add_norm(hidden, added.to(DEVICE) if has_added else None, weight.to(DEVICE), out, eps=1e-5)
    assert_close(out, expected, dtype)
    assert_close(hidden, summed, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("has_norm", "rotates"), [(False, True), (True, True), (True, False)])
def test_q_is_finished_in_place_and_k_and_v_go_to_the_cache(
    dtype: torch.dtype, *, has_norm: bool, rotates: bool
) -> None:
    qkv = random(5, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype)
    rules = _rules(has_norm=has_norm, rotates=rotates)
    expected = _expected(qkv, rules)
    q, pool = _finished(qkv, rules)
    assert_close(q, expected[:, :HEADS], dtype)
    assert_close(_cached(pool), _kept(expected), dtype)


def test_nothing_else_of_the_cache_is_written() -> None:
    qkv = random(5, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=torch.float32)
    _, pool = _finished(qkv, _rules())
    kept = sum(slot >= 0 for slot in SLOTS)
    assert int(pool.isfinite().sum()) == kept * 2 * KV_HEADS * HEAD_DIM


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_gate_times_up_equals_fp64(dtype: torch.dtype) -> None:
    gate_up = random(18, 2 * FFN, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    out = torch.empty(18, FFN, dtype=dtype, device=DEVICE)
    finish_gate_up(gate_up.to(DEVICE), out)
    assert_close(out, gate * gate.sigmoid() * up, dtype)


def _lora(adapters: Adapters, x: Tensor, slots: Sequence[int], modules: Sequence[str]) -> GroupLora:
    step = adapters.step(slots)
    group = group_of(SHAPES, modules)
    shrink(x.to(DEVICE), step, group, layer=LAYER)
    return GroupLora(step, group, LAYER)


def _adapters(dtype: torch.dtype) -> Adapters:
    adapters = Adapters(SHAPES, dtype, first_block=8)
    adapters.add(dict.fromkeys(SHAPES, 12))
    adapters.add(dict.fromkeys(SHAPES, 40))
    adapters.add({"q_proj": 3, "up_proj": 8})
    return adapters


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_are_part_of_q_k_and_v(dtype: torch.dtype) -> None:
    adapters, slots = _adapters(dtype), [1, -1, 0, 2, 1]
    x = random(5, 48, dtype=dtype, seed=4)
    qkv = random(5, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype)
    rules = _rules(has_norm=True)
    expected = _expected(qkv.double() + adapters.delta(x, slots, QKV, LAYER), rules)
    q, pool = _finished(qkv, rules, _lora(adapters, x, slots, QKV))
    assert_close(q, expected[:, :HEADS], dtype)
    assert_close(_cached(pool), _kept(expected), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_are_part_of_gate_and_up(dtype: torch.dtype) -> None:
    adapters, slots = _adapters(dtype), [1, -1, 0, 2, 1] * 5
    x = random(25, 48, dtype=dtype, seed=4)
    gate_up = random(25, 2 * FFN, dtype=dtype)
    summed = gate_up.double() + adapters.delta(x, slots, GATE_UP, LAYER)
    gate, up = summed.chunk(2, dim=1)
    out = torch.empty(25, FFN, dtype=dtype, device=DEVICE)
    finish_gate_up(gate_up.to(DEVICE), out, lora=_lora(adapters, x, slots, GATE_UP))
    assert_close(out, gate * gate.sigmoid() * up, dtype)


def test_base_rows_of_a_step_with_adapters_get_what_they_get_alone() -> None:
    adapters = _adapters(torch.bfloat16)
    x = random(5, 48, dtype=torch.bfloat16, seed=4)
    qkv = random(5, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=torch.bfloat16)
    with_adapters, _ = _finished(qkv, _rules(), _lora(adapters, x, [0, -1, 1, -1, 0], QKV))
    alone, _ = _finished(qkv, _rules())
    assert_close(with_adapters[[1, 3]], alone[[1, 3]].double(), torch.bfloat16)
    assert not torch.equal(with_adapters[0], alone[0])
