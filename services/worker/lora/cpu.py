"""LoRA of one mixed step in plain torch, on the CPU and on any other device.

Short segments (decoding rows above all) are computed together: every row is multiplied by the rank
rows of all adapters in the batch, and a mask silences the ranks of other adapters. Small batches
are bound by reading weights, so the products that the mask discards are nearly free, and the number
of operations does not depend on the number of adapters. A row of the base model is a row whose mask
silences everything. The mask replaces values, so an overflow in a discarded product stays there.

Long segments (prefill chunks) are computed one by one with their own adapter.

A linear that no adapter in the step adapts costs nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.lora.layout import GROUPS
from services.worker.lora.stack import AdapterStack, Owners
from services.worker.lora.weights import AdapterWeights

# Rows times ranks of other adapters above which a segment's own products cost less than those
# discarded: 420 small operations against 1.4 us per row and rank, with SmolLM2 on one core.
_DISCARDED_ROW_RANKS_MAX = 8192


@dataclass(frozen=True, slots=True)
class LoraSegment:
    """Consecutive rows of a step that use one adapter. `digest` None: the base model."""

    digest: str | None
    rows: slice


class LoraBatch:
    """What the adapters of one step add to every linear."""

    def __init__(
        self,
        stack: AdapterStack,
        segments: Sequence[LoraSegment],
        adapters: Mapping[str, AdapterWeights],
        *,
        is_stackable: bool = True,
    ) -> None:
        """`segments` cover the rows of the step in order, the shortest first.

        Those of an adapter that is still arriving are not stackable.
        """
        short = segments[: _num_short(segments, adapters) if is_stackable else 0]
        needed = {s.digest: adapters[s.digest] for s in short if s.digest is not None}
        if needed:
            stack.cover(needed)
        self._stack = stack
        self._short_rows = short[-1].rows.stop if needed else 0
        self._places = _places_of_rows(short, stack)
        self._masks: dict[Owners, Tensor | None] = {}
        self._long = [
            (segment.rows, adapters[segment.digest])
            for segment in segments[len(short) :]
            if segment.digest is not None
        ]

    def add_to(self, y: Tensor, x: Tensor, *, layer: int, group: str) -> None:
        """Add to `y [rows, out]`, what a group's linear made of `x [rows, in]`."""
        if self._short_rows:
            self._add_short(y[: self._short_rows], x[: self._short_rows], layer=layer, group=group)
        for rows, adapter in self._long:
            self._add_long(y[rows], x[rows], adapter, layer=layer, group=group)

    def _add_short(self, y: Tensor, x: Tensor, *, layer: int, group: str) -> None:
        stacked = self._stack.group(layer, group)
        if stacked is None:
            return
        s = stacked.shrink(x)
        mask = self._mask(stacked.owners, x.device)
        if mask is not None:
            s.masked_fill_(mask, 0.0)
        for expand in stacked.expands:
            expand.add_to(y, s, scale=stacked.scale)

    def _add_long(
        self, y: Tensor, x: Tensor, adapter: AdapterWeights, *, layer: int, group: str
    ) -> None:
        for module in GROUPS[group]:
            if pair := adapter.layers[layer].get(module):
                outputs = self._stack.outputs[module]
                y[:, outputs].addmm_(x @ pair.a.t(), pair.bt, alpha=pair.scale)

    def _mask(self, owners: Owners, device: torch.device) -> Tensor | None:
        """`[rows, ranks]`, true where a rank belongs to another adapter; None if nowhere."""
        if owners not in self._masks:
            columns = [place for place, ranks in owners for _ in range(ranks)]
            mask = self._places != torch.tensor(columns)
            self._masks[owners] = mask.to(device) if bool(mask.any()) else None
        return self._masks[owners]


def _num_short(segments: Sequence[LoraSegment], adapters: Mapping[str, AdapterWeights]) -> int:
    """How many segments from the front are computed together."""
    ranks: dict[str | None, int] = {
        s.digest: adapters[s.digest].rank for s in segments if s.digest is not None
    }
    total = sum(ranks.values())
    for index, segment in enumerate(segments):
        rows = int(segment.rows.stop - segment.rows.start)
        if rows * (total - ranks.get(segment.digest, 0)) > _DISCARDED_ROW_RANKS_MAX:
            return index
    return len(segments)


def _places_of_rows(segments: Sequence[LoraSegment], stack: AdapterStack) -> Tensor:
    places = stack.places()
    rows = [places[s.digest] for s in segments for _ in range(s.rows.start, s.rows.stop)]
    return torch.tensor(rows).unsqueeze(1)
