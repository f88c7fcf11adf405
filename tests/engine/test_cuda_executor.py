"""The CUDA executor against plain torch: mixed adapters, chunks, parts, prefixes, in fp32."""

from pathlib import Path

import pytest
import torch

from services.common.adapter_container import read_header
from services.worker.engine.api import (
    AdapterIncompatibleError,
    SampledToken,
    Sampling,
    SequenceSpec,
    StepItem,
    add_adapter,
)
from services.worker.engine.cuda_lora import Regime
from tests.engine.cuda_world import (
    VOCAB,
    adapter_blob,
    cuda_engine,
    distributions,
    torch_engine,
    write_model,
)
from tests.engine.engine_support import DType, OwnedEngine, generate, spec, token_ids

ASKING = Sampling(logprobs=VOCAB)
RANKS = (1, 12, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_model(path)
    return path


def _spec(name: str, tokens: int, adapter: str | None, *, max_tokens: int = 2) -> SequenceSpec:
    prompt = [(7 * i + tokens) % VOCAB for i in range(tokens)]
    return spec(name, prompt, adapter=adapter, sampling=ASKING, max_tokens=max_tokens)


def _mixed_specs() -> list[SequenceSpec]:
    lengths = {None: 3, "r1": 12, "r12": 2, "r40": 4}
    return [_spec(f"s{n}", n, adapter) for adapter, n in lengths.items()]


def _outputs(engine: OwnedEngine, folder: Path) -> dict[str, list[SampledToken]]:
    """Prompts in chunks beside sequences that decode."""
    for rank in RANKS:
        add_adapter(engine, f"r{rank}", adapter_blob(folder, rank, part=3))
    outputs = generate(engine, _mixed_specs(), chunk=7, stagger=1)
    engine.check_integrity()
    return outputs


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[SampledToken]]:
    return _outputs(torch_engine(folder), folder)


def _assert_close(
    got: dict[str, list[SampledToken]],
    expected: dict[str, list[SampledToken]],
    *,
    tolerance: float = 2e-4,
) -> None:
    actual = distributions(got)
    for name, reference in distributions(expected).items():
        torch.testing.assert_close(actual[name], reference, atol=tolerance, rtol=0)


def test_mixed_adapters_in_mixed_steps_equal_plain_torch(
    folder: Path, expected: dict[str, list[SampledToken]]
) -> None:
    got = _outputs(cuda_engine(folder), folder)
    assert {n: token_ids(o) for n, o in got.items()} == {
        n: token_ids(o) for n, o in expected.items()
    }
    _assert_close(got, expected)


def test_masked_dense_equals_plain_torch(
    folder: Path, expected: dict[str, list[SampledToken]]
) -> None:
    _assert_close(_outputs(cuda_engine(folder, regime=Regime.MASKED_DENSE), folder), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.3), ("float16", 0.05)])
def test_half_precision_is_near_plain_torch_in_fp32(
    folder: Path, dtype: DType, tolerance: float
) -> None:
    outputs = []
    for engine in (cuda_engine(folder, dtype=dtype), torch_engine(folder)):
        add_adapter(engine, "r12", adapter_blob(folder, 12))
        specs = [_spec("a", 3, "r12", max_tokens=1), _spec("b", 1, None, max_tokens=1)]
        outputs.append(generate(engine, specs))
    _assert_close(*outputs, tolerance=tolerance)


def test_many_rank_rows_in_a_graph_equal_plain_torch(folder: Path) -> None:
    """Too many for expanding within other kernels; one prompt is long enough for large tiles."""
    specs = [_spec("a", 2, "r136"), _spec("b", 20, "r136"), _spec("c", 2, "r128")]
    outputs = []
    for engine in (cuda_engine(folder), torch_engine(folder)):
        for rank in (136, 128):
            add_adapter(engine, f"r{rank}", adapter_blob(folder, rank))
        outputs.append(generate(engine, specs))
    _assert_close(*outputs)


