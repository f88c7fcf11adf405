"""What the native step computes for a row has the same bits in whatever company it is computed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.common.base_model import load_config
from services.worker.engine import Sampling, add_adapter
from services.worker.engine.executor import Pass
from services.worker.engine.native_executor import NativeExecutor
from tests.engine.engine_support import OwnedEngine, generate, spec
from tests.engine.native_support import (
    MEDIUM_VOCAB,
    Context,
    Floats,
    block_tables,
    compute,
    executor_of,
    linear_blob,
    logits_of,
    medium_model,
    native_engine,
    needs_native,
    pass_of,
    untouched,
)

pytestmark = needs_native

_LAYERS = 2
_RANKS = (1, 4, 8, 12, 16, 40, 64, 128)
_CONTEXTS = 32
_TOKENS = 90  # five blocks and a part of one
_BLOCKS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("medium")
    medium_model(folder)
    return folder


def _engine(folder: Path, *, threads: int = 2) -> OwnedEngine:
    """With an adapter of each rank."""
    engine = native_engine(folder, threads=threads)
    for rank in _RANKS:
        add_adapter(engine, f"r{rank}", linear_blob(load_config(folder), rank))
    return engine


@pytest.fixture(scope="module")
def executor(folder: Path) -> NativeExecutor:
    return executor_of(_engine(folder))


def _contexts(count: int = _CONTEXTS) -> list[Context]:
    """Of different tokens and lengths. Every third one is the base model's, some share adapters."""
    random = np.random.default_rng(2)
    return [
        Context(
            random.integers(0, MEDIUM_VOCAB, _TOKENS - index).tolist(),
            blocks,
            None if index % 3 == 0 else f"r{_RANKS[index % len(_RANKS)]}",
        )
        for index, blocks in enumerate(block_tables(count, _BLOCKS))
    ]


def _computed(
    executor: NativeExecutor, contexts: Sequence[Context], chunks: Sequence[int] = (_TOKENS,)
) -> list[Floats]:
    fresh = [untouched(context) for context in contexts]
    executor.clear_blocks([block for context in fresh for block in context.blocks])
    compute(executor, fresh, layers=_LAYERS, chunks=chunks)
    return [context.all_logits for context in fresh]


def _assert_same_bits(actual: Sequence[Floats], expected: Sequence[Floats]) -> None:
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert np.isfinite(other).all()
        np.testing.assert_array_equal(one.view(np.int32), other.view(np.int32), str(index))


@pytest.fixture(scope="module")
def expected(executor: NativeExecutor) -> list[Floats]:
    """Each context alone, its tokens all at once."""
    return [_computed(executor, [context])[0] for context in _contexts()]


@pytest.mark.parametrize("chunks", [(1,), (7,), (64,), (_TOKENS,), (1, 33, 1, 5)], ids=str)
def test_among_others_in_chunks_of_any_size(
    executor: NativeExecutor, expected: list[Floats], chunks: tuple[int, ...]
) -> None:
    _assert_same_bits(_computed(executor, _contexts(), chunks), expected)


@pytest.mark.parametrize("chunks", [(1,), (7,), (64,)], ids=str)
def test_alone_in_chunks_of_any_size(
    executor: NativeExecutor, expected: list[Floats], chunks: tuple[int, ...]
) -> None:
    for index in (0, 1, 7, 8):
        _assert_same_bits(_computed(executor, [_contexts()[index]], chunks), [expected[index]])


@pytest.mark.parametrize("mates", [1, 2, 5, 13])
def test_in_batches_of_any_size(
    executor: NativeExecutor, expected: list[Floats], mates: int
) -> None:
    for first in (0, 6):
        chosen = slice(first, first + mates + 1)
        _assert_same_bits(_computed(executor, _contexts()[chosen], (1, 9)), expected[chosen])


@pytest.mark.parametrize("threads", [1, 3])
def test_with_any_number_of_threads(folder: Path, expected: list[Floats], threads: int) -> None:
    executor = executor_of(_engine(folder, threads=threads))
    _assert_same_bits(_computed(executor, _contexts(), (1, 30)), expected)


def test_wherever_its_blocks_lie(executor: NativeExecutor, expected: list[Floats]) -> None:
    tables = block_tables(_CONTEXTS, _BLOCKS, seed=1)
    moved = [
        replace(context, blocks=blocks) for context, blocks in zip(_contexts(), tables, strict=True)
    ]
    _assert_same_bits(_computed(executor, moved), expected)


