"""The engine without a model."""

import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Sequence

import pytest

from services.common.adapter_container import LoraRows, encode, read_header
from services.worker.engine import (
    AdapterIncompatibleError,
    Engine,
    EngineSettings,
    SampledToken,
    Sampling,
    SequenceSpec,
    StepItem,
    add_adapter,
    build_engine,
)
from services.worker.engine.profiles import PROFILES
from services.worker.engine.simulated import SimulatedEngine, output_tokens
from tests.support.own_blocks import OwnBlocks

_A40 = PROFILES["a40-llama-7b"]
_EOS = 2
_SEED_1 = Sampling(seed=1)


@pytest.fixture
def sleeps() -> list[float]:
    return []


@pytest.fixture
def engine(sleeps: list[float]) -> SimulatedEngine:
    info = build_engine(EngineSettings(kind="simulated")).info
    return OwnBlocks(info, _A40, sleep=sleeps.append, clock=lambda: 0.0)


def _spec(
    name: str = "a",
    *,
    prompt: int = 100,
    emitted: Sequence[int] = (),
    adapter: str | None = None,
    sampling: Sampling = _SEED_1,
) -> SequenceSpec:
    tokens = (*range(100, 100 + prompt), *emitted)
    return SequenceSpec(name, tokens, prompt, adapter, sampling, 2000)


def _blob(rank: int) -> bytes:
    row = LoraRows(0, "q_proj", rank, 1.0, 64, 64, bytes(rank * 128), bytes(rank * 128))
    return encode([row], dtype="BF16")


