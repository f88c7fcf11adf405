"""The committed files themselves, read by their safetensors headers: no torch, no PEFT."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from examples.adapter_tasks import TASKS, Task
from services.common.base_model import DEFAULT_MODEL

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
LAYERS = 30
SHAPES = {  # in, out of SmolLM2-135M's linears
    "q_proj": (576, 576),
    "k_proj": (576, 192),
    "v_proj": (576, 192),
    "o_proj": (576, 576),
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}
EVERY_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def read_config(task: Task) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ADAPTERS / task.name / "adapter_config.json").read_text())
    return config


def read_header(task: Task) -> dict[str, Any]:
    with (ADAPTERS / task.name / "adapter_model.safetensors").open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header


@EVERY_TASK
def test_the_config_says_what_the_task_promises(task: Task) -> None:
    config = read_config(task)

    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == DEFAULT_MODEL
    assert (config["r"], config["lora_alpha"]) == (task.rank, task.alpha)
    assert config["target_modules"] == sorted(task.target_modules)
    assert config["use_rslora"] is task.use_rslora
    assert config["rank_pattern"] == dict(task.rank_pattern)
    assert not config["use_dora"]
    assert config["bias"] == "none"


@EVERY_TASK
def test_the_weights_have_the_promised_ranks_in_bf16(task: Task) -> None:
    header = read_header(task)

    assert len(header) == LAYERS * len(task.target_modules) * 2
    for key, tensor in header.items():
        *_, module, matrix, _ = key.split(".")
        rank = task.rank_pattern.get(module, task.rank)
        inputs, outputs = SHAPES[module]
        expected = [rank, inputs] if matrix == "lora_A" else [outputs, rank]
        assert (tensor["dtype"], tensor["shape"]) == ("BF16", expected), key


def test_all_adapters_fit_into_forty_megabytes() -> None:
    files = [file for file in ADAPTERS.rglob("*") if file.is_file()]

    assert sum(file.stat().st_size for file in files) <= 40_000_000
    assert {file.parent.name for file in files if file.suffix == ".safetensors"} == set(TASKS)


@EVERY_TASK
def test_no_file_names_a_place_on_the_machine_that_trained_it(task: Task) -> None:
    for name in ("adapter_config.json", "README.md"):
        text = (ADAPTERS / task.name / name).read_text()
        assert ".cache" not in text
        assert "/home/" not in text
        assert "/root/" not in text


def test_the_measured_scores_keep_the_promise() -> None:
    scores = json.loads((ADAPTERS / "scores.json").read_text())

    assert set(scores) == set(TASKS)
    good = [s for s in scores.values() if s["adapter"] is not None and s["adapter"] >= 0.9]
    assert len(good) >= 6
    assert all(s["base"] < 0.3 and s["count"] >= 50 for s in good)
