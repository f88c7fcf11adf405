"""Adapters of every shape against PEFT in fp32: alone, and all in one batch with base rows."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from services.worker.engine import (
    AdapterIncompatibleError,
    SequenceFailure,
    SequenceSpec,
    StepItem,
    add_adapter,
)
from tests.engine.engine_support import (
    VOCAB,
    OwnedEngine,
    generated,
    model_engine,
    reference_greedy,
    spec,
    tiny_model,
)
from tests.engine.peft_blob import one_module_blob, peft_blob

_Blobs = dict[str, tuple[str, bytearray]]
_World = tuple[Path, _Blobs, dict[tuple[str, int], list[int]]]

_QV = ["q_proj", "v_proj"]
_QKVO = [*_QV, "k_proj", "o_proj"]
_MLP = ["gate_proj", "up_proj", "down_proj"]
_ALL = [*_QKVO, *_MLP]
_ADAPTERS = {
    "r1": LoraConfig(r=1, lora_alpha=2, target_modules=_QV),
    "r4": LoraConfig(r=4, lora_alpha=4, target_modules=_QKVO),
    "r7": LoraConfig(r=7, lora_alpha=10, target_modules=_ALL),
    "r8": LoraConfig(r=8, lora_alpha=16, target_modules=_MLP),
    "r16": LoraConfig(r=16, lora_alpha=32, target_modules=_ALL, use_rslora=True),
    "r33": LoraConfig(r=33, lora_alpha=33, target_modules=_QKVO, layers_to_transform=[1]),
    "r64": LoraConfig(r=64, lora_alpha=64, target_modules=["k_proj", "up_proj"]),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=_ALL,
        rank_pattern={"q_proj": 9, r"layers\.2\.mlp\.up_proj": 2},
        alpha_pattern={"v_proj": 3, r"layers\.1\.mlp\.down_proj": 20},
    ),
}


def _prompt(index: int, length: int = 12) -> list[int]:
    generator = torch.Generator().manual_seed(100 + index)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> _World:
    """Model folder, blobs by adapter name, and PEFT's greedy output by (adapter, prompt length)."""
    folder = tmp_path_factory.mktemp("model")
    model: Any = tiny_model(folder)
    names = list(_ADAPTERS)
    model = get_peft_model(model, _ADAPTERS[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, _ADAPTERS[name])
    torch.manual_seed(5)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    adapters = tmp_path_factory.mktemp("adapters")
    model.save_pretrained(adapters, selected_adapters=names)
    blobs = {name: peft_blob(adapters / name) for name in names}
    expected = {}
    for length in (12, 80):
        for index, name in enumerate(names):
            model.set_adapter(name)
            expected[name, length] = reference_greedy(model, _prompt(index, length))
        with model.disable_adapter():
            expected["base", length] = reference_greedy(model, _prompt(99, length))
    return folder, blobs, expected


@pytest.fixture
def engine(world: _World) -> OwnedEngine:
    folder, blobs, _ = world
    engine = model_engine(folder)
    for digest, blob in blobs.values():
        add_adapter(engine, digest, blob)
    return engine


def _specs(blobs: _Blobs, length: int) -> list[SequenceSpec]:
    specs = [
        spec(name, _prompt(index, length), adapter=blobs[name][0])
        for index, name in enumerate(_ADAPTERS)
    ]
    return [*specs, spec("base", _prompt(99, length))]


@pytest.mark.parametrize("length", [12, 80])
def test_each_adapter_alone_equals_peft(world: _World, engine: OwnedEngine, length: int) -> None:
    _, blobs, expected = world
    for item in _specs(blobs, length):
        output = generated(engine, [item])
        assert output[item.sequence_id] == expected[item.sequence_id, length], item.sequence_id


def test_adapters_change_the_output(world: _World) -> None:
    _, _, expected = world
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)


@pytest.mark.parametrize(
    ("length", "options"),
    [(12, {}), (80, {}), (80, {"chunk": 7}), (80, {"chunk": 40, "stagger": 2})],
    ids=["short prompts", "long prompts", "small chunks", "staggered"],
)
def test_all_adapters_mixed_with_base_rows_equal_peft(
    world: _World, engine: OwnedEngine, length: int, options: dict[str, int]
) -> None:
    _, blobs, expected = world
    output = generated(engine, _specs(blobs, length), **options)
    assert output == {name: expected[name, length] for name in output}
    engine.check_integrity()


def test_packed_bfloat16_rows_compute_what_plain_ones_do(world: _World) -> None:
    folder, blobs, expected = world
    engine = model_engine(folder, dtype="bfloat16")
    for digest, blob in blobs.values():
        add_adapter(engine, digest, blob)
    output = generated(engine, _specs(blobs, 12))
    agreeing = sum(output[name][:4] == expected[name, 12][:4] for name in output)
    assert agreeing >= len(output) - 2


def test_a_removed_adapter_can_come_back(world: _World, engine: OwnedEngine) -> None:
    _, blobs, expected = world
    digest, blob = blobs["r7"]
    item = _specs(blobs, 12)[2]
    generated(engine, [item])
    engine.remove_adapter(digest)
    add_adapter(engine, digest, bytes(blob))  # read-only memory is taken too
    assert generated(engine, [item])["r7"] == expected["r7", 12]


@pytest.mark.parametrize(("value", "scale"), [(1e25, 1.0), (3e38, 7.0)], ids=["product", "scale"])
def test_an_adapter_that_overflows_fails_its_own_sequence_only(
    world: _World, engine: OwnedEngine, value: float, scale: float
) -> None:
    _, blobs, expected = world
    huge = one_module_blob(value, scale=scale, module="down_proj", features=(128, 96))
    add_adapter(engine, "huge", huge)
    mates = _specs(blobs, 12)[:3]
    engine.open_sequence(spec("huge", _prompt(50), adapter="huge"))
    for item in mates:
        engine.open_sequence(item)
    prompts = [StepItem(name, 12) for name in ("huge", "r1", "r4", "r7")]
    results = engine.step(prompts)
    assert [type(result) is SequenceFailure for result in results] == [True, False, False, False]
    engine.close_sequence("huge")
    engine.check_integrity()
    # The slot that held infinities serves the next sequence.
    late = dataclasses.replace(mates[2], sequence_id="late")
    assert generated(engine, [late])["late"] == expected["r7", 12]
    for item in mates:
        engine.close_sequence(item.sequence_id)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (one_module_blob(layer=3), "layer 3 q_proj is not in the base model"),
        (one_module_blob(module="lm_head"), "layer 0 lm_head is not in the base model"),
        (one_module_blob(features=(96, 96)), "layer 0 q_proj is 96 to 96"),
        (one_module_blob()[:-1], "expected"),
        (b"no adapter at all", "not an adapter blob"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    engine: OwnedEngine, blob: bytes | bytearray, message: str
) -> None:
    with pytest.raises(AdapterIncompatibleError, match=message):
        add_adapter(engine, "bad", blob)
    engine.check_integrity()
