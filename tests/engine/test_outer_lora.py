"""Adapters of the embedding and the output head, tied and untied, equal PEFT in fp32."""

from dataclasses import replace

import pytest
from peft import LoraConfig

from services.common.adapter_container import LoraRows, encode
from services.worker.engine import AdapterIncompatibleError, Sampling, SequenceSpec, add_adapter
from tests.engine.engine_support import (
    VOCAB,
    OwnedEngine,
    distribution,
    generate,
    generated,
    model_engine,
    spec,
)
from tests.engine.peft_world import PeftWorld, peft_world, prompt

_BOTH = ["embed_tokens", "lm_head"]
_ADAPTERS = {
    "r8 head": LoraConfig(r=8, lora_alpha=16, target_modules=["lm_head"]),
    "r4 embedding": LoraConfig(r=4, lora_alpha=4, target_modules=["embed_tokens"]),
    "both": LoraConfig(r=16, lora_alpha=8, target_modules=_BOTH, use_rslora=True),
    "everything": LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=[*_BOTH, "q_proj", "v_proj", "down_proj"],
        rank_pattern={"lm_head": 3, "embed_tokens": 33},
        alpha_pattern={"lm_head": 5},
    ),
    "r4 linears": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
}
_NAMES = [*_ADAPTERS, None]


@pytest.fixture(scope="module", params=["llama", "llama with biases"], ids=["tied", "untied"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    return peft_world(tmp_path_factory.mktemp("world"), _ADAPTERS, base=request.param)


@pytest.fixture(scope="module")
def expected(world: PeftWorld) -> dict[str, list[int]]:
    return {str(name): world.greedy(name, prompt(i, 15)) for i, name in enumerate(_NAMES)}


@pytest.fixture
def engine(world: PeftWorld) -> OwnedEngine:
    engine = model_engine(world.folder)
    world.add_all(engine)
    return engine


def _specs(world: PeftWorld) -> list[SequenceSpec]:
    return [
        spec(str(name), prompt(i, 15), adapter=world.digest(name)) for i, name in enumerate(_NAMES)
    ]


def test_each_alone_equals_peft(
    world: PeftWorld, engine: OwnedEngine, expected: dict[str, list[int]]
) -> None:
    for item in _specs(world):
        assert generated(engine, [item])[item.sequence_id] == expected[item.sequence_id]


@pytest.mark.parametrize("options", [{}, {"chunk": 4}, {"stagger": 2}], ids=str)
def test_all_in_one_batch_equal_peft(
    world: PeftWorld,
    engine: OwnedEngine,
    expected: dict[str, list[int]],
    options: dict[str, int],
) -> None:
    assert generated(engine, _specs(world), **options) == expected


def test_several_sequences_share_an_adapter(world: PeftWorld, engine: OwnedEngine) -> None:
    specs = [
        spec(f"s{i}", prompt(i, 10 + i), adapter=world.digest(("both", None)[i % 2]))
        for i in range(6)
    ]
    output = generated(engine, specs)
    for i in range(6):
        reference = world.greedy(("both", None)[i % 2], prompt(i, 10 + i))
        assert output[f"s{i}"] == reference, i


def test_bfloat16_distributions_are_near_those_of_peft(world: PeftWorld) -> None:
    engine = model_engine(world.folder, dtype="bfloat16")
    world.add_all(engine)
    everything = Sampling(logprobs=VOCAB)
    specs = [replace(item, sampling=everything, max_tokens=1) for item in _specs(world)]
    outputs = generate(engine, specs)
    for i, name in enumerate(_NAMES):
        ours = distribution(outputs[str(name)][0])
        reference = world.logprobs(name, prompt(i, 15))
        assert float((reference.exp() * (reference - ours)).sum()) < 0.05, name


def _blob(layer: int, module: str, features: tuple[int, int]) -> bytes:
    rows = [bytes(4 * width) for width in features]
    return encode([LoraRows(layer, module, 1, 1.0, *features, rows[0], rows[1])], dtype="F32")


@pytest.mark.parametrize(
    ("layer", "module", "features", "message"),
    [
        (-1, "embed_tokens", (VOCAB + 1, 96), "layer -1 embed_tokens is 321 to 96"),
        (3, "lm_head", (96, VOCAB - 1), "layer 3 lm_head is 96 to 319"),
        (-1, "lm_head", (96, VOCAB), "layer -1 lm_head is not in the base model"),
        (3, "embed_tokens", (VOCAB, 96), "layer 3 embed_tokens is not in the base model"),
        (4, "lm_head", (96, VOCAB), "layer 4 lm_head is not in the base model"),
        (-1, "q_proj", (96, 192), "layer -1 q_proj is not in the base model"),
    ],
)
def test_one_that_does_not_fit_is_refused_by_name(
    engine: OwnedEngine, layer: int, module: str, features: tuple[int, int], message: str
) -> None:
    with pytest.raises(AdapterIncompatibleError, match=message):
        add_adapter(engine, "bad", _blob(layer, module, features))
