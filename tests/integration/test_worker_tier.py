"""A worker that is told which tier of the CPU to use, and can't have it."""

import pytest

pytest.importorskip("torch", reason="the engine's own dependencies are not installed")
pytest.importorskip("transformers", reason="the engine's own dependencies are not installed")

from pathlib import Path

from tests.engine.tiny_families import tiny_family
from tests.integration.test_worker_bad_model import run_worker


@pytest.mark.timeout(120)
async def test_the_native_tier_in_another_type_is_refused_in_one_line(tmp_path: Path) -> None:
    tiny_family(tmp_path, "llama 3")
    code, lines = await run_worker(f"--model={tmp_path}", "--dtype=float32", "--tier=native")
    assert code == 1
    (line,) = lines
    assert line["event"] == "cannot_start"
    assert line["error"].startswith(
        "the native tier cannot serve: it computes in bfloat16 on the CPU only"
    )
