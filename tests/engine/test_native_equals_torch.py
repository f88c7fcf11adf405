"""The native step computes what the model's formulas say: at least as exactly as torch in bf16.

The truth is transformers in fp32 with the weights that bf16 leaves of the saved ones, so what is
measured is the arithmetic alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer

from services.common.base_model import DEFAULT_MODEL, pulled_folder
from tests.engine.engine_support import OwnedEngine, generated, model_engine, spec, tiny_model
from tests.engine.native_support import (
    Context,
    Floats,
    compute,
    executor_of,
    native_engine,
    needs_native,
    torch_tier,
)
from tests.engine.tiny_families import FAMILIES, VOCAB, tiny_family

pytestmark = needs_native

_DEFAULT = pulled_folder(DEFAULT_MODEL)
_TEXT = (
    "A lighthouse keeper writes every evening what the sea has brought: a crate of oranges, half a"
    " ladder, once a letter. def area(radius): return 3.14159 * radius ** 2. In 1969 two people"
    " walked on the Moon while a third one waited above them, and the whole world was listening."
)


def _prompt(tokens: int) -> list[int]:
    token_ids: list[int] = np.random.default_rng(1).integers(3, VOCAB, tokens).tolist()
    return token_ids


def _logits(engine: OwnedEngine, token_ids: list[int], chunks: tuple[int, ...]) -> Floats:
    context = Context(token_ids, range(-(-len(token_ids) // engine.info.block_tokens)))
    executor = engine.engine._executor
    compute(executor, [context], layers=engine.info.num_layers, chunks=chunks)
    return context.all_logits


@torch.inference_mode()
def _reference(model: Any, token_ids: list[int]) -> Floats:
    logits: Floats = model(torch.tensor([token_ids])).logits[0].float().numpy()
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_as_near_to_transformers_as_the_torch_tier(
    name: str, tmp_path: Path
) -> None:
    model = tiny_family(tmp_path, name).bfloat16().float()
    prompt = _prompt(90)
    expected = _reference(model, prompt)
    errors = {
        engine.info.description.partition(" ")[0]: np.abs(
            _logits(engine, prompt, (40, 1, 1, 48)) - expected
        )
        for engine in (native_engine(tmp_path), torch_tier(tmp_path))
    }
    assert errors["native"].mean() < 1.1 * errors["torch"].mean()
    assert errors["native"].mean() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("block_tokens", [1, 5, 16, 40])
def test_blocks_may_have_any_size(block_tokens: int, tmp_path: Path) -> None:
    model = tiny_family(tmp_path, "qwen 3").bfloat16().float()
    prompt = _prompt(90)
    engine = native_engine(tmp_path, block_tokens=block_tokens)
    error = np.abs(_logits(engine, prompt, (33, 1)) - _reference(model, prompt))
    assert error.mean() < 0.03


def test_long_contexts_are_as_exact_as_in_the_torch_tier(tmp_path: Path) -> None:
    expected = _reference(tiny_family(tmp_path, "qwen 3").bfloat16().float(), _prompt(250))
    native, other = (
        np.abs(_logits(engine, _prompt(250), (100, 1)) - expected)[-30:].mean()
        for engine in (native_engine(tmp_path), torch_tier(tmp_path))
    )
    assert native < 1.1 * other


def test_greedy_text_begins_as_in_fp32(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    specs = [spec(f"s{index}", _prompt(10 + index), max_tokens=8) for index in range(8)]
    exact = generated(model_engine(tmp_path), specs)
    native = generated(native_engine(tmp_path), specs)
    assert sum(native[name][0] == exact[name][0] for name in exact) >= 7


@pytest.mark.model
@pytest.mark.skipif(not _DEFAULT.is_dir(), reason="the default model is not pulled")
def test_the_default_model_is_nearer_to_fp32_than_transformers_in_bf16() -> None:
    token_ids = AutoTokenizer.from_pretrained(_DEFAULT)(_TEXT)["input_ids"]
    exact, rounded = (
        _reference(AutoModelForCausalLM.from_pretrained(_DEFAULT, dtype=dtype), token_ids)
        for dtype in (torch.float32, torch.bfloat16)
    )
    logits = _logits(native_engine(_DEFAULT), token_ids, (len(token_ids) // 2, 1))
    error, error_in_bf16 = np.abs(logits - exact), np.abs(rounded - exact)
    assert error.max() < error_in_bf16.max()
    assert error.mean() < error_in_bf16.mean()
    best = exact.argmax(axis=1)
    assert (logits.argmax(axis=1) == best).sum() >= (rounded.argmax(axis=1) == best).sum()


def test_greedy_tokens_are_the_best_of_the_logits_that_others_sample_from(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    engine = native_engine(tmp_path)
    prompt = _prompt(30)
    (greedy,) = generated(engine, [spec("a", prompt, max_tokens=1)])["a"]
    assert greedy == _logits(engine, prompt, (30,))[-1].argmax()
    assert executor_of(engine).description.startswith("native cpu bfloat16 ")
