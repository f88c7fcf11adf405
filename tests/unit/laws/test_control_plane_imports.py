"""What the import linter cannot see: which heavy packages really are loaded by a service."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "triton", "huggingface_hub")


@pytest.mark.parametrize(
    "module",
    [
        "services.gateway.service",
        "services.scheduler.service",
        "services.adapter_store.service",
        "services.cli.app",
        "services.core.cluster",
        "services.core.replica",
    ],
)
def test_the_control_plane_loads_nothing_heavy(module: str) -> None:
    check = f"import {module}, sys; print([m for m in {HEAVY!r} if m in sys.modules])"

    loaded = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )

    assert loaded.stdout.strip() == "[]"


def test_the_simulated_engine_runs_where_torch_is_not_installed() -> None:
    check = """
import sys
sys.modules["torch"] = None  # an import of it raises
from services.worker.engine import EngineSettings, build_engine
print(build_engine(EngineSettings(kind="simulated")).info.description)
"""

    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)

    assert ran.stdout.startswith("simulated ")
