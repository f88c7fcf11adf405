"""The GPU benchmark tried without a GPU: every code path, and none that needs the services."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_WITHOUT_SERVICES = """
import runpy, sys
for name in ("grpc", "opentelemetry", "google.protobuf", "structlog", "pydantic", "uvloop"):
    sys.modules[name] = None
sys.argv = ["bench", "gpu", "--dry-run-cpu", "--json", sys.argv[1]]
runpy.run_module("bench", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_dry_run_reports_every_part(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [sys.executable, "-c", _WITHOUT_SERVICES, str(path)],
        check=True,
        env=environment,
        cwd=Path(__file__).resolve().parents[3],
        timeout=250,
        capture_output=True,
    )
    found = json.loads(path.read_text())
    columns = {next(iter(row)) for row in found["rows"]}
    assert columns == {"device", "parity", "ceiling", "decode", "swap_in_MB", "ranks", "rows"}
    parity = [one for one in found["targets"] if one["name"].startswith("parity")]
    assert parity
    assert all(one["holds"] for one in parity)
