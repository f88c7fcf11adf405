"""The engine on a CUDA device gives what it gives on the CPU: models, adapters, sampling, parts.

Needs torch, transformers, safetensors and pytest only, so it also runs where the services do not:

    PYTHONPATH=.:gen python3 -m pytest -c /dev/null --rootdir=. -q tests/gpu

CALUMMA_TEST_DEVICE=cpu compares the CPU with itself, to try this file without a GPU.
"""

import os
from pathlib import Path
from threading import Thread
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from services.common.adapter_container import (
    EMBEDDING,
    EMBEDDING_LAYER,
    HEAD,
    LoraRows,
    encode,
    read_header,
)
from services.common.base_model import linear_shapes, load_config, outer_shapes
from services.worker.engine import (
    AdapterIncompatibleError,
    SampledToken,
    Sampling,
    SequenceSpec,
    StepItem,
    add_adapter,
)
from tests.engine.engine_support import (
    TINY_CONFIGS,
    OwnedEngine,
    generate,
    model_engine,
    spec,
    tiny_model,
    token_ids,
)

DEVICE: Literal["cpu", "cuda"] = "cpu" if os.environ.get("CALUMMA_TEST_DEVICE") == "cpu" else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
]
RANKS = (1, 8, 33)
PROMPTS = [tuple(range(3 + i, 40 + 5 * i)) for i in range(6)]


def _engine(folder: Path, device: Literal["cpu", "cuda"]) -> OwnedEngine:
    return model_engine(folder, device=device)


def _blob(folder: Path, rank: int, *, is_outer: bool = False, dtype: str = "F32") -> bytearray:
    """A random adapter on q, v and down in every layer; `is_outer`: embedding and head, too."""
    config = load_config(folder)
    shapes = linear_shapes(config) | outer_shapes(config)
    rng = np.random.default_rng(rank)

    def rows(layer: int, module: str) -> LoraRows:
        inputs, outputs = shapes[module]
        a, bt = (_bits(rng.normal(0, 0.3, (rank, width)), dtype) for width in (inputs, outputs))
        return LoraRows(layer, module, rank, 0.5, inputs, outputs, a, bt)

    modules = ("q_proj", "v_proj", "down_proj")
    places = [(layer, module) for layer in range(config.num_layers) for module in modules]
    if is_outer:
        places = [(EMBEDDING_LAYER, EMBEDDING), *places, (config.num_layers, HEAD)]
    return bytearray(encode((rows(*place) for place in places), dtype=dtype))


def _bits(values: NDArray[np.float64], dtype: str) -> bytes:
    if dtype == "BF16":  # the upper half of fp32
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype("<f4").tobytes()


def _outputs(
    folder: Path, device: Literal["cpu", "cuda"], specs: list[SequenceSpec]
) -> dict[str, list[int]]:
    engine = _engine(folder, device)
    for rank in RANKS:
        add_adapter(engine, f"r{rank}", _blob(folder, rank))
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


def _outputs_in_parts(folder: Path, device: Literal["cpu", "cuda"]) -> dict[str, list[int]]:
    """Two prompts on adapters that arrive layer by layer, beside one that decodes."""
    engine = _engine(folder, device)
    layers = engine.info.num_layers
    adapters = {"plain": _blob(folder, 16), "outer": _blob(folder, 8, is_outer=True, dtype="BF16")}
    payloads: dict[str, tuple[memoryview, memoryview]] = {}
    for name, blob in adapters.items():
        header = read_header(blob)
        payload = memoryview(bytearray(b"\xff" * header.payload_bytes))  # NaN until it arrives
        engine.begin_adapter(name, header, payload)
        payloads[name] = payload, memoryview(blob)[header.payload_offset :]
    engine.open_sequence(spec("mate", range(3, 30)))
    outputs: dict[str, list[int]] = {"mate": [], "plain": [], "outer": []}
    for name in adapters:
        engine.open_sequence(spec(name, PROMPTS[2], adapter=name))
    prompt_tokens = {"mate": 27, "plain": len(PROMPTS[2]), "outer": len(PROMPTS[2])}

    def step(items: list[StepItem]) -> None:
        for result in engine.step(items):
            assert isinstance(result, SampledToken)
            outputs[result.sequence_id].append(result.token_id)
        engine.check_integrity()

    for until_layer in range(1, layers + 1):
        for name, (payload, source) in payloads.items():
            for chunk in read_header(adapters[name]).layers:
                if chunk.layer < until_layer or until_layer == layers:
                    end = chunk.offset + chunk.size_bytes
                    payload[chunk.offset : end] = source[chunk.offset : end]
            engine.extend_adapter(name, until_layer)
        part = until_layer if until_layer < layers else None
        items = [StepItem(name, prompt_tokens[name], until_layer=part) for name in adapters]
        step([StepItem("mate", 1 if outputs["mate"] else 27), *items])
    for _ in range(8):
        step([StepItem(name, 1) for name in outputs])
    return outputs


def test_prompts_in_parts_with_arriving_adapters_equal_the_cpu(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    assert _outputs_in_parts(tmp_path, DEVICE) == _outputs_in_parts(tmp_path, "cpu")


def test_an_arriving_adapter_gives_the_tokens_of_one_that_is_there(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    engine = _engine(tmp_path, DEVICE)
    add_adapter(engine, "plain", _blob(tmp_path, 16))
    add_adapter(engine, "outer", _blob(tmp_path, 8, is_outer=True, dtype="BF16"))
    whole = generate(engine, [spec(name, PROMPTS[2], adapter=name) for name in ("plain", "outer")])
    parts = _outputs_in_parts(tmp_path, DEVICE)
    for name, output in whole.items():
        assert token_ids(output)[:9] == parts[name]


def test_adapters_come_and_go_beside_steps(tmp_path: Path) -> None:
    """Loads from another thread, each into memory that an adapter before it had."""
    tiny_model(tmp_path)
    engine = _engine(tmp_path, DEVICE)
    add_adapter(engine, "stays", _blob(tmp_path, 8))
    blobs = [_blob(tmp_path, rank) for rank in (16, 33, 7)]
    specs = [spec(f"s{i}", PROMPTS[i], adapter="stays") for i in range(3)]
    expected = generate(engine, specs)
    for blob in blobs * 2:
        thread = Thread(target=add_adapter, args=(engine, "comes", blob))
        thread.start()
        output = generate(engine, specs)
        thread.join()
        assert output == expected
        late = generate(engine, [spec("late", PROMPTS[3], adapter="comes")])
        engine.remove_adapter("comes")
        reference = _engine(tmp_path, "cpu")
        add_adapter(reference, "comes", blob)
        assert late == generate(reference, [spec("late", PROMPTS[3], adapter="comes")])


def test_weights_that_overflow_the_dtype_are_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    engine = model_engine(tmp_path, device=DEVICE, dtype="float16")
    blob = _blob(tmp_path, 1)
    last = len(blob) - 4
    blob[last:] = np.float32(1e6).tobytes()
    with pytest.raises(AdapterIncompatibleError, match="not all weights are finite"):
        add_adapter(engine, "overflows", blob)
