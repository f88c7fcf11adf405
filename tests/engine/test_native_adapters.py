"""Adapters on the native step: of every rank and module, in one batch, against PEFT in fp32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from services.common.adapter_container import read_header
from services.worker.engine import (
    AdapterIncompatibleError,
    SampledToken,
    Sampling,
    SequenceFailure,
    SequenceSpec,
    StepItem,
    add_adapter,
)
from tests.engine.engine_support import (
    VOCAB,
    OwnedEngine,
    distribution,
    generate,
    generated,
    spec,
    tiny_model,
)
from tests.engine.native_support import executor_of, native_engine, needs_native, torch_tier
from tests.engine.peft_blob import one_module_blob
from tests.engine.peft_world import PeftWorld, peft_world, prompt

pytestmark = needs_native

_LAYERS = 3
_RANKS = (1, 4, 8, 12, 16, 40, 64, 128)
_SOME = (
    ["q_proj", "v_proj"],
    ["gate_proj", "up_proj", "down_proj"],
    ["k_proj", "up_proj"],
    ["o_proj"],
)
_OUTER = ["embed_tokens", "lm_head"]
_ADAPTERS = {
    **{
        f"all r{rank}": LoraConfig(r=rank, lora_alpha=3, target_modules="all-linear")
        for rank in _RANKS
    },
    **{
        f"some r{rank}": LoraConfig(
            r=rank,
            lora_alpha=4,
            target_modules=_SOME[index % len(_SOME)],
            layers_to_transform=[1] if index % 3 == 2 else None,
        )
        for index, rank in enumerate(_RANKS)
    },
    "head": LoraConfig(r=8, lora_alpha=16, target_modules=["lm_head"]),
    "embedding": LoraConfig(r=4, lora_alpha=4, target_modules=["embed_tokens"]),
    "both": LoraConfig(r=33, lora_alpha=8, target_modules=_OUTER, use_rslora=True),
    "everything": LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=[*_OUTER, "q_proj", "v_proj", "down_proj"],
        rank_pattern={"lm_head": 3, "embed_tokens": 33},
        alpha_pattern={"lm_head": 5},
    ),
}
_NAMES = [*_ADAPTERS, None]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_EVERYTHING = Sampling(logprobs=VOCAB)


@pytest.fixture(scope="module", params=["llama", "llama with biases"], ids=["tied", "untied"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    folder = tmp_path_factory.mktemp("world")
    dtypes = {name: _DTYPES[index % 3] for index, name in enumerate(_ADAPTERS)}
    return peft_world(folder, _ADAPTERS, base=request.param, dtypes=dtypes)


def _with_all(engine: OwnedEngine, world: PeftWorld) -> OwnedEngine:
    world.add_all(engine)
    return engine


def _specs(world: PeftWorld, **options: Any) -> list[SequenceSpec]:
    return [
        spec(str(name), prompt(i, 15), adapter=world.digest(name), sampling=_EVERYTHING, **options)
        for i, name in enumerate(_NAMES)
    ]


def _divergences(world: PeftWorld, engine: OwnedEngine, *, chunk: int) -> dict[str, float]:
    """Kullback-Leibler, of each adapter's first four distributions from those of PEFT."""
    outputs = generate(engine, _specs(world, max_tokens=4), chunk=chunk)
    divergences: dict[str, float] = {}
    for i, name in enumerate(_NAMES):
        known = prompt(i, 15)
        total = 0.0
        for token in outputs[str(name)]:
            reference = world.logprobs(name, known)
            total += float((reference.exp() * (reference - distribution(token))).sum())
            known.append(token.token_id)
        divergences[str(name)] = total / 4
    return divergences


def test_all_in_one_batch_are_as_near_to_peft_as_in_the_torch_tier(world: PeftWorld) -> None:
    native = _divergences(world, _with_all(native_engine(world.folder), world), chunk=6)
    other = _divergences(world, _with_all(torch_tier(world.folder), world), chunk=6)
    assert max(native.values()) < 0.05
    assert sum(native.values()) < 1.25 * sum(other.values())


def test_each_alone_gives_the_very_distributions_of_the_batch(world: PeftWorld) -> None:
    engine = _with_all(native_engine(world.folder), world)
    together = generate(engine, _specs(world, max_tokens=4), chunk=7)
    for item in _specs(world, max_tokens=4):
        assert generate(engine, [item])[item.sequence_id] == together[item.sequence_id]


