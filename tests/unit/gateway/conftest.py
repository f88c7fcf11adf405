"""Tokenizers of every kind that a Llama-family model may have."""

import os
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from services.common.base_model import DEFAULT_MODEL, pulled_folder
from services.gateway.tokenizer import ModelTokenizer

REPOSITORY = Path(__file__).resolve().parents[3]


def stories_folder() -> Path:
    shared = Path(os.environ.get("CALUMMA_SHARED", REPOSITORY.parent / "shared"))
    folder = shared / "data" / "models" / "stories260K" / "fp32"
    if not folder.is_dir():
        pytest.skip("the model stories260K is not there: set CALUMMA_SHARED")
    return folder


def default_model_folder() -> Path:
    folder = pulled_folder(DEFAULT_MODEL)
    if not folder.is_dir():
        pytest.skip(f"the base model is not there: calumma model pull {DEFAULT_MODEL}")
    return folder


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*alphabet, "Ġt", "he", "Ã©"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("h", "e"), ("Ã", "©")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


def metaspace() -> Tokenizer:
    words = ["<unk>", *(f"<0x{value:02X}>" for value in range(256))]
    words += ["▁", "▁a", "▁the", "a", "b", "é", "▁▁"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


@pytest.fixture(scope="session", params=["byte-level", "metaspace", "stories260K", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> ModelTokenizer:
    match request.param:
        case "byte-level":
            return ModelTokenizer(byte_level(), None)
        case "metaspace":
            return ModelTokenizer(metaspace(), None)
        case "stories260K":
            return ModelTokenizer.load(stories_folder())
        case _:
            return ModelTokenizer.load(default_model_folder())


@pytest.fixture(scope="session")
def byte_fallback() -> ModelTokenizer:
    """A tokenizer with tokens for single bytes, which decoders read in runs."""
    return ModelTokenizer(metaspace(), None)


@pytest.fixture(scope="session")
def letters() -> ModelTokenizer:
    """A byte-level tokenizer that needs no files."""
    return ModelTokenizer(byte_level(), None)
