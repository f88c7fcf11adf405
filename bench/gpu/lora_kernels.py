"""LoRA of a whole model's decoding step, kernels alone: ours, masked dense, and grouped products.

Every variant goes through all linears of all layers, each with rank rows of its own, so that no
cache holds them. *Floor*: the bytes of all rank rows at the bandwidth that was measured. The error
is that of one group of one layer against fp64, over the largest value.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.ceilings import Ceilings
from bench.gpu.extent import Extent
from bench.gpu.lora_world import LoraWorld, build
from bench.gpu.timing import Work, by_turns
from bench.report import Row, Target
from services.worker.lora.triton_lora import expand, shrink

_Values = dict[str, Tensor]
_Variant = Callable[[int, str, Tensor, Tensor], None]  # layer, group, x, y: adds to y
_FLOOR_RATIO = 1.5
_LARGE_RANKS = 512  # from here on the floor has a target


def measure(
    extent: Extent, ceilings: Ceilings, is_time_left: Callable[[], bool]
) -> tuple[list[Row], list[Target]]:
    """All combinations that there is time for; an adapter has one row at least."""
    rows: list[Row] = []
    ratios: list[float] = []
    for (name, ranks), adapters, batch in itertools.product(
        extent.ranks, extent.adapters, extent.rows
    ):
        if adapters > batch:
            continue
        if not is_time_left():
            rows.append(_row(name, adapters, batch, "skipped: no time was left"))
            continue
        try:
            world = build(extent, adapters=adapters, ranks=ranks, rows=batch)
        except torch.OutOfMemoryError:
            rows.append(_row(name, adapters, batch, "skipped: no memory was left"))
            continue
        found = _one(extent, world, name, ceilings)
        rows += found
        if world.sum_ranks >= _LARGE_RANKS:
            ratios += [float(row["over_floor"]) for row in found if row["variant"] == "ours"]
    if not ratios:
        return rows, []
    name = f"LoRA time over its byte floor, sum of ranks {_LARGE_RANKS} or more, the worst"
    return rows, [Target(name, _FLOOR_RATIO, max(ratios), "", is_upper=True)]


def _row(name: str, adapters: int, batch: int, variant: str, **values: float) -> Row:
    empty = dict.fromkeys(("ms", "MB", "share_of_bandwidth", "over_floor", "error", "spread"))
    return {
        "ranks": name, "adapters": adapters, "rows": batch, "variant": variant, **(empty | values)
    }  # fmt: skip


def _one(extent: Extent, world: LoraWorld, name: str, ceilings: Ceilings) -> list[Row]:
    batch = len(world.row_slots)
    inputs: _Values = {}
    outputs: _Values = {}
    for group, shape in world.groups.items():
        options: dict[str, Any] = {"device": extent.device, "dtype": extent.dtype}
        inputs[group] = torch.empty((batch, shape.in_features), **options).normal_()
        outputs[group] = torch.zeros((batch, sum(shape.out_features)), **options)
    variants = _variants(extent, world)
    works = {key: _through_all(world, one, inputs, outputs) for key, one in variants.items()}
    times = by_turns(works, extent)
    floor_s = world.bytes_per_step / ceilings.memory_bytes_s
    return [
        _row(
            name,
            len(world.ranks),
            batch,
            key,
            ms=taken.median_s * 1e3,
            MB=world.bytes_per_step / 1e6,
            share_of_bandwidth=floor_s / taken.median_s,
            over_floor=taken.median_s / floor_s,
            error=_error(world, variants[key], inputs),
            spread=taken.spread,
        )
        for key, taken in times.items()
    ]


def _through_all(world: LoraWorld, variant: _Variant, inputs: _Values, outputs: _Values) -> Work:
    def work() -> None:
        for layer in range(len(world.dense)):
            for group in world.groups:
                variant(layer, group, inputs[group], outputs[group])

    return work


def _variants(extent: Extent, world: LoraWorld) -> dict[str, _Variant]:
    found: dict[str, _Variant] = {"ours": _ours(world), "masked dense": _masked_dense(world)}
    if extent.is_gpu and len(set(world.ranks)) == 1:  # it has one rank for all
        found["torch._grouped_mm"] = _grouped(world)
    return found


def _ours(world: LoraWorld) -> _Variant:
    def add(layer: int, group: str, x: Tensor, y: Tensor) -> None:
        shrink(x, world.step, world.groups[group], layer=layer)
        expand(y, world.step, world.groups[group], layer=layer)

    return add


def _masked_dense(world: LoraWorld) -> _Variant:
    device = world.step.pool.device
    owner = torch.repeat_interleave(torch.arange(len(world.ranks)), torch.tensor(world.ranks))
    rows = torch.from_numpy(world.row_slots).long()
    mask = (rows[:, None] == owner[None, :]).to(device, world.step.pool.dtype)

    def add(layer: int, group: str, x: Tensor, y: Tensor) -> None:
        dense = world.dense[layer][group]
        s = x @ dense.a.t()
        ranks = len(owner)
        first = 0
        for module, bt in enumerate(dense.bts):
            part = s[:, module * ranks : (module + 1) * ranks] * mask
            y[:, first : first + bt.shape[1]].addmm_(part, bt)
            first += bt.shape[1]

    return add


def _grouped(world: LoraWorld) -> _Variant:
    """Rows are in the order of their adapters already."""
    count, rank = len(world.ranks), world.ranks[0]
    ends = torch.searchsorted(
        torch.from_numpy(world.row_slots).contiguous(), torch.arange(count).int(), right=True
    )
    offsets = ends.int().to(world.step.pool.device)
    multiply: Any = vars(torch)["_grouped_mm"]  # it has no public name

    def add(layer: int, group: str, x: Tensor, y: Tensor) -> None:
        dense = world.dense[layer][group]
        first = 0
        for module, bt in enumerate(dense.bts):
            a = dense.a[module * count * rank : (module + 1) * count * rank].view(count, rank, -1)
            s = multiply(x, a.transpose(1, 2), offs=offsets)
            y[:, first : first + bt.shape[1]] += multiply(s, bt.view(count, rank, -1), offs=offsets)
            first += bt.shape[1]

    return add


def _error(world: LoraWorld, variant: _Variant, inputs: _Values) -> float:
    """Of qkv in the last layer."""
    group, layer = "qkv", len(world.dense) - 1
    x, dense = inputs[group], world.dense[layer][group]
    got = torch.zeros(
        (len(x), sum(world.groups[group].out_features)), dtype=x.dtype, device=x.device
    )
    variant(layer, group, x, got)
    expected = torch.zeros_like(got, dtype=torch.float64)
    _masked_double(world, dense.a, dense.bts, x, expected)
    return float((got.double() - expected).abs().max() / expected.abs().max())


def _masked_double(
    world: LoraWorld, a: Tensor, bts: tuple[Tensor, ...], x: Tensor, y: Tensor
) -> None:
    owner = torch.repeat_interleave(torch.arange(len(world.ranks)), torch.tensor(world.ranks))
    mask = torch.from_numpy(world.row_slots).long()[:, None] == owner[None, :]
    s = x.double() @ a.double().t()
    first = 0
    for module, bt in enumerate(bts):
        part = s[:, module * len(owner) : (module + 1) * len(owner)] * mask.to(x.device)
        y[:, first : first + bt.shape[1]] = part @ bt.double()
        first += bt.shape[1]
