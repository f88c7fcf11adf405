"""Every supported architecture against transformers, in fp32, on tiny random models."""

from pathlib import Path

import pytest
import torch

from services.common.base_model import ModelIncompleteError
from services.worker.engine import Sampling
from tests.engine.engine_support import (
    TINY_CONFIGS,
    VOCAB,
    distribution,
    generate,
    generated,
    reference_greedy,
    spec,
    tiny_model,
    torch_engine,
)

_LENGTHS = (1, 5, 40, 90)  # beyond the original context of the scaled rope


def _prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_greedy_tokens_and_distributions_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = tiny_model(tmp_path, name)
    engine = torch_engine(tmp_path)
    specs = [spec(f"s{n}", _prompt(n)) for n in _LENGTHS]
    expected = {f"s{n}": reference_greedy(reference, _prompt(n)) for n in _LENGTHS}
    assert generated(engine, specs) == expected
    engine.check_integrity()

    prompt = _prompt(60)
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt])).logits[0, -1]
    everything = spec("logits", prompt, sampling=Sampling(logprobs=VOCAB), max_tokens=1)
    (token,) = generate(engine, [everything])["logits"]
    assert torch.allclose(distribution(token), logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 16, 31])
def test_a_prompt_in_chunks_gives_what_it_gives_whole(chunk: int, tmp_path: Path) -> None:
    tiny_model(tmp_path)
    engine = torch_engine(tmp_path)
    specs = [spec(f"s{n}", _prompt(n)) for n in _LENGTHS]
    whole = generated(engine, specs)
    assert generated(engine, specs, chunk=chunk) == whole
    assert generated(engine, specs, chunk=chunk, stagger=3) == whole


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    reference = tiny_model(tmp_path, shard="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    output = generated(torch_engine(tmp_path), [spec("a", _prompt(9))])
    assert output["a"] == reference_greedy(reference, _prompt(9))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tiny_model(tmp_path, "llama")
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    with pytest.raises(ModelIncompleteError, match=r"model\.layers\.3"):
        torch_engine(tmp_path)
