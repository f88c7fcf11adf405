"""Weights files are written here from names and shapes alone, and looked into without torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from services.common.base_model import ModelConfig, ModelIncompleteError, UnsupportedModelError
from services.common.model_config import parse_config
from services.common.model_tensors import (
    EMBEDDING,
    HEAD,
    StoredTensor,
    checked_tensors,
    expected_tensors,
)
from tests.unit.model.tensor_files import Tensors, tensors_of, write_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-05,
    "vocab_size": 10,
}
Q0 = "model.layers.0.self_attn.q_proj.weight"
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def config_of(**changes: Any) -> ModelConfig:
    return parse_config(CONFIG | changes, {})


def write_shards(folder: Path, tensors: Tensors) -> dict[str, str]:
    """Two files, and the index that names them. Returns its map."""
    names = list(tensors)
    half = len(names) // 2
    where = {name: A if position < half else B for position, name in enumerate(names)}
    for file in (A, B):
        write_file(folder / file, {n: t for n, t in tensors.items() if where[n] == file})
    write_index(folder, where)
    return where


def write_index(folder: Path, where: Mapping[str, object]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def check(folder: Path, tensors: Tensors, config: ModelConfig) -> dict[str, StoredTensor]:
    write_file(folder / "model.safetensors", tensors)
    return checked_tensors(folder, config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 2},
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 4},
        {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"},
    ],
)
def test_the_tensors_of_a_configuration_are_found(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    found = check(tmp_path, tensors_of(config), config)

    assert {name: tensor.shape for name, tensor in found.items()} == dict(expected_tensors(config))
    assert (HEAD in found) is not config.tie_embeddings


def test_qwen2_has_three_biases_in_a_layer_and_llama_seven_at_most() -> None:
    def biases(**changes: Any) -> list[str]:
        names = [name for name, _ in expected_tensors(config_of(**changes))]
        first = [name for name in names if name.startswith("model.layers.0.")]
        return [name.split(".")[-2] for name in first if name.endswith(".bias")]

    qwen = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    assert biases() == []
    assert biases(**qwen) == ["q_proj", "k_proj", "v_proj"]
    assert biases(attention_bias=True) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert biases(mlp_bias=True) == ["gate_proj", "up_proj", "down_proj"]


def test_shards_are_found_by_tensor(tmp_path: Path) -> None:
    config = config_of()
    where = write_shards(tmp_path, tensors_of(config))

    found = checked_tensors(tmp_path, config)

    assert {name: tensor.path.name for name, tensor in found.items()} == where


def test_all_missing_tensors_are_counted_and_the_first_named(tmp_path: Path) -> None:
    config = config_of()
    tensors = {n: t for n, t in tensors_of(config).items() if "layers.1." not in n}

    with pytest.raises(ModelIncompleteError, match=r"model\.layers\.1\.self_attn.* and 6 more"):
        check(tmp_path, tensors, config)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.norm.bias",
        "visual.patch_embed.weight",
    ],
)
def test_a_tensor_that_such_a_model_does_not_have_is_refused(tmp_path: Path, name: str) -> None:
    config = config_of()

    with pytest.raises(UnsupportedModelError, match=name.replace(".", r"\.")):
        check(tmp_path, tensors_of(config) | {name: ("BF16", (8,))}, config)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
)
def test_stored_frequencies_are_passed_over(tmp_path: Path, name: str) -> None:
    config = config_of()

    assert name not in check(tmp_path, tensors_of(config) | {name: ("F32", (2,))}, config)


def test_a_tied_head_that_is_stored_is_there_to_be_compared(tmp_path: Path) -> None:
    config = config_of(tie_word_embeddings=True)
    tensors = tensors_of(config)

    assert HEAD in check(tmp_path, tensors | {HEAD: ("BF16", (10, 8))}, config)
    with pytest.raises(ModelIncompleteError, match=r"lm_head.* is \(9, 8\), expected \(10, 8\)"):
        check(tmp_path, tensors | {HEAD: ("BF16", (9, 8))}, config)


@pytest.mark.parametrize("name", [EMBEDDING, Q0, "model.norm.weight", HEAD])
def test_another_shape_is_named_with_tensor_and_file(tmp_path: Path, name: str) -> None:
    config = config_of()
    tensors = tensors_of(config)
    shape = (*tensors[name][1][:-1], 7)

    with pytest.raises(ModelIncompleteError, match=rf"{name} in model\.safetensors is .*7"):
        check(tmp_path, tensors | {name: ("BF16", shape)}, config)


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3", "F64"])
def test_a_type_that_is_not_read_is_named(tmp_path: Path, dtype: str) -> None:
    config = config_of()

    with pytest.raises(UnsupportedModelError, match=rf"{Q0} .*of type {dtype}"):
        check(tmp_path, tensors_of(config) | {Q0: (dtype, (8, 8))}, config)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_types_may_be_mixed(tmp_path: Path, dtype: str) -> None:
    config = config_of()

    assert check(tmp_path, tensors_of(config) | {Q0: (dtype, (8, 8))}, config)[Q0].dtype == dtype


@pytest.mark.parametrize("missing_bytes", [1, 500, 3000, 100_000])
def test_a_file_cut_short_is_named(tmp_path: Path, missing_bytes: int) -> None:
    config = config_of()
    path = tmp_path / "model.safetensors"
    write_file(path, tensors_of(config))
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - missing_bytes)])

    with pytest.raises(ModelIncompleteError, match=r"model\.safetensors is (cut|not)"):
        checked_tensors(tmp_path, config)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"a": 1}',
        b'{"a": {"dtype": "BF16", "shape": [2]}}',
        b'{"a": {"dtype": "BF16", "shape": ["x"], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "BF16", "shape": [1e400], "data_offsets": [0, 4]}}',
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: bytes) -> None:
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(data)

    with pytest.raises(ModelIncompleteError, match=r"model\.safetensors is not"):
        checked_tensors(tmp_path, config_of())


def test_a_header_without_end_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)

    with pytest.raises(ModelIncompleteError, match="a header of"):
        checked_tensors(tmp_path, config_of())


def test_a_tensor_in_two_shards_is_named_with_both(tmp_path: Path) -> None:
    config = config_of()
    tensors = tensors_of(config)
    write_shards(tmp_path, tensors)
    write_file(tmp_path / B, tensors)

    with pytest.raises(ModelIncompleteError, match=rf"{EMBEDDING} twice, in {A} and {B}"):
        checked_tensors(tmp_path, config)


def test_an_index_that_names_another_file_is_refused(tmp_path: Path) -> None:
    config = config_of()
    where = write_shards(tmp_path, tensors_of(config))
    write_index(tmp_path, where | {EMBEDDING: B})

    with pytest.raises(ModelIncompleteError, match=rf"{EMBEDDING} in {B}, but it is in {A}"):
        checked_tensors(tmp_path, config)


def test_an_index_that_names_a_tensor_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    config = config_of()
    where = write_shards(tmp_path, tensors_of(config))
    write_index(tmp_path, where | {"model.more.weight": A})

    with pytest.raises(ModelIncompleteError, match=rf"model\.more\.weight in {A}, which lacks it"):
        checked_tensors(tmp_path, config)


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    config = config_of()
    write_shards(tmp_path, tensors_of(config))
    (tmp_path / B).unlink()

    with pytest.raises(ModelIncompleteError, match=f"{B} is missing"):
        checked_tensors(tmp_path, config)


@pytest.mark.parametrize("where", [{"a": 3}, {"a": ["x"]}, {"a": None}, {"a": ""}])
def test_an_index_that_names_no_file_is_refused(tmp_path: Path, where: dict[str, object]) -> None:
    write_index(tmp_path, where)

    with pytest.raises(ModelIncompleteError, match=r"index\.json|missing"):
        checked_tensors(tmp_path, config_of())
