"""What the tests of kernels share: a pool with adapters in it, and what they add, in fp64."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.common.adapter_container import LoraRows, encode, read_header
from services.common.base_model import LINEARS
from services.worker.lora.paging import Placement, place
from services.worker.lora.triton_lora import (
    LinearGroup,
    LoraStep,
    LoraTuning,
    plane_elements_max,
)
from services.worker.lora.worklist import WorkShape, plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_ELEMENTS = 4096
# Of one step of rounding, and of a few in a row.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

Shapes = dict[str, tuple[int, int]]


@dataclass
class Adapters:
    """Adapters in a pool that is full of NaN where no row of theirs is."""

    shapes: Shapes
    dtype: torch.dtype
    num_layers: int = 2
    first_block: int = 0  # adapters keep away from the elements before it
    pool: Tensor = field(init=False)
    tables: list[NDArray[np.int64]] = field(default_factory=list)
    rows: list[dict[tuple[int, str], tuple[Tensor, Tensor, float]]] = field(default_factory=list)
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(7))
    used_blocks: int = 0

    def __post_init__(self) -> None:
        self.pool = torch.full((256 * BLOCK_ELEMENTS,), float("nan"), dtype=self.dtype)

    def add(self, ranks: dict[str, int]) -> None:
        """One more adapter, with these modules in every layer."""
        modules = [
            self._rows(layer, module, ranks[module])
            for layer in range(self.num_layers)
            for module in LINEARS
            if module in ranks
        ]
        header = read_header(encode([rows for rows, _ in modules], dtype="F32"))
        placement = place(header, block_elements=BLOCK_ELEMENTS)
        # Blocks of several adapters lie between each other, in no order.
        blocks = [
            self.first_block + (self.used_blocks + 7 * i) % 241 for i in range(placement.blocks)
        ]
        self.used_blocks += 7 * placement.blocks
        payload = torch.cat([weights for _, weights in modules])
        self._copy(placement, blocks, payload)
        self.tables.append(
            placement.table(blocks, block_elements=BLOCK_ELEMENTS, num_layers=self.num_layers)
        )
        self.rows.append(self._reference(modules))

    def _rows(self, layer: int, module: str, rank: int) -> tuple[LoraRows, Tensor]:
        width_in, width_out = self.shapes[module]
        weights = torch.randn(rank * (width_in + width_out), generator=self.random)
        weights = (weights / width_in**0.5).to(self.dtype).float()
        a = weights[: rank * width_in].numpy().tobytes()
        bt = weights[rank * width_in :].numpy().tobytes()
        scale = 0.5 + 0.25 * layer + 0.125 * LINEARS.index(module)
        return LoraRows(layer, module, rank, scale, width_in, width_out, a, bt), weights

    def _copy(self, placement: Placement, blocks: list[int], payload: Tensor) -> None:
        for copy in placement.copies(0, self.num_layers):
            at = blocks[copy.block] * BLOCK_ELEMENTS + copy.element
            source = payload[copy.payload_element : copy.payload_element + copy.elements]
            assert bool(self.pool[at : at + copy.elements].isnan().all())
            self.pool[at : at + copy.elements] = source.to(self.dtype)

    def _reference(
        self, modules: Sequence[tuple[LoraRows, Tensor]]
    ) -> dict[tuple[int, str], tuple[Tensor, Tensor, float]]:
        found = {}
        for rows, weights in modules:
            split = rows.rank * rows.in_features
            a = weights[:split].view(rows.rank, -1).double()
            bt = weights[split:].view(rows.rank, -1).double()
            found[rows.layer, rows.module] = (a, bt, rows.scale)
        return found

    def delta(self, x: Tensor, slots: Sequence[int], modules: Sequence[str], layer: int) -> Tensor:
        """What the adapters add to linears side by side, `[rows, out]` fp64."""
        delta = torch.zeros(len(x), sum(self.shapes[module][1] for module in modules)).double()
        for row, slot in enumerate(slots):
            first = 0
            for module in modules:
                out = self.shapes[module][1]
                if slot >= 0 and (layer, module) in self.rows[slot]:
                    a, bt, scale = self.rows[slot][layer, module]
                    delta[row, first : first + out] = scale * (x[row].double() @ a.t()) @ bt
                first += out
        return delta

    def step(
        self,
        slots: Sequence[int],
        *,
        tile_rows: int = 16,
        item_pages: int = 2,
        splits: int = 2,
        shape: WorkShape | None = None,
    ) -> LoraStep:
        """A step whose rows have adapters in these slots. In a larger shape the rest is garbage."""
        sizes = np.array([table.size for table in self.tables])
        work = plan(
            np.array(slots, dtype=np.int32),
            (np.cumsum(sizes) - sizes).astype(np.int32),
            np.array([table.shape[2] // 2 for table in self.tables], dtype=np.int32),
            tile_rows=tile_rows,
            item_pages=item_pages,
        )
        tuning = LoraTuning(
            tile_rows=tile_rows,
            item_pages=item_pages,
            splits=splits,
            block_k=32,
            columns=32,
            shrink_programs=3,
            expand_programs=5,
        )
        shape = shape or work.bucket
        packed = work.pack(shape, out=np.full(shape.size, 2**30, dtype=np.int32))
        planes = torch.full((plane_elements_max(shape, tuning),), float("nan"))
        return LoraStep(
            pool=self.pool.to(DEVICE),
            tables=torch.from_numpy(np.concatenate([table.ravel() for table in self.tables])).to(
                DEVICE
            ),
            work=torch.from_numpy(packed).to(DEVICE),
            planes=planes.to(DEVICE),
            shape=shape,
            tuning=tuning,
        )


def group_of(shapes: Shapes, modules: Sequence[str]) -> LinearGroup:
    return LinearGroup(
        LINEARS.index(modules[0]),
        shapes[modules[0]][0],
        tuple(shapes[module][1] for module in modules),
    )


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the rounding of a type, relative to the largest value."""
    difference = (got.cpu().double() - expected).abs().max()
    assert bool(got.isfinite().all())
    assert float(difference) <= TOLERANCES[dtype] * max(1.0, float(expected.abs().max()))