def _run(engine: Engine, item: SequenceSpec, steps: int) -> list[int]:
    engine.open_sequence(item)
    tokens: list[int] = []
    count = len(item.token_ids)
    blocks = tuple(range(-(-(count + steps) // engine.info.block_tokens)))
    for _ in range(steps):
        (token,) = engine.step([StepItem(item.sequence_id, count, new_blocks=blocks)])
        assert isinstance(token, SampledToken)
        tokens.append(token.token_id)
        count, blocks = 1, ()
    engine.close_sequence(item.sequence_id)
    return tokens


def test_tokens_depend_on_seed_and_position_only(engine: SimulatedEngine) -> None:
    whole = _run(engine, _spec(), 40)
    assert whole == _run(engine, _spec("other", prompt=7), 40)
    assert whole[11:] == _run(engine, _spec(emitted=whole[:11]), 29)
    assert whole != _run(engine, _spec(sampling=Sampling(seed=2)), 40)


def test_output_lengths_have_the_quantiles_of_the_conversation_trace() -> None:
    lengths = sorted(output_tokens(seed) for seed in range(5000))
    assert lengths[0] >= 1
    assert statistics.median(lengths) == pytest.approx(129, rel=0.06)
    assert lengths[4500] == pytest.approx(424, rel=0.1)


def test_a_sequence_ends_by_itself_unless_that_is_suppressed(engine: SimulatedEngine) -> None:
    tokens = _run(engine, _spec(), 1500)
    end = tokens.index(_EOS)
    assert 0 < end < 1500
    ignore_eos = Sampling(seed=1, min_tokens=1500, suppressed_ids=(_EOS,))
    ignoring = _run(engine, _spec(sampling=ignore_eos), 1500)
    assert _EOS not in ignoring
    assert ignoring[:end] == tokens[:end]


@pytest.mark.parametrize(
    ("rank", "published_ms"), [(8, 74.1), (16, 78.7), (32, 88.1), (64, 106.8), (128, 144.2)]
)
def test_single_requests_take_the_published_time_to_first_token(
    engine: SimulatedEngine, sleeps: list[float], rank: int, published_ms: float
) -> None:
    """Llama-7B, adapters on q/k/v/o (2 MiB per rank); the prompt is of 300 tokens."""
    prompt = 300
    add_adapter(engine, "d", _blob(rank))
    load_ms = _A40.load_s(rank * 2 * 2**20) * 1000
    engine.open_sequence(_spec(prompt=prompt, adapter="d"))
    engine.step([StepItem("a", prompt)])
    assert load_ms + sleeps[-1] * 1000 == pytest.approx(published_ms, rel=0.01)


def test_a_decode_step_takes_the_fitted_time(engine: SimulatedEngine, sleeps: list[float]) -> None:
    add_adapter(engine, "d", _blob(16))
    specs = [_spec(f"s{i}", adapter="d" if i else None) for i in range(4)]
    for item in specs:
        engine.open_sequence(item)
        engine.step([StepItem(item.sequence_id, 100)])
    engine.step([StepItem(item.sequence_id, 1) for item in specs])
    expected_ms = 6 + 19.4 + 5 + 4 * 0.1 + 1.08e-3 * 4 * 100 + 0.0042 * 3 * 16
    assert sleeps[-1] * 1000 == pytest.approx(expected_ms)


def test_loading_an_adapter_takes_its_transfer_time(
    engine: SimulatedEngine, sleeps: list[float]
) -> None:
    blob = _blob(64)
    add_adapter(engine, "d", blob)
    assert sleeps == [pytest.approx(len(blob) / (10.15 * 2**20 * 1000))]
    engine.remove_adapter("d")
    with pytest.raises(AdapterIncompatibleError):
        add_adapter(engine, "bad", b"nothing of the kind")


def test_an_adapter_that_comes_in_parts_takes_its_transfer_time_in_shares(
    engine: SimulatedEngine, sleeps: list[float]
) -> None:
    blob = _blob(64)
    header = read_header(blob)
    engine.begin_adapter("d", header, memoryview(blob)[header.payload_offset :])
    for layers in (8, 16, 32):
        engine.extend_adapter("d", layers)
    whole_s = _A40.load_s(len(blob))
    assert sleeps == [pytest.approx(whole_s * share) for share in (0.25, 0.25, 0.5)]


def test_a_chunk_in_parts_takes_its_shares_and_the_steps_around_them(
    engine: SimulatedEngine, sleeps: list[float]
) -> None:
    add_adapter(engine, "d", _blob(16))
    for name in ("whole", "parts"):
        engine.open_sequence(_spec(name, adapter="d"))
    engine.step([StepItem("whole", 100)])
    whole_ms = sleeps[-1] * 1000
    for until_layer, share in ((8, 0.25), (24, 0.5)):
        assert engine.step([StepItem("parts", 100, until_layer=until_layer)]) == []
        assert sleeps[-1] * 1000 == pytest.approx(_A40.fixed_ms + share * (whole_ms - 6))
    (token,) = engine.step([StepItem("parts", 100)])
    assert sleeps[-1] * 1000 == pytest.approx(_A40.fixed_ms + 0.25 * (whole_ms - 6))
    assert token.sequence_id == "parts"


def test_a_part_beside_decodes_adds_its_share_to_their_step(
    engine: SimulatedEngine, sleeps: list[float]
) -> None:
    add_adapter(engine, "d", _blob(16))
    engine.open_sequence(_spec("mate"))
    engine.open_sequence(_spec("late", prompt=300, adapter="d"))
    engine.step([StepItem("mate", 100)])
    engine.step([StepItem("mate", 1)])
    alone_ms = sleeps[-1] * 1000
    results = engine.step([StepItem("mate", 1), StepItem("late", 300, until_layer=16)])
    part_ms = (300 * 0.173 + 11.5 + 1.29e-3 * 300 * 16) / 2
    assert sleeps[-1] * 1000 == pytest.approx(alone_ms + 1.08e-3 + part_ms)
    assert [result.sequence_id for result in results] == ["mate"]


def test_tokens_do_not_depend_on_the_parts(engine: SimulatedEngine) -> None:
    whole = _run(engine, _spec(), 3)
    engine.open_sequence(_spec())
    engine.step([StepItem("a", 100, until_layer=5)])
    tokens = [engine.step([StepItem("a", count)])[0] for count in (100, 1, 1)]
    assert [token.token_id for token in tokens if isinstance(token, SampledToken)] == whole


def test_layers_that_have_not_come_are_not_computed(engine: SimulatedEngine) -> None:
    blob = _blob(8)
    header = read_header(blob)
    engine.begin_adapter("d", header, memoryview(blob)[header.payload_offset :])
    engine.extend_adapter("d", 8)
    engine.open_sequence(_spec(adapter="d"))
    for item in (StepItem("a", 100, until_layer=9), StepItem("a", 100)):
        with pytest.raises(AssertionError):
            engine.step([item])


def test_logprobs_are_given_when_asked(engine: SimulatedEngine) -> None:
    engine.open_sequence(_spec(sampling=Sampling(logprobs=2)))
    (token,) = engine.step([StepItem("a", 100)])
    assert isinstance(token, SampledToken)
    assert token.logprob == 0.0
    assert token.top == ((token.token_id, 0.0),)


def test_a_seed_changes_every_text() -> None:
    settings = EngineSettings(kind="simulated", profile="cpu-smollm2")
    texts = [
        _run(build_engine(dataclasses.replace(settings, seed=seed)), _spec(), 3) for seed in (0, 1)
    ]
    assert texts[0] != texts[1]
    with pytest.raises(ValueError, match="a40-llama-7b"):
        build_engine(dataclasses.replace(settings, profile="abacus"))


def test_it_runs_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from services.worker.engine import EngineSettings, build_engine\n"
        "print(build_engine(EngineSettings(kind='simulated')).info.description)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert output.stdout.strip() == "simulated a40-llama-7b"
