"""The engine on a CUDA device gives what it gives on the CPU: models, adapters, sampling.

Needs torch, transformers, safetensors and pytest only, so it also runs where the services do not:

    PYTHONPATH=.:gen python3 -m pytest -c /dev/null --rootdir=. -q tests/gpu

CALUMMA_TEST_DEVICE=cpu compares the CPU with itself, to try this file without a GPU.
"""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from services.common.adapter_container import LoraRows, encode
from services.common.base_model import linear_shapes, load_config
from services.worker.engine import EngineSettings, Sampling, SequenceSpec, build_engine
from services.worker.engine.runner import TorchEngine
from tests.engine.engine_support import TINY_CONFIGS, generate, spec, tiny_model, token_ids

DEVICE: Literal["cpu", "cuda"] = "cpu" if os.environ.get("CALUMMA_TEST_DEVICE") == "cpu" else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
]
RANKS = (1, 8, 33)
PROMPTS = [tuple(range(3 + i, 40 + 5 * i)) for i in range(6)]


def _engine(folder: Path, device: Literal["cpu", "cuda"]) -> TorchEngine:
    engine = build_engine(EngineSettings(model=folder, device=device, dtype="float32"))
    assert isinstance(engine, TorchEngine)
    return engine


def _blob(folder: Path, rank: int) -> bytearray:
    """A random adapter on q, v and down in every layer."""
    config = load_config(folder)
    shapes = linear_shapes(config)
    rng = np.random.default_rng(rank)

    def rows(layer: int, module: str) -> LoraRows:
        inputs, outputs = shapes[module]
        a, bt = (rng.normal(0, 0.3, (rank, width)).astype("<f4") for width in (inputs, outputs))
        return LoraRows(layer, module, rank, 0.5, inputs, outputs, a.tobytes(), bt.tobytes())

    modules = ("q_proj", "v_proj", "down_proj")
    every = (rows(layer, module) for layer in range(config.num_layers) for module in modules)
    return bytearray(encode(every, dtype="F32"))


def _outputs(
    folder: Path, device: Literal["cpu", "cuda"], specs: list[SequenceSpec]
) -> dict[str, list[int]]:
    engine = _engine(folder, device)
    for rank in RANKS:
        engine.add_adapter(f"r{rank}", _blob(folder, rank))
    outputs = generate(engine, specs, chunk=16, stagger=1)
    engine.check_integrity()
    return {name: token_ids(output) for name, output in outputs.items()}


def _specs(sampling: Sampling) -> list[SequenceSpec]:
    adapters = [None, *(f"r{rank}" for rank in RANKS)]
    return [
        spec(f"s{i}", prompt, adapter=adapters[i % len(adapters)], sampling=sampling)
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("name", sorted(TINY_CONFIGS))
def test_greedy_tokens_with_mixed_adapters_equal_the_cpu(tmp_path: Path, name: str) -> None:
    tiny_model(tmp_path, name)
    specs = _specs(Sampling())

    assert _outputs(tmp_path, DEVICE, specs) == _outputs(tmp_path, "cpu", specs)


def test_seeded_tokens_equal_the_cpu(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    specs = _specs(Sampling(temperature=0.8, top_p=0.95, top_k=50, seed=3))

    assert _outputs(tmp_path, DEVICE, specs) == _outputs(tmp_path, "cpu", specs)
