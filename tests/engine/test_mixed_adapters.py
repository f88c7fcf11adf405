"""Adapters of all ranks, shapes and dtypes in one batch equal PEFT with each alone, in fp32."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from services.worker.engine import (
    AdapterIncompatibleError,
    Sampling,
    SequenceSpec,
    add_adapter,
)
from tests.engine.engine_support import (
    VOCAB,
    OwnedEngine,
    distribution,
    generate,
    generated,
    model_engine,
    spec,
    tiny_model,
    token_ids,
)
from tests.engine.peft_blob import one_module_blob
from tests.engine.peft_world import PeftWorld, peft_world, prompt

_RANKS = (1, 4, 7, 8, 16, 33, 64, 128, 256)
_TARGETS = (
    ["q_proj", "v_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj"],
    ["gate_proj", "up_proj", "down_proj"],
    "all-linear",
    ["k_proj", "up_proj"],
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PATTERNS = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules="all-linear",
    rank_pattern={"q_proj": 9, r"layers\.2\.mlp\.up_proj": 2},
    alpha_pattern={"v_proj": 3, r"layers\.1\.mlp\.down_proj": 20},
)
_ADAPTERS = {
    **{
        f"r{rank}": LoraConfig(
            r=rank,
            lora_alpha=5,
            target_modules=_TARGETS[index % len(_TARGETS)],
            use_rslora=index % 3 == 2,
            layers_to_transform=[1] if index % 4 == 2 else None,
        )
        for index, rank in enumerate(_RANKS)
    },
    "patterns": _PATTERNS,
}
_SAVED_AS = {name: _DTYPES[index % 3] for index, name in enumerate(_ADAPTERS)}
_EVERYTHING = Sampling(logprobs=VOCAB)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    return peft_world(tmp_path_factory.mktemp("world"), _ADAPTERS, dtypes=_SAVED_AS)


@pytest.fixture(scope="module")
def expected(world: PeftWorld) -> dict[str, list[int]]:
    """Greedy output of each adapter and the base for one and the same prompt."""
    return {str(name): world.greedy(name, prompt(0)) for name in [*_ADAPTERS, None]}


@pytest.fixture(scope="module")
def engine(world: PeftWorld) -> OwnedEngine:
    engine = model_engine(world.folder)
    world.add_all(engine)
    return engine


def _specs(world: PeftWorld, sampling: Sampling = _EVERYTHING) -> list[SequenceSpec]:
    return [
        spec(str(name), prompt(0), adapter=world.digest(name), sampling=sampling)
        for name in [*_ADAPTERS, None]
    ]


def test_one_prompt_with_every_adapter_in_one_batch_equals_peft(
    world: PeftWorld, engine: OwnedEngine, expected: dict[str, list[int]]
) -> None:
    assert generated(engine, _specs(world, Sampling())) == expected


@pytest.mark.parametrize("options", [{}, {"chunk": 5}, {"stagger": 3}], ids=str)
def test_every_adapter_alone_equals_the_mixed_batch(
    world: PeftWorld, engine: OwnedEngine, options: dict[str, int]
) -> None:
    together = generate(engine, _specs(world), **options)
    for item in _specs(world):
        alone = generate(engine, [item])[item.sequence_id]
        mixed = together[item.sequence_id]
        assert token_ids(alone) == token_ids(mixed), item.sequence_id
        for one, other in zip(alone, mixed, strict=True):
            torch.testing.assert_close(distribution(one), distribution(other), atol=1e-3, rtol=0)


def test_distributions_are_those_of_peft(world: PeftWorld, engine: OwnedEngine) -> None:
    outputs = generate(engine, _specs(world))
    for name in [*_ADAPTERS, None]:
        known = list(prompt(0))
        for token in outputs[str(name)][:6]:
            reference = world.logprobs(name, known)
            ours = distribution(token)
            divergence = float((reference.exp() * (reference - ours)).sum())
            assert abs(divergence) < 1e-5, name
            torch.testing.assert_close(ours, reference, atol=1e-3, rtol=0)
            known.append(token.token_id)


def test_every_adapter_gives_another_text(expected: dict[str, list[int]]) -> None:
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)


def test_nothing_of_an_evicted_adapter_is_left_for_the_next(tmp_path: Path) -> None:
    """The next one has other modules, a smaller rank and the same place in memory."""
    adapters = {
        "all": LoraConfig(r=64, lora_alpha=64, target_modules="all-linear"),
        "q and v": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    }
    world = peft_world(tmp_path, adapters)
    engine = model_engine(world.folder, max_sequences=3)
    memory = bytearray(max(len(blob) for _, blob in world.blobs.values()))
    for name in ("all", "q and v", "all", "q and v"):
        digest, blob = world.blobs[name]
        memory[: len(blob)] = blob
        add_adapter(engine, digest, memoryview(memory)[: len(blob)])
        specs = [
            spec(f"{name}{i}", prompt(i, 20), adapter=digest if i % 2 else None) for i in range(3)
        ]
        output = generated(engine, specs)
        for i in range(3):
            reference = world.greedy(name if i % 2 else None, prompt(i, 20))
            assert output[f"{name}{i}"] == reference, (name, i)
        engine.remove_adapter(digest)
        engine.check_integrity()


@pytest.mark.parametrize("stored", _DTYPES, ids=str)
@pytest.mark.parametrize("computed", ["bfloat16", "float16"])
def test_adapters_of_every_dtype_serve_an_engine_of_another(
    tmp_path: Path, stored: torch.dtype, computed: str
) -> None:
    adapters = {"a": LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")}
    world = peft_world(tmp_path, adapters, dtypes={"a": stored})
    engine = model_engine(world.folder, dtype=computed)  # type: ignore[arg-type]  # a literal
    world.add_all(engine)
    specs = [
        spec(f"s{i}", prompt(i), adapter=world.digest("a"), sampling=_EVERYTHING, max_tokens=1)
        for i in range(4)
    ]
    outputs = generate(engine, specs)
    for i in range(4):
        reference = world.logprobs("a", prompt(i))
        ours = distribution(outputs[f"s{i}"][0])
        divergence = float((reference.exp() * (reference - ours)).sum())
        assert divergence < 0.05, i


def test_weights_that_the_engines_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    engine = model_engine(tmp_path, dtype="float16")
    add_adapter(engine, "fits", one_module_blob(6e4))
    with pytest.raises(AdapterIncompatibleError, match="not all weights are finite as"):
        add_adapter(engine, "overflows", one_module_blob(7e4))
    add_adapter(engine, "overflows", one_module_blob(1.0))  # nothing was kept of it