@pytest.mark.parametrize("kind", ["has_head_norms", "has_biases"])
def test_other_families_equal_plain_torch(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path, **{kind: True})
    outputs = []
    for engine in (cuda_engine(tmp_path), torch_engine(tmp_path)):
        add_adapter(engine, "r12", adapter_blob(tmp_path, 12))
        outputs.append(generate(engine, [_spec("a", 9, "r12"), _spec("b", 5, None)]))
    _assert_close(*outputs)


def test_embedding_and_head_are_adapted(folder: Path) -> None:
    outputs = []
    for engine in (cuda_engine(folder), torch_engine(folder)):
        add_adapter(engine, "outer", adapter_blob(folder, 5, is_outer=True))
        outputs.append(generate(engine, [_spec("a", 4, "outer"), _spec("b", 3, None)]))
    _assert_close(*outputs)


def _in_parts(engine: OwnedEngine, folder: Path) -> dict[str, list[SampledToken]]:
    """A prompt that passes the layers of its adapter as they arrive, beside one that decodes."""
    blob = adapter_blob(folder, 12, is_outer=True)
    header = read_header(blob)
    payload = memoryview(bytearray(b"\xff" * header.payload_bytes))  # NaN until it arrives
    engine.begin_adapter("comes", header, payload)
    engine.open_sequence(_spec("mate", 3, None))
    engine.open_sequence(_spec("late", 6, "comes"))
    outputs: dict[str, list[SampledToken]] = {"mate": [], "late": []}

    def step(*items: StepItem) -> None:
        for result in engine.step(items):
            assert isinstance(result, SampledToken)
            outputs[result.sequence_id].append(result)
        engine.check_integrity()

    for layers in (1, 2):
        for chunk in header.layers:
            if chunk.layer < layers or layers == 2:
                end = chunk.offset + chunk.size_bytes
                payload[chunk.offset : end] = memoryview(blob)[header.payload_offset :][
                    chunk.offset : end
                ]
        engine.extend_adapter("comes", layers)
        until = layers if layers < 2 else None
        mate = StepItem("mate", 1 if outputs["mate"] else 3)
        step(mate, StepItem("late", 6, until_layer=until))
    step(StepItem("mate", 1), StepItem("late", 1))
    return outputs


def test_a_prompt_goes_on_as_its_adapter_arrives(folder: Path) -> None:
    _assert_close(_in_parts(cuda_engine(folder), folder), _in_parts(torch_engine(folder), folder))


def test_a_prefix_of_blocks_is_used(folder: Path) -> None:
    engine = cuda_engine(folder)
    whole = _spec("whole", 20, None)
    engine.open_sequence(whole)
    first = engine.step([StepItem("whole", 20)])
    shared = engine.blocks_of("whole")[:1]
    prefixed = SequenceSpec(
        "next", whole.token_ids, 20, None, ASKING, 2, blocks=shared, computed_tokens=16
    )
    engine.open_sequence(prefixed)
    second = engine.step([StepItem("next", 4)])
    assert isinstance(first[0], SampledToken)
    assert isinstance(second[0], SampledToken)
    _assert_close({"": [second[0]]}, {"": [first[0]]})


def test_an_adapter_in_blocks_that_another_left_is_its_own(folder: Path) -> None:
    engine = cuda_engine(folder)
    expected = torch_engine(folder)
    for rank in (40, 8):
        name = f"r{rank}"
        for one in (engine, expected):
            add_adapter(one, name, adapter_blob(folder, rank, dtype="BF16"))
        request = [_spec(name, 3, name)]
        _assert_close(generate(engine, request), generate(expected, request))
        engine.remove_adapter(name)


def test_weights_that_overflow_the_dtype_are_refused(folder: Path) -> None:
    engine = cuda_engine(folder, dtype="float16")
    blob = adapter_blob(folder, 1)
    blob[-4:] = torch.tensor(1e6).numpy().tobytes()
    with pytest.raises(AdapterIncompatibleError, match="not all weights are finite"):
        add_adapter(engine, "large", blob)
