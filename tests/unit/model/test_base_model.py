"""Model folders are made here from their configuration alone; nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.common import base_model
from services.common.base_model import (
    LinearRope,
    Llama3Rope,
    ModelConfig,
    ModelIncompleteError,
    ModelNotFoundError,
    UnsupportedModelError,
)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 172,
    "max_position_embeddings": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "vocab_size": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALUMMA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write_folder(folder: Path, changes: dict[str, Any], *, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fields = {key: value for key, value in (LLAMA | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def config_with(folder: Path, **changes: Any) -> ModelConfig:
    return base_model.check_folder(write_folder(folder, changes))


def test_a_plain_llama_is_read_field_by_field(tmp_path: Path) -> None:
    config = config_with(tmp_path)

    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (5, 64, 172)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 8)
    assert (config.vocab_size, config.max_positions) == (512, 512)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert not any((config.attention_bias, config.output_bias, config.mlp_bias))
    assert not any((config.tie_embeddings, config.qk_norm))
    assert config.sliding_window is None
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)


def test_heads_without_grouping_are_their_own_kv_heads(tmp_path: Path) -> None:
    assert config_with(tmp_path, num_key_value_heads=...).num_kv_heads == 8


def test_a_head_dim_of_its_own_shapes_the_linears(tmp_path: Path) -> None:
    shapes = base_model.linear_shapes(config_with(tmp_path, head_dim=16))

    assert shapes == {
        "q_proj": (64, 128),
        "k_proj": (64, 64),
        "v_proj": (64, 64),
        "o_proj": (128, 64),
        "gate_proj": (64, 172),
        "up_proj": (64, 172),
        "down_proj": (172, 64),
    }
    assert tuple(shapes) == base_model.LINEARS


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
        {"rope_theta": ..., "rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}},
    ],
    ids=["rope_scaling", "rope_parameters"],
)
def test_both_spellings_of_llama_3_rope_mean_the_same(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_with(tmp_path, **changes)

    assert config.rope_theta == 500000.0
    assert config.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 8192)


def test_the_older_spelling_of_a_rope_type_is_read(tmp_path: Path) -> None:
    config = config_with(tmp_path, rope_scaling={"type": "linear", "factor": 4.0})

    assert config.rope_scaling == LinearRope(4.0)


def test_qwen2_has_biases_that_its_config_does_not_mention(tmp_path: Path) -> None:
    config = config_with(
        tmp_path,
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        sliding_window=4096,
        use_sliding_window=False,
    )

    assert config.attention_bias
    assert not config.output_bias
    assert config.sliding_window is None


def test_qwen3_normalises_queries_and_keys(tmp_path: Path) -> None:
    config = config_with(tmp_path, architectures=["Qwen3ForCausalLM"], model_type="qwen3")

    assert config.qk_norm
    assert not config.attention_bias


def test_llama_attention_bias_includes_the_output(tmp_path: Path) -> None:
    config = config_with(tmp_path, attention_bias=True, mlp_bias=True)

    assert config.attention_bias
    assert config.output_bias
    assert config.mlp_bias


def test_mistral_keeps_its_window(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}

    assert config_with(tmp_path, **mistral, sliding_window=4096).sliding_window == 4096
    assert config_with(tmp_path, **mistral, sliding_window=None).sliding_window is None


def test_generation_config_decides_the_end_tokens(tmp_path: Path) -> None:
    write_folder(tmp_path, {})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')

    config = base_model.load_config(tmp_path)

    assert config.eos_token_ids == (7, 9)
    assert config.bos_token_id == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_what_the_engine_does_not_compute_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        config_with(tmp_path, **changes)


@pytest.mark.parametrize("field", ["hidden_size", "rms_norm_eps", "vocab_size"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(ModelIncompleteError, match=field):
        config_with(tmp_path, **{field: ...})


def test_a_size_of_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelIncompleteError, match="num_hidden_layers"):
        config_with(tmp_path, num_hidden_layers=0)


@pytest.mark.parametrize("text", ["{", "[]", '"LlamaForCausalLM"', "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    write_folder(tmp_path, {})
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(ModelIncompleteError, match=r"config\.json"):
        base_model.load_config(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, {})
    (tmp_path / name).unlink()

    with pytest.raises(ModelIncompleteError, match=name):
        base_model.check_folder(tmp_path)


def test_every_shard_of_the_index_must_be_there(tmp_path: Path) -> None:
    write_folder(tmp_path, {})
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    with pytest.raises(ModelIncompleteError, match="model-00002-of-00002"):
        base_model.weight_files(tmp_path)

    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"more")
    assert [file.name for file in base_model.weight_files(tmp_path)] == list(shards.values())


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"secret")
    folder = write_folder(tmp_path / "model", {})
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(ModelIncompleteError, match="outside"):
        base_model.weight_files(folder)


def test_a_model_that_was_not_pulled_says_how_to_get_it() -> None:
    with pytest.raises(ModelNotFoundError, match="calumma model pull some/model"):
        base_model.locate("some/model")


@pytest.mark.parametrize("name", ["", "gpt2", "/no/such/folder", "../up/there", "a/../b"])
def test_what_is_neither_folder_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        base_model.locate(name or "no model")


def test_a_model_is_located_by_path_or_in_the_cache(tmp_path: Path, home: Path) -> None:
    folder = write_folder(tmp_path / "mine", {})
    pulled = write_folder(home / "models" / "some--model", {})

    assert base_model.locate(str(folder)) == folder
    assert base_model.locate("some/model") == pulled


def test_identity_is_what_the_pull_wrote(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {})
    (folder / "calumma.json").write_text('{"name": "some/model", "digest": "sha256:00"}')

    assert base_model.model_identity(folder) == base_model.ModelIdentity("some/model", "sha256:00")


def test_identity_of_another_folder_follows_its_bytes(tmp_path: Path) -> None:
    first = base_model.model_identity(write_folder(tmp_path / "first", {}))
    same = base_model.model_identity(write_folder(tmp_path / "same", {}))
    other = base_model.model_identity(write_folder(tmp_path / "other", {}, weights=b"others"))

    assert first.name == "first"
    assert first.digest == same.digest
    assert first.digest != other.digest


def test_identity_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "mine", {})
    first = base_model.model_identity(folder)

    def fail(_: Path) -> str:
        raise AssertionError("computed again")

    monkeypatch.setattr(base_model, "folder_digest", fail)
    assert base_model.model_identity(folder) == first


def test_changed_weights_change_the_identity(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine", {})
    before = base_model.model_identity(folder)
    write_folder(folder, {}, weights=b"weights, longer")

    assert base_model.model_identity(folder) != before
