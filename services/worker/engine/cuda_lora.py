"""How the adapters of a step are computed on CUDA, and what is started when.

Three ways, chosen by how many rank rows there are to read and how many rows of one adapter meet:

  - FUSED, few rank rows: what they cost is the number of kernels that a step waits for. Shrink runs
    on a side stream under the base model's product, and the kernels that finish qkv and gate_up
    expand. What o and down add goes into the residual stream from the side stream. No kernel is
    added to the path that the step waits for.
  - WORK_LIST, many rank rows, or prompts: what they cost is bytes. Expand is a kernel of its own
    with a grid of its own behind the base model's product; shrink stays under it.
  - MASKED_DENSE: plain torch over all active rank rows. The reference for the others; it is never
    chosen, only asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import torch
from torch import Tensor

from services.worker.engine.triton_ops import GroupLora
from services.worker.lora.paging import Int64s
from services.worker.lora.triton_lora import (
    LinearGroup,
    LoraStep,
    add_masked_dense,
    expand,
    shrink,
)
from services.worker.lora.worklist import PAGE_ROWS

# The sum of ranks, over tiles of rows, up to which expanding within other kernels pays. Not
# measured: about where the bytes of rank rows take the time of the launches that fusing saves.
FUSED_RANKS_MAX: Final = 256
FUSED_PAGES_MAX: Final = FUSED_RANKS_MAX // PAGE_ROWS


class Regime(Enum):
    """See the module."""

    FUSED = "fused"
    WORK_LIST = "work list"
    MASKED_DENSE = "masked dense"


def choose_regime(tile_pages: int, *, tile_rows: int) -> Regime:
    """`tile_pages`: pages of 8 rank rows over all tiles of a step; `tile_rows`: of its tuning."""
    is_decode = tile_rows <= 16
    return Regime.FUSED if is_decode and tile_pages <= FUSED_PAGES_MAX else Regime.WORK_LIST


class SideStream:
    """A stream beside the current one; without CUDA, work runs at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's

    def run(self, work: Callable[[], None]) -> None:
        """Behind what the current stream has now."""
        if self._stream is None:
            work()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()

    def join(self) -> None:
        """The current stream goes on behind it."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


@dataclass(frozen=True, slots=True)
class DenseRows:
    """Who has which adapter, on the host, for MASKED_DENSE. See `add_masked_dense`."""

    tables: Sequence[Int64s]
    row_slots: Sequence[int]


@dataclass(frozen=True, slots=True)
class RowsLora:
    """The adapters of rows that pass the layers together.

    Around each linear of a layer: `begin` before the base model's product, `end` behind it.
    """

    regime: Regime
    step: LoraStep
    groups: Mapping[str, LinearGroup]
    side: SideStream
    dense: DenseRows | None = None

    def begin(self, x: Tensor, name: str, *, layer: int) -> None:
        """`x [rows, in]` is what goes into the group."""
        if self.regime is not Regime.MASKED_DENSE:
            self.side.run(lambda: shrink(x, self.step, self.groups[name], layer=layer))

    def end(self, y: Tensor, x: Tensor, name: str, *, layer: int) -> GroupLora | None:
        """`y [rows, out]` is what came out. What the next kernel is to expand, if anything."""
        group = self.groups[name]
        if self.dense is not None:
            self._add_dense(y, x, group, layer)
            return None
        self.side.join()
        if self.regime is Regime.FUSED:
            return GroupLora(self.step, group, layer)
        expand(y, self.step, group, layer=layer)
        return None

    def begin_residual(self, x: Tensor, hidden: Tensor, name: str, *, layer: int) -> None:
        """As `begin`, of a group whose output goes to the residual stream `hidden [rows, out]`."""
        if self.regime is Regime.MASKED_DENSE:
            return
        group = self.groups[name]

        def add() -> None:
            shrink(x, self.step, group, layer=layer)
            expand(hidden, self.step, group, layer=layer)

        self.side.run(add)

    def end_residual(self, y: Tensor, x: Tensor, name: str, *, layer: int) -> None:
        """The counterpart. `y` has yet to be added to the residual stream."""
        if self.dense is not None:
            self._add_dense(y, x, self.groups[name], layer)
        else:
            self.side.join()

    def _add_dense(self, y: Tensor, x: Tensor, group: LinearGroup, layer: int) -> None:
        assert self.dense is not None
        add_masked_dense(
            y,
            x,
            self.step.pool,
            group,
            layer=layer,
            tables=self.dense.tables,
            row_slots=self.dense.row_slots,
        )