def test_with_a_beginning_that_another_one_computed(
    executor: NativeExecutor, expected: list[Floats]
) -> None:
    first, second, *_ = _contexts()
    shared = 48
    second = replace(
        second,
        token_ids=first.token_ids,
        digest=first.digest,
        blocks=[*first.blocks[: shared // 16], *second.blocks[shared // 16 :]],
        computed=shared,
    )
    _computed(executor, [first])
    compute(executor, [second], layers=_LAYERS, chunks=(5,))
    _assert_same_bits([second.all_logits], [expected[0][shared:]])


@pytest.mark.parametrize("has_mates", [False, True])
def test_layer_by_layer(
    executor: NativeExecutor, expected: list[Floats], *, has_mates: bool
) -> None:
    contexts = _contexts()[:8]
    executor.clear_blocks([block for context in contexts for block in context.blocks])
    parts = [_whole(contexts, [index]) for index in (1, 2)]
    mates = [_whole(contexts, range(3, 6))] if has_mates else []
    assert executor.run([*parts], [1, 1]) is None
    scores = executor.run([*mates, *parts], [_LAYERS] * (len(mates) + len(parts)))
    chosen = [*([3, 4, 5] if has_mates else []), 1, 2]
    rows = [len(contexts[index].token_ids) for index in chosen]
    logits = np.split(logits_of(scores, sum(rows)), np.cumsum(rows)[:-1])
    _assert_same_bits(logits, [expected[index] for index in chosen])


def _whole(contexts: Sequence[Context], chosen: Sequence[int]) -> Pass:
    numbered = dict(enumerate(contexts))
    return pass_of(numbered, {index: contexts[index].next_segment(_TOKENS) for index in chosen})


def test_whether_logits_are_written_at_once_or_when_they_are_asked_for(
    executor: NativeExecutor, expected: list[Floats]
) -> None:
    contexts = _contexts()[:4]
    for at_once in (False, True):
        executor.expect(logits=at_once)
        _assert_same_bits(_computed(executor, contexts), expected[:4])


def test_the_best_token_is_the_first_with_the_highest_logit(
    executor: NativeExecutor, expected: list[Floats]
) -> None:
    contexts = _contexts()[:4]
    executor.clear_blocks([block for context in contexts for block in context.blocks])
    scores = executor.run([_whole(contexts, range(4))], [_LAYERS])
    assert scores is not None
    logits = np.concatenate(expected[:4])
    assert scores._best.ids.tolist() == logits.argmax(axis=1).tolist()
    np.testing.assert_array_equal(scores._best.scores, logits.max(axis=1))


def test_a_resubmitted_sequence_goes_on_with_the_same_distributions(folder: Path) -> None:
    engine = _engine(folder)
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=3, logprobs=5)
    prompt = list(range(20, 60))
    first = spec("a", prompt, adapter="r16", sampling=sampling, max_tokens=20)
    whole = generate(engine, [first, spec("mate", [5, 6, 7], adapter="r8", max_tokens=20)])["a"]
    emitted = [token.token_id for token in whole[:9]]
    resumed = spec("a", prompt, emitted=emitted, adapter="r16", sampling=sampling, max_tokens=20)
    mates = [spec(f"m{index}", [index] * 30, max_tokens=20) for index in range(5)]
    assert generate(engine, [*mates, resumed], chunk=11)["a"] == whole[9:]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_spoils_its_own_rows_only(
    folder: Path, expected: list[Floats], value: float
) -> None:
    engine = _engine(folder)
    add_adapter(engine, "bad", linear_blob(load_config(folder), 8, value=value))
    executor = executor_of(engine)
    contexts = _contexts()
    contexts[5] = replace(contexts[5], digest="bad")
    logits = _computed(executor, contexts, (1, 20))
    assert not np.isfinite(logits.pop(5)).any()
    _assert_same_bits(logits, [*expected[:5], *expected[6:]])


def test_blocks_of_a_context_that_was_not_finite_can_be_used_again(
    folder: Path, expected: list[Floats]
) -> None:
    engine = _engine(folder)
    add_adapter(engine, "bad", linear_blob(load_config(folder), 8, value=float("nan")))
    executor = executor_of(engine)
    contexts = _contexts()
    _computed(executor, [replace(context, digest="bad") for context in contexts])
    _assert_same_bits(_computed(executor, contexts, (1, 20)), expected)


def test_what_lies_in_blocks_of_others_is_never_read(folder: Path, expected: list[Floats]) -> None:
    executor = executor_of(_engine(folder))
    executor.clear_blocks(range(2000))
    memory = np.frombuffer(executor._memory._memory, dtype=np.uint16)
    memory[: 2000 * executor._info.block_bytes // 2] = 0x7FC0  # NaN
    contexts = [replace(context, blocks=[7 * b for b in context.blocks]) for context in _contexts()]
    _assert_same_bits(_computed(executor, contexts, (1, 20)), expected)
