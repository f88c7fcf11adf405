"""Prompts are computed layer by layer while their adapter arrives, with the results of whole steps.

What has not arrived is NaN in every test, so reading it would show.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import pytest
import torch
from peft import LoraConfig

from services.common.adapter_container import ContainerHeader, read_header
from services.worker.engine import (
    SampledToken,
    Sampling,
    SequenceFailure,
    SequenceSpec,
    StepItem,
    add_adapter,
)
from tests.engine.engine_support import OwnedEngine, generated, model_engine, spec
from tests.engine.peft_world import PeftWorld, peft_world, prompt

_LAYERS = 3
_ADAPTERS = {
    "all": LoraConfig(r=8, lora_alpha=5, target_modules="all-linear"),
    "q and v": LoraConfig(r=33, lora_alpha=33, target_modules=["q_proj", "v_proj"]),
    "second layer": LoraConfig(
        r=4, lora_alpha=8, target_modules=["o_proj", "down_proj"], layers_to_transform=[1]
    ),
    "last layer": LoraConfig(
        r=7, lora_alpha=9, target_modules=["up_proj"], layers_to_transform=[2]
    ),
    "outer": LoraConfig(
        r=16, lora_alpha=16, target_modules=["embed_tokens", "lm_head", "q_proj", "down_proj"]
    ),
    "in bf16": LoraConfig(r=16, lora_alpha=8, target_modules="all-linear"),
}
# Every way in which the layers can come in parts: after which of them a part ends.
_SPLITS = [
    [*ends, _LAYERS] for count in range(_LAYERS) for ends in combinations(range(1, _LAYERS), count)
]
_TOKENS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PeftWorld:
    folder = tmp_path_factory.mktemp("world")
    return peft_world(folder, _ADAPTERS, dtypes={"in bf16": torch.bfloat16})


@pytest.fixture
def engine(world: PeftWorld) -> OwnedEngine:
    return model_engine(world.folder, max_sequences=8)


@dataclass(slots=True)
class _Arrival:
    """An adapter whose bytes come layer by layer into memory that holds NaNs."""

    engine: OwnedEngine
    digest: str
    header: ContainerHeader
    source: memoryview
    payload: memoryview

    def bring(self, layers: int) -> None:
        for chunk in self.header.layers:
            if chunk.layer < layers or layers == _LAYERS:
                end = chunk.offset + chunk.size_bytes
                self.payload[chunk.offset : end] = self.source[chunk.offset : end]
        self.engine.extend_adapter(self.digest, layers)


def _begin(engine: OwnedEngine, world: PeftWorld, name: str) -> _Arrival:
    digest, blob = world.blobs[name]
    header = read_header(blob)
    payload = memoryview(bytearray(b"\xff" * header.payload_bytes))  # NaN in every dtype
    engine.begin_adapter(digest, header, payload)
    return _Arrival(engine, digest, header, memoryview(blob)[header.payload_offset :], payload)


def _spec(
    world: PeftWorld, name: str | None, sequence_id: str, *, index: int = 0, length: int = 20
) -> SequenceSpec:
    digest = world.digest(name)
    return spec(sequence_id, prompt(index, length), adapter=digest, max_tokens=_TOKENS)


def _step(engine: OwnedEngine, items: Sequence[StepItem]) -> dict[str, int]:
    results = engine.step(items)
    engine.check_integrity()
    tokens: dict[str, int] = {}
    for result in results:
        assert not isinstance(result, SequenceFailure), result
        tokens[result.sequence_id] = result.token_id
    return tokens


def _decode(engine: OwnedEngine, outputs: dict[str, list[int]], steps: int) -> None:
    for _ in range(steps):
        for name, token in _step(engine, [StepItem(name, 1) for name in outputs]).items():
            outputs[name].append(token)


@pytest.mark.parametrize("split", _SPLITS, ids=str)
@pytest.mark.parametrize("name", _ADAPTERS)
def test_a_prompt_in_parts_continues_as_peft_does(
    world: PeftWorld, engine: OwnedEngine, name: str, split: list[int]
) -> None:
    arrival = _begin(engine, world, name)
    engine.open_sequence(_spec(world, name, "a"))
    for layers in split:
        arrival.bring(layers)
        if layers < _LAYERS:
            assert _step(engine, [StepItem("a", 20, until_layer=layers)]) == {}
    outputs = {"a": [_step(engine, [StepItem("a", 20)])["a"]]}
    _decode(engine, outputs, _TOKENS - 1)
    assert outputs["a"] == world.greedy(name, prompt(0, 20), _TOKENS)


def test_all_layers_may_be_passed_before_the_last_part(
    world: PeftWorld, engine: OwnedEngine
) -> None:
    arrival = _begin(engine, world, "outer")
    engine.open_sequence(_spec(world, "outer", "a"))
    arrival.bring(1)
    _step(engine, [StepItem("a", 20, until_layer=1)])
    arrival.bring(_LAYERS)
    assert _step(engine, [StepItem("a", 20, until_layer=_LAYERS)]) == {}
    assert _step(engine, [StepItem("a", 20)])["a"] == world.greedy("outer", prompt(0, 20), 1)[0]


def test_a_part_may_have_fewer_layers_than_are_there(world: PeftWorld, engine: OwnedEngine) -> None:
    arrival = _begin(engine, world, "all")
    engine.open_sequence(_spec(world, "all", "a"))
    arrival.bring(2)
    for layers in (1, 2):
        assert _step(engine, [StepItem("a", 20, until_layer=layers)]) == {}
    arrival.bring(_LAYERS)
    assert _step(engine, [StepItem("a", 20)])["a"] == world.greedy("all", prompt(0, 20), 1)[0]


def test_decodes_and_prompts_of_others_run_beside_the_parts(
    world: PeftWorld, engine: OwnedEngine
) -> None:
    add_adapter(engine, *world.blobs["q and v"])
    arrivals = {name: _begin(engine, world, name) for name in ("all", "outer")}
    outputs: dict[str, list[int]] = {"base": [], "q and v": []}
    for index, name in enumerate(("base", "q and v")):
        engine.open_sequence(
            _spec(world, None if name == "base" else name, name, index=index, length=12)
        )
    for name, token in _step(engine, [StepItem(name, 12) for name in outputs]).items():
        outputs[name].append(token)
    for index, name in enumerate(arrivals):
        engine.open_sequence(_spec(world, name, name, index=10 + index, length=30))
    engine.open_sequence(_spec(world, "all", "all 2", index=12, length=9))
    early = [("all", 30), ("all 2", 9), ("outer", 30)]
    for layers in (1, 2):
        for arrival in arrivals.values():
            arrival.bring(layers)
        items = [StepItem(name, tokens, until_layer=layers) for name, tokens in early]
        items[1:1] = [StepItem(name, 1) for name in outputs]
        for name, token in _step(engine, items).items():
            outputs[name].append(token)
    for arrival in arrivals.values():
        arrival.bring(_LAYERS)
    late = _spec(world, "q and v", "late", index=20, length=15)
    engine.open_sequence(late)
    items = [StepItem(name, tokens) for name, tokens in early]
    items += [StepItem(name, 1) for name in outputs] + [StepItem("late", 15)]
    for name, token in _step(engine, items).items():
        outputs.setdefault(name, []).append(token)
    _decode(engine, outputs, _TOKENS - 4)
    expected = {
        "base": world.greedy(None, prompt(0, 12), _TOKENS),
        "q and v": world.greedy("q and v", prompt(1, 12), _TOKENS),
        "all": world.greedy("all", prompt(10, 30), _TOKENS),
        "outer": world.greedy("outer", prompt(11, 30), _TOKENS),
        "all 2": world.greedy("all", prompt(12, 9), _TOKENS),
        "late": world.greedy("q and v", prompt(20, 15), _TOKENS),
    }
    assert outputs == {name: tokens[: len(outputs[name])] for name, tokens in expected.items()}
    assert min(len(tokens) for tokens in outputs.values()) >= 5


def test_results_of_parts_and_others_come_in_the_order_of_the_items(
    world: PeftWorld, engine: OwnedEngine
) -> None:
    arrival = _begin(engine, world, "all")
    engine.open_sequence(_spec(world, "all", "early"))
    for name in ("x", "y"):
        engine.open_sequence(_spec(world, None, name))
    arrival.bring(2)
    first = [StepItem("x", 5), StepItem("early", 20, until_layer=2), StepItem("y", 5)]
    assert engine.step(first) == []
    arrival.bring(_LAYERS)
    results = engine.step([StepItem("y", 15), StepItem("early", 20), StepItem("x", 15)])
    assert [result.sequence_id for result in results] == ["y", "early", "x"]


@pytest.mark.parametrize("name", ["all", "outer"])
def test_only_the_first_chunk_of_a_long_prompt_comes_in_parts(
    world: PeftWorld, engine: OwnedEngine, name: str
) -> None:
    arrival = _begin(engine, world, name)
    engine.open_sequence(_spec(world, name, "a", length=50))
    for layers in (1, 2):
        arrival.bring(layers)
        _step(engine, [StepItem("a", 20, until_layer=layers)])
    arrival.bring(_LAYERS)
    assert _step(engine, [StepItem("a", 20)]) == {}
    assert _step(engine, [StepItem("a", 20)]) == {}
    outputs = {"a": [_step(engine, [StepItem("a", 10)])["a"]]}
    _decode(engine, outputs, _TOKENS - 1)
    assert outputs["a"] == world.greedy(name, prompt(0, 50), _TOKENS)


def test_a_later_chunk_may_come_in_parts(world: PeftWorld, engine: OwnedEngine) -> None:
    add_adapter(engine, *world.blobs["all"])
    engine.open_sequence(_spec(world, "all", "a", length=50))
    _step(engine, [StepItem("a", 30)])
    _step(engine, [StepItem("a", 20, until_layer=2)])
    assert _step(engine, [StepItem("a", 20)])["a"] == world.greedy("all", prompt(0, 50), 1)[0]


def test_a_prompt_of_one_token_may_come_in_parts(world: PeftWorld, engine: OwnedEngine) -> None:
    arrival = _begin(engine, world, "all")
    engine.open_sequence(_spec(world, "all", "a", length=1))
    for layers in (1, 2):
        arrival.bring(layers)
        _step(engine, [StepItem("a", 1, until_layer=layers)])
    arrival.bring(_LAYERS)
    assert _step(engine, [StepItem("a", 1)])["a"] == world.greedy("all", prompt(0, 1), 1)[0]


def test_a_sequence_closed_between_its_parts_leaves_nothing(
    world: PeftWorld, engine: OwnedEngine
) -> None:
    arrival = _begin(engine, world, "all")
    engine.open_sequence(_spec(world, "all", "a", length=40))
    arrival.bring(2)
    _step(engine, [StepItem("a", 40, until_layer=2)])
    engine.close_sequence("a")
    engine.check_integrity()  # its slot is clean in all layers
    engine.remove_adapter(arrival.digest)
    add_adapter(engine, *world.blobs["all"])
    again = _spec(world, "all", "a", index=3, length=10)
    output = generated(engine, [again])
    assert output["a"] == world.greedy("all", prompt(3, 10), _TOKENS)


def test_a_seeded_token_does_not_depend_on_the_parts(world: PeftWorld, engine: OwnedEngine) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=5, logprobs=3)
    add_adapter(engine, *world.blobs["all"])
    tokens: list[SampledToken] = []
    for ends in ([], [1], [1, 2]):
        item = spec("a", prompt(1, 30), adapter=world.digest("all"), sampling=sampling)
        engine.open_sequence(item)
        for end in ends:
            engine.step([StepItem("a", 30, until_layer=end)])
        (token,) = engine.step([StepItem("a", 30)])
        assert isinstance(token, SampledToken)
        tokens.append(token)
        engine.close_sequence("a")
    for token in tokens[1:]:
        assert token.token_id == tokens[0].token_id
        assert [one for one, _ in token.top] == [one for one, _ in tokens[0].top]
        assert [p for _, p in token.top] == pytest.approx([p for _, p in tokens[0].top], abs=1e-4)


def test_layers_that_are_not_there_are_never_computed(
    world: PeftWorld, engine: OwnedEngine
) -> None:
    arrival = _begin(engine, world, "all")
    engine.open_sequence(_spec(world, "all", "a"))
    for item in (StepItem("a", 20), StepItem("a", 20, until_layer=1)):
        with pytest.raises(AssertionError):
            engine.step([item])
    arrival.bring(1)
    for item in (StepItem("a", 20), StepItem("a", 20, until_layer=2)):
        with pytest.raises(AssertionError):
            engine.step([item])
    assert engine.step([StepItem("a", 20, until_layer=1)]) == []


def test_adapters_arrive_from_another_thread_while_others_step(
    world: PeftWorld, engine: OwnedEngine
) -> None:
    add_adapter(engine, *world.blobs["all"])
    arriving = ("q and v", "outer", "in bf16", "last layer")
    failures: list[BaseException] = []

    def load() -> None:
        try:
            for name in arriving:
                arrival = _begin(engine, world, name)
                for layers in (1, 2, 3):
                    arrival.bring(layers)
        except BaseException as error:
            failures.append(error)
            raise

    specs = [_spec(world, "all", f"s{i}", index=i) for i in range(3)]
    thread = threading.Thread(target=load)
    thread.start()
    output = generated(engine, specs, stagger=1)
    thread.join(timeout=60)
    assert not failures
    for i in range(3):
        assert output[f"s{i}"] == world.greedy("all", prompt(i, 20), _TOKENS)
    late = [_spec(world, name, name, index=7) for name in arriving]
    assert generated(engine, late) == {
        name: world.greedy(name, prompt(7, 20), _TOKENS) for name in arriving
    }
