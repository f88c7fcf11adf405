"""Sequences that come, go and restart while others run."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from services.common.base_model import ModelNotFoundError, UnsupportedModelError
from services.worker.engine import (
    EngineSettings,
    SampledToken,
    Sampling,
    SequenceSpec,
    StepItem,
    _share_cores,
    build_engine,
)
from tests.engine.engine_support import (
    VOCAB,
    OwnedEngine,
    generate,
    generated,
    model_engine,
    spec,
    tiny_model,
    token_ids,
)

_SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.0, seed=11),
    Sampling(temperature=0.8, top_p=0.9, seed=2**63),
    Sampling(temperature=1.5, top_k=30, min_p=0.01, seed=4, frequency_penalty=0.4),
    Sampling(temperature=1.0, seed=11, repetition_penalty=1.3, presence_penalty=0.2),
)


def _prompt(index: int, length: int = 20) -> list[int]:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(path)
    return path


@pytest.fixture
def engine(folder: Path) -> OwnedEngine:
    return model_engine(folder, max_sequences=8)


def _specs() -> list[SequenceSpec]:
    return [spec(f"s{i}", _prompt(i), sampling=s) for i, s in enumerate(_SAMPLINGS)]


def test_sampled_text_does_not_depend_on_batch_mates(engine: OwnedEngine) -> None:
    together = generated(engine, _specs(), chunk=9, stagger=2)
    for item in _specs():
        assert generated(engine, [item])[item.sequence_id] == together[item.sequence_id]


@pytest.mark.parametrize("emitted", [1, 7, 23])
def test_a_resubmitted_sequence_goes_on_with_the_same_text(
    engine: OwnedEngine, emitted: int
) -> None:
    whole = generated(engine, _specs())
    resumed = [
        spec(item.sequence_id, _prompt(i), emitted=whole[f"s{i}"][:emitted], sampling=item.sampling)
        for i, item in enumerate(_specs())
    ]
    rest = generated(engine, resumed, chunk=16)
    assert {name: whole[name][:emitted] + rest[name] for name in rest} == whole


def test_a_sequence_closed_in_the_middle_does_not_disturb_its_mates(engine: OwnedEngine) -> None:
    expected = generated(engine, _specs())
    for item in _specs():
        engine.open_sequence(item)
    outputs: dict[str, list[int]] = {item.sequence_id: [] for item in _specs()}
    counts = dict.fromkeys(outputs, 20)
    for step in range(24):
        for closed in {4: ["s1"], 9: ["s0", "s3"]}.get(step, []):
            engine.close_sequence(closed)
            engine.close_sequence(closed)
            del counts[closed]
            engine.check_integrity()
        for token in engine.step([StepItem(name, n) for name, n in counts.items()]):
            assert isinstance(token, SampledToken)
            outputs[token.sequence_id].append(token.token_id)
        counts = dict.fromkeys(counts, 1)
    assert {name: expected[name][: len(output)] for name, output in outputs.items()} == outputs
    assert [len(outputs[name]) for name in sorted(outputs)] == [9, 4, 24, 9, 24]
    for name in counts:
        engine.close_sequence(name)
    engine.check_integrity()


def test_a_freed_block_keeps_nothing_of_its_sequence(folder: Path) -> None:
    engine = model_engine(folder, memory_bytes=10 * 24576)  # the long context takes all blocks
    expected = generated(engine, [_specs()[0]])
    generated(engine, [spec("long", _prompt(9, 130))])
    assert generated(engine, [_specs()[0]]) == expected
    engine.check_integrity()


@pytest.mark.parametrize("block_tokens", [1, 5, 16])
def test_the_size_of_blocks_changes_nothing(folder: Path, block_tokens: int) -> None:
    expected = generated(model_engine(folder), _specs())
    assert generated(model_engine(folder, block_tokens=block_tokens), _specs()) == expected


@pytest.mark.parametrize("shared_blocks", [1, 3])
def test_sequences_share_the_blocks_of_their_common_beginning(
    engine: OwnedEngine, shared_blocks: int
) -> None:
    prompt = _prompt(5, 60)
    expected = generated(engine, [spec("first", prompt), spec("other", [*prompt[:48], 7, 8, 9])])
    engine.open_sequence(spec("first", prompt))
    engine.step([StepItem("first", 60)])
    shared = engine.blocks_of("first")[:shared_blocks]
    known: dict[str, Any] = {"blocks": shared, "computed_tokens": 16 * shared_blocks}
    sharing = [
        dataclasses.replace(spec("second", prompt), **known),
        dataclasses.replace(spec("other", [*prompt[:48], 7, 8, 9]), **known),
    ]
    outputs = generated(engine, sharing)
    engine.check_integrity()
    assert outputs == {"second": expected["first"], "other": expected["other"]}


def test_a_sequence_goes_on_when_the_one_that_it_shares_with_has_left(engine: OwnedEngine) -> None:
    prompt = _prompt(6, 40)
    expected = generated(engine, [spec("late", prompt)])
    engine.engine.open_sequence(spec("first", prompt))
    engine.engine.step([StepItem("first", 40, new_blocks=(7, 3, 5))])
    engine.engine.close_sequence("first")
    late = dataclasses.replace(spec("late", prompt), blocks=(7, 3), computed_tokens=32)
    engine.engine.open_sequence(late)
    results = engine.engine.step([StepItem("late", 8, new_blocks=(5,))])
    tokens = [result.token_id for result in results if isinstance(result, SampledToken)]
    assert tokens == expected["late"][:1]


def test_sequences_of_very_different_lengths_decode_together(engine: OwnedEngine) -> None:
    specs = [spec(f"n{n}", _prompt(n, n)) for n in (200, 3, 180, 1, 90, 30)]
    together = generated(engine, specs)
    assert together == {s.sequence_id: generated(engine, [s])[s.sequence_id] for s in specs}


def test_long_and_short_neighbours_are_attended_in_separate_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.engine.attention._CALL_POSITIONS", 10)
    engine = model_engine(folder, max_sequences=8)
    test_sequences_of_very_different_lengths_decode_together(engine)


def test_results_come_in_the_order_of_the_items(engine: OwnedEngine) -> None:
    for item in _specs():
        engine.open_sequence(item)
    items = [StepItem("s3", 20), StepItem("s0", 5), StepItem("s4", 20), StepItem("s1", 20)]
    assert [token.sequence_id for token in engine.step(items)] == ["s3", "s4", "s1"]
    assert engine.step([StepItem("s0", 5)]) == []


def test_logprobs_come_with_the_tokens_that_asked(engine: OwnedEngine) -> None:
    sampling = dataclasses.replace(_SAMPLINGS[1], logprobs=2)
    outputs = generate(engine, [spec("a", _prompt(1), sampling=sampling), _specs()[1]])
    assert token_ids(outputs["a"]) == token_ids(outputs["s1"])
    assert all(len(token.top) == 2 and (token.logprob or 0.0) <= 0.0 for token in outputs["a"])
    assert all(token.logprob is None for token in outputs["s1"])


def test_bfloat16_mostly_agrees_with_float32(folder: Path) -> None:
    """Teacher-forced: the fp32 text is given, so one difference does not make all later ones."""
    text = [spec(f"t{i}", _prompt(i, 60), max_tokens=24) for i in range(6)]
    outputs = generated(model_engine(folder), text)
    engine = model_engine(folder, dtype="bfloat16")
    agreeing = total = 0
    for n in range(24):
        forced = [
            spec(t.sequence_id, t.token_ids, emitted=outputs[t.sequence_id][:n], max_tokens=n + 1)
            for t in text
        ]
        for name, tokens in generated(engine, forced).items():
            agreeing += tokens[0] == outputs[name][n]
            total += 1
    assert agreeing >= 0.9 * total


def test_the_engine_describes_itself(folder: Path) -> None:
    info = model_engine(folder, max_sequences=5, memory_bytes=2**20, block_tokens=4).info
    assert info.description == "torch cpu float32"
    assert (info.vocab_size, info.eos_token_ids) == (VOCAB, (2,))
    assert (info.max_sequences, info.max_context_tokens) == (5, 256)
    assert info.block_bytes == 4 * 2 * 3 * 2 * 32 * 4
    assert info.pool_blocks == 2**20 // info.block_bytes


def test_a_model_that_cannot_be_served_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        build_engine(EngineSettings())
    config = (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("LlamaForCausalLM", "GPT2LMHeadModel"))
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        model_engine(tmp_path)
    with pytest.raises(ValueError, match="given 100 bytes; one block needs 24576"):
        model_engine(folder, memory_bytes=100)


def test_waiting_threads_give_their_core_away_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {})
    _share_cores()
    assert os.environ == {"GOMP_SPINCOUNT": "2000"}
    monkeypatch.setattr(os, "environ", {"OMP_WAIT_POLICY": "active"})
    _share_cores()
    assert os.environ == {"OMP_WAIT_POLICY": "active"}
