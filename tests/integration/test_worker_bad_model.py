"""A worker whose model can't be served says why in one line and ends with code 2."""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the engine's own dependencies are not installed")
pytest.importorskip("transformers", reason="the engine's own dependencies are not installed")

from tests.engine.tiny_families import POSITIONS, tiny_family


async def run_worker(*arguments: str) -> tuple[int | None, list[dict[str, Any]]]:
    """Exit code and all lines that it wrote, each of which must be JSON."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.worker",
        "--listen=127.0.0.1:0",
        "--device=cpu",
        "--dtype=float32",
        "--threads=1",
        *arguments,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 100)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, [json.loads(line) for line in output.splitlines()]


async def assert_refused(named: str, *arguments: str) -> None:
    code, lines = await run_worker(*arguments)
    assert code == 2, lines
    (line,) = lines
    assert line["event"] == "cannot_start"
    assert named in line["error"]


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def change_width(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 136}))


def change_kind(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"logits_scaling": 8.0}))


def empty_config(folder: Path) -> None:
    (folder / "config.json").write_text("")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (cut_weights, "model.safetensors is cut short"),
        (change_width, "model.layers.0.mlp.gate_proj.weight in model.safetensors is (128, 96)"),
        (change_kind, "logits_scaling 8.0 is not supported"),
        (empty_config, "config.json is not JSON"),
    ],
)
async def test_a_bad_folder_is_refused_in_one_line(
    spoil: Callable[[Path], None], named: str, tmp_path: Path
) -> None:
    tiny_family(tmp_path, "llama 3")
    spoil(tmp_path)
    await assert_refused(named, f"--model={tmp_path}")


@pytest.mark.timeout(120)
async def test_a_context_that_the_model_does_not_have_is_refused_in_one_line(
    tmp_path: Path,
) -> None:
    tiny_family(tmp_path, "llama 3")
    await assert_refused(
        f"the model's longest has {POSITIONS}", f"--model={tmp_path}", "--max-context-tokens=1000"
    )