class _Arrival:
    """An adapter whose bytes come layer by layer into memory that holds NaNs."""

    def __init__(self, engine: OwnedEngine, digest: str, blob: bytearray) -> None:
        self._engine = engine
        self._digest = digest
        self._header = read_header(blob)
        self._source = memoryview(blob)[self._header.payload_offset :]
        self._payload = memoryview(bytearray(b"\xff" * self._header.payload_bytes))
        engine.begin_adapter(digest, self._header, self._payload)

    def bring(self, layers: int) -> None:
        for chunk in self._header.layers:
            if chunk.layer < layers or layers == _LAYERS:
                end = chunk.offset + chunk.size_bytes
                self._payload[chunk.offset : end] = self._source[chunk.offset : end]
        self._engine.extend_adapter(self._digest, layers)


@pytest.mark.parametrize("name", ["all r12", "some r8", "everything", "all r4"])
def test_a_prompt_in_parts_gives_the_very_distributions_of_the_whole(
    world: PeftWorld, name: str
) -> None:
    """The adapters are stored in several dtypes, so some rows are views and some are copies."""
    item = spec("a", prompt(0, 20), adapter=world.digest(name), sampling=_EVERYTHING, max_tokens=3)
    whole = generate(_with_all(native_engine(world.folder), world), [item])["a"]
    engine = native_engine(world.folder)
    arrival = _Arrival(engine, *world.blobs[name])
    engine.open_sequence(item)
    for layers in (1, 2):
        arrival.bring(layers)
        assert executor_of(engine).ready_layers(item.adapter_digest or "") == layers
        assert engine.step([StepItem("a", 20, until_layer=layers)]) == []
    arrival.bring(_LAYERS)
    tokens = [engine.step([StepItem("a", rows)])[0] for rows in (20, 1, 1)]
    assert tokens == whole


def test_an_evicted_adapter_leaves_nothing_for_the_next(world: PeftWorld) -> None:
    engine = native_engine(world.folder)
    memory = bytearray(max(len(blob) for _, blob in world.blobs.values()))
    fresh = {
        item.sequence_id: generate(_with_all(native_engine(world.folder), world), [item])
        for item in _specs(world, max_tokens=2)[:4]
    }
    for name in [*_ADAPTERS][:4] * 2:
        digest, blob = world.blobs[name]
        memory[: len(blob)] = blob
        add_adapter(engine, digest, memoryview(memory)[: len(blob)])
        (item,) = [item for item in _specs(world, max_tokens=2) if item.sequence_id == name]
        assert generate(engine, [item]) == fresh[name]
        engine.remove_adapter(digest)
        engine.check_integrity()


def test_the_pages_of_an_adapters_blocks_are_given_back(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    engine = native_engine(tmp_path, memory_bytes=2**22)
    executor = executor_of(engine)
    engine.open_sequence(spec("a", prompt(0, 200)))
    engine.step([StepItem("a", 200)])
    blocks = engine.blocks_of("a")
    memory = np.frombuffer(executor._memory._memory, dtype=np.uint8)
    held = memory.reshape(-1, engine.info.block_bytes)
    assert all(held[block].any() for block in blocks)
    engine.close_sequence("a")
    header = read_header(one_module_blob())
    payload = memoryview(bytearray(header.payload_bytes))
    executor.begin_adapter("b", header, payload, blocks)
    assert not any(held[block].any() for block in blocks)


def test_weights_that_bf16_cannot_hold_are_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    engine = native_engine(tmp_path)
    with pytest.raises(AdapterIncompatibleError, match="not all weights are finite as"):
        add_adapter(engine, "overflows", one_module_blob(3.4e38))
    with pytest.raises(AdapterIncompatibleError, match="q_proj is 96 to 191"):
        add_adapter(engine, "unfit", one_module_blob(features=(96, 191)))
    add_adapter(engine, "overflows", one_module_blob(1.0))  # nothing was kept of it


@pytest.mark.parametrize("scale", [1e38, float(np.finfo(np.float64).max)])
def test_an_overflow_fails_its_own_sequence_only(tmp_path: Path, scale: float) -> None:
    tiny_model(tmp_path)
    engine = native_engine(tmp_path)
    expected = generated(engine, [spec("mate", prompt(1), max_tokens=1)])["mate"]
    add_adapter(
        engine, "bad", one_module_blob(1.0, scale=scale, module="o_proj", features=(192, 96))
    )
    engine.open_sequence(spec("a", prompt(0), adapter="bad"))
    engine.open_sequence(spec("mate", prompt(1)))
    failed, drawn = engine.step([StepItem("a", 12), StepItem("mate", 12)])
    assert isinstance(failed, SequenceFailure)
    assert isinstance(drawn, SampledToken)
    assert [drawn.token_id] == expected
