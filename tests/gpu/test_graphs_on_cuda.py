"""Graphs on a CUDA device: they give what single kernels give, and steps do not wait for the host.

PYTHONPATH=.:gen python3 -m pytest -c /dev/null --rootdir=. -q tests/gpu
"""

import warnings
from pathlib import Path

import pytest
import torch

from services.worker.engine import build_engine
from services.worker.engine.api import EngineSettings, Sampling, StepItem, add_adapter
from services.worker.engine.cuda_lora import Regime
from services.worker.engine.runner import ModelEngine
from tests.engine.cuda_world import VOCAB, adapter_blob, cuda_engine, distributions, write_model
from tests.engine.engine_support import OwnedEngine, generate, generated, spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RANKS = (1, 8, 40, 128)


def _engine(folder: Path, regime: Regime | None = None) -> OwnedEngine:
    engine = cuda_engine(folder, regime=regime, max_sequences=40)
    for rank in RANKS:
        add_adapter(engine, f"r{rank}", adapter_blob(folder, rank, part=3))
    return engine


@pytest.mark.parametrize("count", [1, 2, 3, 9, 33])
@pytest.mark.parametrize("adapters", [(None,), ("r1", None), ("r8", "r128", None, "r40", "r1")])
def test_a_graph_gives_what_single_kernels_give(
    tmp_path: Path, count: int, adapters: tuple[str | None, ...]
) -> None:
    write_model(tmp_path)
    asking = Sampling(logprobs=VOCAB)
    specs = [
        spec(
            f"s{i}",
            range(1, 3 + i),
            adapter=adapters[i % len(adapters)],
            sampling=asking,
            max_tokens=4,
        )
        for i in range(count)
    ]
    graphs = distributions(generate(_engine(tmp_path), specs))
    kernels = distributions(generate(_engine(tmp_path, Regime.WORK_LIST), specs))
    for name, expected in kernels.items():
        torch.testing.assert_close(graphs[name], expected, atol=1e-3, rtol=0)


def test_a_step_waits_for_the_device_once(tmp_path: Path) -> None:
    write_model(tmp_path)
    engine = _engine(tmp_path)
    samplings = [Sampling(), Sampling(temperature=0.8, top_p=0.9, presence_penalty=0.5)]
    for index, sampling in enumerate(samplings * 2):
        engine.open_sequence(
            spec(f"s{index}", range(5), adapter=f"r{RANKS[index]}", sampling=sampling)
        )
    items = [StepItem(f"s{index}", 5) for index in range(4)]
    engine.step(items)  # compiles
    decoding = [StepItem(item.sequence_id, 1) for item in items]
    engine.step(decoding)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.step(decoding)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in caught if "synchroniz" in str(one.message)]
    assert len(waits) == 1


def test_graphs_that_were_made_at_start_give_the_same(tmp_path: Path) -> None:
    write_model(tmp_path)
    settings = EngineSettings(
        model=tmp_path, device="cuda", dtype="float32", memory_bytes=2**24, max_sequences=8
    )
    warm = build_engine(settings)
    assert warm.info.description == "triton cuda float32"
    assert isinstance(warm, ModelEngine)
    warm_engine, cold_engine = OwnedEngine(warm), cuda_engine(tmp_path)
    specs = [spec(f"s{i}", range(1, 4 + i), adapter="r8") for i in range(3)]
    for engine in (warm_engine, cold_engine):
        add_adapter(engine, "r8", adapter_blob(tmp_path, 8))
    assert generated(warm_engine, specs) == generated(cold_engine, specs)
