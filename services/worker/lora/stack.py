"""The rank rows of all adapters of a batch, side by side, so that one product computes them all.

Stacked once per set of adapters, not per step: the stack is kept while it covers what is needed and
is not mostly rows that no request uses. It is a copy, in memory beside the adapters themselves;
only what is one adapter's alone is taken as it is. Scales that differ are folded into the copied
rows of A, not of Bᵀ: products with A are masked, so an overflow there stays with its adapter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.common.base_model import ModelConfig
from services.worker.engine.linear import Linear, PackedLinear, can_pack
from services.worker.lora.layout import GROUPS, LoraPair, output_slices
from services.worker.lora.weights import AdapterWeights

# Steps that a set of adapters must last before its rows are packed for the CPU's matrix product:
# that takes one or two steps' time and saves 5 % (32 rows) to 25 % (8 rows) of each later one.
_PACK_AFTER_STEPS = 16
_PACK_BYTES_MAX = 2**28  # packed rows are one more copy

# Whose ranks are where: (place of the adapter in the stack, how many ranks), in order of columns.
Owners = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Expand:
    """`y[:, outputs] += scale * s[:, ranks] @ bt`, for one module."""

    ranks: slice
    outputs: slice
    bt: Tensor
    packed: Linear | None = None

    def add_to(self, y: Tensor, s: Tensor, *, scale: float) -> None:
        if self.packed is None:
            y[:, self.outputs].addmm_(s[:, self.ranks], self.bt, alpha=scale)
        else:
            y[:, self.outputs].add_(self.packed(s[:, self.ranks]), alpha=scale)

    def pack(self) -> "Expand":
        return replace(self, packed=PackedLinear(self.bt.t().contiguous()))


@dataclass(frozen=True, slots=True)
class StackedGroup:
    """One group of linears in one layer. Rank rows are ordered by module, then by adapter.

    `scale` is what is left to apply: that of all pairs, or 1 where it is part of `a`.
    """

    a: Tensor
    scale: float
    owners: Owners
    expands: tuple[Expand, ...]
    packed: Linear | None = None

    def shrink(self, x: Tensor) -> Tensor:
        """`x [rows, in] -> [rows, ranks]`"""
        return x @ self.a.t() if self.packed is None else self.packed(x)

    def pack(self) -> "StackedGroup":
        expands = tuple(expand.pack() for expand in self.expands)
        return replace(self, expands=expands, packed=PackedLinear(self.a))


class AdapterStack:
    def __init__(self, config: ModelConfig) -> None:
        self._num_layers = config.num_layers
        self.outputs = output_slices(config)
        self._adapters: dict[str, AdapterWeights] = {}
        self._layers: list[dict[str, StackedGroup]] = []
        self._memory = torch.empty(0)
        self._steps = 0

    def cover(self, needed: Mapping[str, AdapterWeights]) -> None:
        """Make the stack hold all of `needed`, and pack it once it has lasted."""
        held_ranks = sum(adapter.rank for adapter in self._adapters.values())
        needed_ranks = sum(adapter.rank for adapter in needed.values())
        if needed.keys() <= self._adapters.keys() and held_ranks <= 2 * needed_ranks:
            self._steps += 1
            if self._steps == _PACK_AFTER_STEPS:
                self._pack()
            return
        self._adapters = dict(needed)
        self._steps = 0
        self._stack()

    def drop(self, digest: str) -> None:
        """Forget everything if this adapter is part of it."""
        if digest in self._adapters:
            self._adapters = {}
            self._layers = []

    def places(self) -> dict[str | None, int]:
        """Place of each adapter; that of the base model owns no ranks."""
        return {None: -1} | {digest: place for place, digest in enumerate(self._adapters)}

    def group(self, layer: int, group: str) -> StackedGroup | None:
        return self._layers[layer].get(group)

    def _stack(self) -> None:
        arena = _Arena(self._memory, list(self._adapters.values()))
        self._memory = arena.memory
        self._layers = [
            {
                group: stacked
                for group, modules in GROUPS.items()
                if (stacked := self._stack_group(layer, modules, arena))
            }
            for layer in range(self._num_layers)
        ]

    def _stack_group(
        self, layer: int, modules: tuple[str, ...], arena: "_Arena"
    ) -> StackedGroup | None:
        pairs: list[LoraPair] = []
        owners: list[tuple[int, int]] = []
        expands: list[Expand] = []
        ranks = 0
        for module in modules:
            first = ranks
            bt_rows: list[Tensor] = []
            for place, adapter in enumerate(self._adapters.values()):
                if pair := adapter.layers[layer].get(module):
                    pairs.append(pair)
                    bt_rows.append(pair.bt)
                    owners.append((place, pair.rank))
                    ranks += pair.rank
            if bt_rows:
                bt = arena.stack(bt_rows)
                expands.append(Expand(slice(first, ranks), self.outputs[module], bt))
        if not expands:
            return None
        a, scale = arena.stack_scaled(pairs)
        return StackedGroup(a, scale, tuple(owners), tuple(expands))

    def _pack(self) -> None:
        memory = self._memory
        is_packable = memory.device.type == "cpu" and memory.dtype == torch.bfloat16
        if is_packable and memory.nbytes <= _PACK_BYTES_MAX and can_pack():
            self._layers = [{g: s.pack() for g, s in layer.items()} for layer in self._layers]


class _Arena:
    """Memory for a whole stack, kept from one to the next: fresh pages cost more than the copy."""

    def __init__(self, memory: Tensor, adapters: list[AdapterWeights]) -> None:
        pairs = [
            pair for adapter in adapters for layer in adapter.layers for pair in layer.values()
        ]
        size = sum(pair.a.numel() + pair.bt.numel() for pair in pairs)
        # An adapter of the embedding and the head only has nothing to stack.
        self.memory = memory if memory.numel() >= size else pairs[0].a.new_empty(size)
        self._used = 0
        self._scales: dict[tuple[tuple[float, int], ...], Tensor] = {}

    def stack(self, rows: list[Tensor]) -> Tensor:
        """Row-wise concatenation; one tensor is taken as it is."""
        if len(rows) == 1:
            return rows[0]
        shape = (sum(len(item) for item in rows), rows[0].shape[1])
        first, self._used = self._used, self._used + shape[0] * shape[1]
        return torch.cat(rows, out=self.memory[first : self._used].view(shape))

    def stack_scaled(self, pairs: list[LoraPair]) -> tuple[Tensor, float]:
        """A of all pairs, and the scale that is left to apply."""
        stacked = self.stack([pair.a for pair in pairs])
        if len({pair.scale for pair in pairs}) == 1:
            return stacked, pairs[0].scale
        return stacked.mul_(self._column(tuple((pair.scale, pair.rank) for pair in pairs))), 1.0

    def _column(self, scales: tuple[tuple[float, int], ...]) -> Tensor:
        """`[ranks, 1]`, the scale of each rank; most layers have the same."""
        if scales not in self._scales:
            column = [[scale] for scale, ranks in scales for _ in range(ranks)]
            self._scales[scales] = torch.tensor(
                column, dtype=torch.float32, device=self.memory.device
            )
        return self._scales[scales]
