"""Two shards, each in a process of its own, equal one engine in fp32: tokens and distributions."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from peft import LoraConfig

from services.common.adapter_container import read_header
from services.worker.engine import (
    AdapterIncompatibleError,
    Sampling,
    SequenceSpec,
    StepItem,
    add_adapter,
)
from tests.engine.engine_support import (
    VOCAB,
    OwnedEngine,
    generated,
    model_engine,
    spec,
)
from tests.engine.peft_blob import one_module_blob
from tests.engine.peft_world import PeftWorld, peft_world, prompt
from tests.engine.shard_engines import assert_equal, close, two_shards

_ADAPTERS = {
    "r1": LoraConfig(r=1, lora_alpha=2, target_modules="all-linear"),
    "r8": LoraConfig(r=8, lora_alpha=5, target_modules="all-linear"),
    "r33": LoraConfig(r=33, lora_alpha=33, target_modules=["q_proj", "v_proj", "down_proj"]),
    "one layer": LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj"], layers_to_transform=[1]),
    "outer": LoraConfig(
        r=16, lora_alpha=16, target_modules=["embed_tokens", "lm_head", "q_proj", "down_proj"]
    ),
}
_EVERYTHING = Sampling(logprobs=VOCAB)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    return peft_world(tmp_path_factory.mktemp("world"), _ADAPTERS)


@pytest.fixture(scope="module")
def engine(world: PeftWorld) -> Iterator[OwnedEngine]:
    """Two shards with every adapter."""
    engine = two_shards(world.folder)
    world.add_all(engine)
    yield engine
    close(engine)


@pytest.fixture(scope="module")
def alone(world: PeftWorld) -> OwnedEngine:
    """The same in one process."""
    engine = model_engine(world.folder)
    world.add_all(engine)
    return engine


def _specs(world: PeftWorld, sampling: Sampling = _EVERYTHING) -> list[SequenceSpec]:
    return [
        spec(str(name), prompt(index, 10 + index), adapter=world.digest(name), sampling=sampling)
        for index, name in enumerate([*_ADAPTERS, None])
    ]


@pytest.mark.parametrize("options", [{}, {"chunk": 4}, {"stagger": 2}], ids=str)
def test_a_mixed_batch_of_adapters_equals_that_of_one_engine(
    world: PeftWorld, engine: OwnedEngine, alone: OwnedEngine, options: dict[str, int]
) -> None:
    assert_equal(engine, alone, _specs(world), **options)


def test_greedy_output_is_that_of_peft(world: PeftWorld, engine: OwnedEngine) -> None:
    output = generated(engine, _specs(world, Sampling()))
    for index, name in enumerate([*_ADAPTERS, None]):
        assert output[str(name)] == world.greedy(name, prompt(index, 10 + index)), name


def test_each_shard_has_half_the_bytes_of_a_block(engine: OwnedEngine, alone: OwnedEngine) -> None:
    assert engine.info.block_bytes * 2 == alone.info.block_bytes
    assert engine.info.pool_blocks == 2**22 // engine.info.block_bytes


def test_an_adapter_that_arrives_in_parts_equals_a_whole_one(
    world: PeftWorld, engine: OwnedEngine
) -> None:
    """What has not arrived is NaN."""
    _, blob = world.blobs["r8"]
    header = read_header(blob)
    source = memoryview(blob)[header.payload_offset :]
    payload = memoryview(bytearray(b"\xff" * header.payload_bytes))
    engine.begin_adapter("in parts", header, payload)
    engine.open_sequence(spec("a", prompt(0, 20), adapter="in parts", max_tokens=4))
    engine.open_sequence(spec("dropped", prompt(1, 20), adapter="in parts", max_tokens=4))
    tokens: list[int] = []
    for layers in (1, 2, 3):
        for chunk in header.layers:
            if chunk.layer < layers:
                end = chunk.offset + chunk.size_bytes
                payload[chunk.offset : end] = source[chunk.offset : end]
        engine.extend_adapter("in parts", layers)
        if layers == 3:
            engine.close_sequence("dropped")
            tokens += [result.token_id for result in engine.step([StepItem("a", 20)])]  # type: ignore[union-attr]  # no failures
        else:
            items = [StepItem(name, 20, until_layer=layers) for name in ("a", "dropped")]
            assert engine.step(items) == []
    for _ in range(3):
        tokens += [result.token_id for result in engine.step([StepItem("a", 1)])]  # type: ignore[union-attr]  # as above
    engine.close_sequence("a")
    engine.remove_adapter("in parts")
    engine.check_integrity()
    assert tokens == world.greedy("r8", prompt(0, 20), 4)


def test_a_prompt_goes_on_behind_blocks_that_another_sequence_computed(
    world: PeftWorld, engine: OwnedEngine
) -> None:
    tokens, digest = prompt(5, 40), world.digest("r8")
    engine.open_sequence(spec("first", tokens, adapter=digest))
    engine.step([StepItem("first", 40)])
    shared = engine.blocks_of("first")[:2]
    second = replace(
        spec("second", tokens, adapter=digest, max_tokens=6), blocks=shared, computed_tokens=32
    )
    output = generated(engine, [second])
    engine.close_sequence("first")
    assert output["second"] == world.greedy("r8", tokens, 6)


def test_an_adapter_that_does_not_fit_is_refused_with_the_whole_models_shapes(
    engine: OwnedEngine,
) -> None:
    with pytest.raises(AdapterIncompatibleError, match=r"layer 0 q_proj is 96 to 96, .* 96 to 192"):
        add_adapter(engine, "halved", one_module_blob(features=(96, 96)))
    engine.check_integrity()
