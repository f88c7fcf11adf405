"""What the machine can do at most: memory, products, the bus, and a launch within a graph."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from bench.gpu.extent import Extent
from bench.gpu.timing import Work, by_turns
from bench.report import Row
from services.worker.engine.triton_support import launch

_PINNED_BYTES = (2**20, 80 * 2**20)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """`read_bytes_s`: of a sum over memory that is not in the cache."""

    copy_bytes_s: float
    read_bytes_s: float
    launch_s: float
    host_bytes_s: float
    rows: tuple[Row, ...]

    @property
    def memory_bytes_s(self) -> float:
        """The better of the two, which nothing here can beat."""
        return max(self.copy_bytes_s, self.read_bytes_s)


@triton.jit  # type: ignore[untyped-decorator]  # it has no types
def empty_kernel(counter_ptr: tl.tensor) -> None:
    tl.store(counter_ptr, tl.load(counter_ptr))


def measure(extent: Extent) -> Ceilings:
    """A few seconds."""
    works = _works(extent)
    times = by_turns({name: work for name, (work, _) in works.items()}, extent)
    rows: list[Row] = []
    rates: dict[str, float] = {}
    for name, (_, amount) in works.items():
        rates[name] = amount / times[name].median_s
        rows.append(
            {
                "ceiling": name,
                "ms": times[name].median_s * 1e3,
                "per_second": rates[name],
                "spread": times[name].spread,
            }
        )
    return Ceilings(
        copy_bytes_s=rates["copy on the device, bytes"],
        read_bytes_s=rates["read on the device, bytes"],
        launch_s=1.0 / rates["launches in a graph"],
        host_bytes_s=rates[f"pinned copy of {_PINNED_BYTES[-1]} bytes, bytes"],
        rows=tuple(rows),
    )


def _works(extent: Extent) -> dict[str, tuple[Work, float]]:
    """Each with what it moves or computes."""
    options: dict[str, Any] = {"device": extent.device}
    source = torch.empty(extent.copy_bytes // 2, dtype=torch.bfloat16, **options).normal_()
    target = torch.empty_like(source)
    words = source.view(torch.int32)
    a = torch.randn((extent.matrix, extent.matrix), **options).to(extent.dtype)
    b = torch.randn((extent.matrix, extent.matrix), **options).to(extent.dtype)
    counter = torch.zeros(1, dtype=torch.int32, **options)

    def chain() -> None:
        for _ in range(extent.chain):
            launch(empty_kernel, (1,), counter)

    works: dict[str, tuple[Work, float]] = {
        "copy on the device, bytes": (_quiet(lambda: target.copy_(source)), 2 * source.nbytes),
        "read on the device, bytes": (_quiet(words.max), words.nbytes),
        f"{extent.dtype_name} product of {extent.matrix}, operations": (
            _quiet(lambda: a @ b),
            2.0 * extent.matrix**3,
        ),
        "launches in a graph": (chain, extent.chain),
    }
    for size in _PINNED_BYTES:
        host = torch.empty(size, dtype=torch.uint8, pin_memory=extent.is_gpu)
        there = torch.empty(size, dtype=torch.uint8, **options)
        copy = _copier(there, host)
        works[f"pinned copy of {size} bytes, bytes"] = (copy, size)
    return works


def _copier(there: torch.Tensor, host: torch.Tensor) -> Work:
    return _quiet(lambda: there.copy_(host, non_blocking=True))


def _quiet(work: Callable[[], Any]) -> Work:
    def run() -> None:
        work()

    return run
