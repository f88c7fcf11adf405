"""All of it within the minutes given: parity first, then ceilings, engine, kernels, attention.

Each part has a share of the time. What does not begin within it is left out, and a row says so.
"""

import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import torch
import triton

from bench.gpu import attention, decode, lora_kernels, parity
from bench.gpu import ceilings as limits
from bench.gpu.extent import Extent, dry, full
from bench.report import Report, Row, Target

# Of the time, at which a part begins its last piece.
_ENGINE_UNTIL: Final = 0.55
_KERNELS_UNTIL: Final = 0.85
_ATTENTION_UNTIL: Final = 0.95


class NoDeviceError(RuntimeError):
    """There is no CUDA device here."""


def run(*, minutes: float = 9.0, is_dry: bool = False) -> Report:
    """`is_dry`: every code path on the CPU with tiny shapes; its figures mean nothing.

    Raises NoDeviceError.
    """
    if not is_dry and not torch.cuda.is_available():
        raise NoDeviceError("no CUDA device is here; --dry-run-cpu tries the code without one")
    extent = dry() if is_dry else full()
    began_s = time.monotonic()

    def until(share: float) -> Callable[[], bool]:
        return lambda: is_dry or time.monotonic() < began_s + share * 60 * minutes

    rows: list[Row] = [_machine(extent)]
    targets: list[Target] = []

    def keep(found: tuple[list[Row], list[Target]]) -> None:
        rows.extend(found[0])
        targets.extend(found[1])

    torch.manual_seed(0)
    keep(parity.compare(extent))
    ceilings = limits.measure(extent)
    rows.extend(ceilings.rows)
    decode.free_memory(extent)
    keep(_whole_steps(extent, ceilings, until(_ENGINE_UNTIL)))
    decode.free_memory(extent)
    keep(lora_kernels.measure(extent, ceilings, until(_KERNELS_UNTIL)))
    decode.free_memory(extent)
    rows.extend(attention.measure(extent, ceilings, until(_ATTENTION_UNTIL)))
    return Report(rows, targets)


def default_path() -> Path:
    """Where a report goes that nobody named: by device and day."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    device = "-".join(name.lower().split())
    day = datetime.now(UTC).date().isoformat()
    return Path("bench/results") / f"gpu-{device}-{day}.json"


def _whole_steps(
    extent: Extent, ceilings: limits.Ceilings, is_time_left: Callable[[], bool]
) -> tuple[list[Row], list[Target]]:
    served = decode.build(extent)
    rows, targets = decode.base(extent, served, ceilings)
    for found in (
        decode.retention(extent, served, ceilings, is_time_left),
        decode.swaps(extent, served, ceilings),
    ):
        rows += found[0]
        targets += found[1]
    return rows, targets


def _machine(extent: Extent) -> Row:
    return {
        "device": torch.cuda.get_device_name() if extent.is_gpu else platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "is_dry_run": not extent.is_gpu,
    }
