"""A real trained model: what it tells greedily is what the reference implementation tells."""

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer

from tests.engine.engine_support import SHARED, generated, model_engine, reference_greedy, spec

_FOLDER = SHARED / "data" / "models" / "stories260K"
_BOS = 1

pytestmark = pytest.mark.skipif(
    not _FOLDER.is_dir(), reason=f"stories260K is not in {_FOLDER}; set CALUMMA_SHARED"
)


def test_the_story_from_bos_equals_transformers_token_for_token() -> None:
    reference = AutoModelForCausalLM.from_pretrained(_FOLDER / "fp32", dtype=torch.float32)
    expected = reference_greedy(reference, [_BOS], 400)
    engine = model_engine(_FOLDER / "fp32")
    assert generated(engine, [spec("a", [_BOS], max_tokens=400)])["a"] == expected


def test_the_first_story_is_the_published_one() -> None:
    engine = model_engine(_FOLDER / "fp32")
    tokens = generated(engine, [spec("a", [_BOS], max_tokens=256)])["a"]
    story = AutoTokenizer.from_pretrained(_FOLDER / "fp32").decode(tokens)
    assert story.startswith("Once upon a time, there was a little girl named Lily.")
    assert len(story) == 565


def test_bfloat16_tells_the_same_story_for_a_while() -> None:
    tokens = {
        dtype: generated(
            model_engine(_FOLDER / "fp32", dtype=dtype), [spec("a", [_BOS], max_tokens=100)]
        )["a"]
        for dtype in ("float32", "bfloat16")
    }
    assert tokens["bfloat16"][:50] == tokens["float32"][:50]
