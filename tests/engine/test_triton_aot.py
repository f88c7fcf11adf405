"""Kernels compile for GPUs that are not here, without spilling, within their shared memory.

CALUMMA_TRITON_ALL=1 compiles all of them for every model and device, which takes minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.worker.engine.triton_support import SHARED_BYTES_MAX

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
COMPILES_ALL = os.environ.get("CALUMMA_TRITON_ALL") == "1"
KERNELS = {
    "shrink",
    "expand",
    "finish_qkv",
    "finish_gate_up",
    "add_norm",
    "decode_attention",
    "reduce_attention",
    "prefill_attention",
}


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, Any]]:
    """What each kernel takes, by its name and device. Triton compiles in a process of its own."""
    command = [sys.executable, "-m", "tests.engine.triton_aot"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*command, "--all"] if COMPILES_ALL else command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=3000 if COMPILES_ALL else 550,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def test_every_kernel_is_compiled_for_every_device(report: dict[str, dict[str, Any]]) -> None:
    assert {
        kernel for kernel in KERNELS if any(f" {kernel} " in name for name in report)
    } == KERNELS
    assert {usage["capability"] for usage in report.values()} == set(SHARED_BYTES_MAX)


def test_no_kernel_spills_registers(report: dict[str, dict[str, Any]]) -> None:
    spilling = [name for name, usage in report.items() if usage["spilled_bytes"] > 0]
    assert spilling == []


def test_every_kernel_fits_into_shared_memory(report: dict[str, dict[str, Any]]) -> None:
    too_large = [
        name
        for name, usage in report.items()
        if usage["shared_bytes"] > SHARED_BYTES_MAX[usage["capability"]]
    ]
    assert too_large == []
