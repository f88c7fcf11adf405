"""Prompts in pieces and weights in pieces give what they give whole."""

from pathlib import Path

import pytest
import torch

from tests.engine.engine_support import (
    VOCAB,
    generated,
    model_engine,
    reference_greedy,
    spec,
    tiny_model,
)

_LENGTHS = (1, 5, 40, 90)


def _prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


@pytest.mark.parametrize("chunk", [1, 3, 16, 31])
def test_a_prompt_in_chunks_gives_what_it_gives_whole(chunk: int, tmp_path: Path) -> None:
    tiny_model(tmp_path)
    engine = model_engine(tmp_path)
    specs = [spec(f"s{n}", _prompt(n)) for n in _LENGTHS]
    whole = generated(engine, specs)
    assert generated(engine, specs, chunk=chunk) == whole
    assert generated(engine, specs, chunk=chunk, stagger=3) == whole


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    reference = tiny_model(tmp_path, shard="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    output = generated(model_engine(tmp_path), [spec("a", _prompt(9))])
    assert output["a"] == reference_greedy(reference, _prompt(9))
