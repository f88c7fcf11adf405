import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.adapter_store.peft import BaseModel, Converted, convert
from services.common.adapter_container import ModuleEntry, digest_of, read_header
from services.common.base_model import LINEARS
from services.common.errors import Reason, RpcError
from tests.support.peft_folders import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoraPair,
    from_bits,
    read_tensors,
    safetensors_bytes,
    to_bits,
    with_header,
    write_peft_folder,
)

Convert = Callable[[Path], Converted]
Shapes = dict[str, tuple[int, int]]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def _write(folder: Path, shapes: Shapes, **options: Any) -> list[LoraPair]:
    options.setdefault("rank", 4)
    options.setdefault("alpha", 8)
    return write_peft_folder(folder, shapes=shapes, num_layers=2, **options)


def _change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **fields}))


def _change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = read_tensors((folder / WEIGHTS_FILE).read_bytes())
    change(tensors)
    (folder / WEIGHTS_FILE).write_bytes(safetensors_bytes(tensors, "BF16"))


def _delta(converted: Converted, entry: ModuleEntry, payload_offset: int) -> Any:
    """scale · B·A from the blob's own bytes."""
    dtype = converted.weights.dtype
    width = np.uint32 if dtype == "F32" else np.uint16
    start = payload_offset + entry.offset
    middle = start + entry.a_bytes(dtype)
    a = np.frombuffer(converted.blob[start:middle], dtype=width)
    bt = np.frombuffer(converted.blob[middle : middle + entry.b_bytes(dtype)], dtype=width)
    a_values = from_bits(a.reshape(entry.rank, entry.in_features), dtype)
    bt_values = from_bits(bt.reshape(entry.rank, entry.out_features), dtype)
    return np.float32(entry.scale) * (np.ascontiguousarray(bt_values.T) @ a_values)


OPTIONS: dict[str, dict[str, Any]] = {
    "q and v": {},
    "all linears": {"target_modules": LINEARS},
    "rank 1": {"rank": 1},
    "odd rank": {"rank": 7, "alpha": 3},
    "fractional alpha": {"alpha": 2.5},
    "rsLoRA": {"use_rslora": True, "rank": 16},
    "half precision": {"dtype": "F16"},
    "full precision": {"dtype": "F32"},
    "rank pattern": {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 9}},
    "rank pattern by expression": {"rank_pattern": {r"layers\.(0|1)\.self_attn\.q_proj": 6}},
    "embedding and head": {
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
        "rank_pattern": {"embed_tokens": 2},
        "alpha_pattern": {"lm_head": 1},
    },
    "both patterns, rsLoRA": {
        "target_modules": LINEARS,
        "rank_pattern": {"mlp.up_proj": 3},
        "alpha_pattern": {"up_proj": 1, "q_proj": 32},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("what", OPTIONS)
def test_a_converted_adapter_has_the_delta_of_peft_bit_for_bit(
    what: str, tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    all_shapes = shapes | {"embed_tokens": (64, 32), "lm_head": (32, 64)}
    pairs = {pair.path: pair for pair in _write(tmp_path, all_shapes, **OPTIONS[what])}
    converted = convert_folder(tmp_path)
    header = read_header(converted.blob)
    assert len(header.modules) == len(pairs) == len(converted.bindings)
    for entry, bound in zip(header.modules, converted.bindings, strict=True):
        pair = pairs[bound.module.path]
        assert (bound.rank, bound.scale) == (pair.rank, pair.scale) == (entry.rank, entry.scale)
        assert np.array_equal(_delta(converted, entry, header.payload_offset), pair.delta)
    assert converted.weights.digest == digest_of(converted.blob)
    assert converted.weights.size_bytes == len(converted.blob) == header.total_bytes
    assert converted.weights.rank == max(pair.rank for pair in pairs.values())
    assert converted.weights.parameters == sum(p.a.size + p.b.size for p in pairs.values())


def test_modules_lie_in_one_order_whatever_the_file_has(
    tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path / "a", shapes, target_modules=LINEARS)
    _write(tmp_path / "b", shapes, target_modules=LINEARS)
    tensors = read_tensors((tmp_path / "b" / WEIGHTS_FILE).read_bytes())
    backwards = dict(reversed(tensors.items()))
    (tmp_path / "b" / WEIGHTS_FILE).write_bytes(safetensors_bytes(backwards, "BF16"))
    first, second = convert_folder(tmp_path / "a"), convert_folder(tmp_path / "b")
    assert first.weights.digest == second.weights.digest
    order = [(entry.layer, entry.module) for entry in read_header(first.blob).modules]
    assert order == [(layer, module) for layer in (0, 1) for module in LINEARS]


def test_another_scale_is_another_adapter(
    tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path / "a", shapes, alpha=8)
    _write(tmp_path / "b", shapes, alpha=9)
    first, second = convert_folder(tmp_path / "a"), convert_folder(tmp_path / "b")
    assert first.weights.digest != second.weights.digest


def test_layers_to_transform_are_the_layers_that_are_bound(
    tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path, shapes)
    _change_config(tmp_path, layers_to_transform=[1])
    _change_tensors(tmp_path, lambda t: [t.pop(name) for name in list(t) if ".layers.0." in name])
    assert {bound.module.layer for bound in convert_folder(tmp_path).bindings} == {1}


@pytest.mark.parametrize(
    "target",
    [
        r".*\.(q|v)_proj",
        r"model\.layers\.\d+\.self_attn\.[qv]_proj",
        ["self_attn.q_proj", "v_proj"],
        ["q_proj", "v_proj", "query_key_value"],
    ],
)
def test_targets_may_be_an_expression_or_a_list(
    target: Any, tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path, shapes)
    _change_config(tmp_path, target_modules=target)
    assert len(convert_folder(tmp_path).bindings) == 4


def test_all_linear_means_the_linears_of_the_layers(
    tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path, shapes, target_modules=LINEARS)
    _change_config(tmp_path, target_modules="all-linear")
    assert len(convert_folder(tmp_path).bindings) == 14


def test_excluded_modules_are_not_expected(
    tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path, shapes, target_modules=["q_proj"])
    _change_config(tmp_path, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])
    assert len(convert_folder(tmp_path).bindings) == 2


NEUTRAL: dict[str, Any] = {
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "layer_replication": None,
    "qalora_group_size": 16,
    "runtime_config": {"ephemeral_gpu_offload": False},
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "init_lora_weights": "gaussian",
    "something_new": None,
    "lora_bias": False,
    "revision": "main",
    "peft_version": "0.21.2",
}


def test_fields_without_effect_are_accepted(
    tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path, shapes, config=NEUTRAL)
    convert_folder(tmp_path)


UNSUPPORTED: dict[str, Any] = {
    "peft_type": "LOHA",
    "task_type": "SEQ_CLS",
    "bias": "all",
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "lora_bias": True,
    "trainable_token_indices": [1, 2],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "alora_invocation_tokens": [5, 6],
    "layer_replication": [[0, 1]],
    "use_qalora": True,
    "megatron_config": {"tensor_model_parallel_size": 2},
    "init_lora_weights": "pissa_niter_4",
    "loftq_config": {"loftq_bits": 4},
    "something_new": "on",
    "ensure_weight_tying": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "exclude_modules": "(a|b)+",
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_a_feature_that_is_not_served_is_refused_by_name(
    field: str, tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path, shapes, config={field: UNSUPPORTED[field]})
    with pytest.raises(RpcError) as caught:
        convert_folder(tmp_path)
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED
    assert caught.value.context.field == field
    assert field in caught.value.message


INVALID_CONFIG: dict[str, tuple[str, Any]] = {
    "rank 0": ("r", 0),
    "negative rank": ("r", -8),
    "no rank": ("r", None),
    "fractional rank": ("r", 4.0),
    "boolean rank": ("r", True),
    "alpha 0": ("lora_alpha", 0),
    "negative alpha": ("lora_alpha", -16),
    "alpha as text": ("lora_alpha", "16"),
    "huge alpha": ("lora_alpha", 10**400),
    "rank pattern with rank 0": ("rank_pattern", {"q_proj": 0}),
    "rank pattern as a list": ("rank_pattern", ["q_proj"]),
    "broken expression": ("rank_pattern", {"q_proj(": 4}),
    "no targets": ("target_modules", []),
    "absent targets": ("target_modules", None),
    "targets that are numbers": ("target_modules", [1]),
    "layers that are text": ("layers_to_transform", "0"),
    "use_rslora as text": ("use_rslora", "yes"),
    "base model as a list": ("base_model_name_or_path", ["a"]),
    "base model with a lone surrogate": ("base_model_name_or_path", "\ud800"),
    "base model with NUL": ("base_model_name_or_path", "acme/\0"),
    "base model of 10 KB": ("base_model_name_or_path", "x" * 10_240),
    "PEFT version of 65 characters": ("peft_version", "1" * 65),
    "PEFT version as a number": ("peft_version", 0.19),
    "PEFT version that can't be printed": ("peft_version", "1\n"),
    "fan_in_fan_out as text": ("fan_in_fan_out", "yes"),
    "pattern of layers without layers": ("layers_pattern", "layers"),
    "rank pattern that is true": ("rank_pattern", {"q_proj": True}),
    "alpha pattern of 0": ("alpha_pattern", {"q_proj": 0}),
}


@pytest.mark.parametrize("what", INVALID_CONFIG)
def test_a_config_that_contradicts_itself_is_refused(
    what: str, tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    field, value = INVALID_CONFIG[what]
    _write(tmp_path, shapes, config={field: value})
    with pytest.raises(RpcError) as caught:
        convert_folder(tmp_path)
    assert caught.value.reason is Reason.ADAPTER_INVALID
    assert caught.value.context.field == field
    caught.value.to_status()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{",
        b'{"r": 4, "r": 8}',
        b'{"peft_type": "LORA", "lora_alpha": NaN}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_config_that_is_no_json_object_is_refused(raw: bytes, base: BaseModel) -> None:
    with pytest.raises(RpcError) as caught:
        convert(raw, memoryview(b""), base, rank_max=64)
    assert caught.value.reason is Reason.ADAPTER_INVALID
    assert caught.value.context.field == CONFIG_FILE


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_an_alpha_that_is_no_number_is_refused(alpha: str, base: BaseModel) -> None:
    raw = f'{{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "lora_alpha": {alpha}}}'
    with pytest.raises(RpcError) as caught:
        convert(raw.encode(), memoryview(b""), base, rank_max=64)
    assert caught.value.reason is Reason.ADAPTER_INVALID


@pytest.mark.parametrize("name", ["something_new", "bias", "r", "target_modules", "peft_version"])
def test_a_value_that_is_nested_deeply_is_refused(name: str, base: BaseModel) -> None:
    for depth in (10, 100, 300, 600, 900, 950, 980, 100_000):
        for opening, inner, closing in (("[", "", "]"), ('{"a":', "1", "}")):
            value = opening * depth + inner + closing * depth
            raw = f'{{"peft_type": "LORA", "{name}": {value}}}'
            with pytest.raises(RpcError) as caught:
                convert(raw.encode(), memoryview(b""), base, rank_max=64)
            caught.value.to_status()


@pytest.mark.parametrize("rank", [65, 16384])
def test_a_rank_over_the_limit_is_refused(
    rank: int, tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path, shapes)
    _change_config(tmp_path, r=rank)
    with pytest.raises(RpcError) as caught:
        convert_folder(tmp_path)
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED
    assert caught.value.context.field == "r"


def _zero(tensors: dict[str, Any]) -> None:
    for name, bits in tensors.items():
        if "lora_B" in name:
            tensors[name] = np.zeros_like(bits)


def _halves(tensors: dict[str, Any]) -> None:
    """Ranks that have an A have no B, so each product is zero though no tensor is."""
    for name, bits in tensors.items():
        changed = bits.copy()
        changed[(slice(None), slice(2)) if "lora_B" in name else slice(2, None)] = 0
        tensors[name] = changed


def _poison(value: float) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        bits = tensors[f"{Q0}.lora_A.weight"].copy()
        bits[1, 2] = to_bits(np.array([value]), "BF16")[0]
        tensors[f"{Q0}.lora_A.weight"] = bits

    return change


def _put(name: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = to_bits(np.ones(shape), "BF16")

    return change


def _drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.pop(name)


L9 = "base_model.model.model.layers.9.self_attn.q_proj"
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Any]], object], Reason, str]] = {
    "NaN": (_poison(math.nan), Reason.ADAPTER_INVALID, "infinite or NaN"),
    "infinity": (_poison(math.inf), Reason.ADAPTER_INVALID, "infinite or NaN"),
    "all B zero": (_zero, Reason.ADAPTER_INVALID, "no effect"),
    "all products zero": (_halves, Reason.ADAPTER_INVALID, "no effect"),
    "no tensors": (dict.clear, Reason.ADAPTER_INVALID, "no tensors"),
    "missing B": (_drop(f"{Q0}.lora_B.weight"), Reason.ADAPTER_INVALID, "missing"),
    "missing A": (_drop(f"{Q0}.lora_A.weight"), Reason.ADAPTER_INVALID, "missing"),
    "rank of the tensor": (
        _put(f"{Q0}.lora_A.weight", 5, 32),
        Reason.ADAPTER_INVALID,
        "lora_A is [5, 32], needed is [4, 32]",
    ),
    "width of A": (
        _put(f"{Q0}.lora_A.weight", 4, 64),
        Reason.ADAPTER_BASE_MISMATCH,
        "model.layers.0.self_attn.q_proj: lora_A is [4, 64], needed is [4, 32]",
    ),
    "height of B": (
        _put(f"{Q0}.lora_B.weight", 64, 4),
        Reason.ADAPTER_BASE_MISMATCH,
        "model.layers.0.self_attn.q_proj: lora_B is [64, 4], needed is [32, 4]",
    ),
    "one dimension": (_put(f"{Q0}.lora_A.weight", 128), Reason.ADAPTER_BASE_MISMATCH, "[128]"),
    "a layer too many": (
        _put(f"{L9}.lora_A.weight", 4, 32),
        Reason.ADAPTER_BASE_MISMATCH,
        "layers.9",
    ),
    "a module that is not targeted": (
        _put("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", 4, 32),
        Reason.ADAPTER_INVALID,
        "does not target",
    ),
    "DoRA magnitudes": (
        _put(f"{Q0}.lora_magnitude_vector", 32),
        Reason.ADAPTER_UNSUPPORTED,
        "lora_magnitude_vector",
    ),
    "bias of B": (_put(f"{Q0}.lora_B.bias", 32), Reason.ADAPTER_UNSUPPORTED, "lora_B.bias"),
    "embedding that is not targeted": (
        _put("base_model.model.model.embed_tokens.lora_embedding_A", 4, 64),
        Reason.ADAPTER_INVALID,
        "does not target",
    ),
    "embedding as a linear": (
        _put("base_model.model.model.embed_tokens.lora_A.weight", 4, 64),
        Reason.ADAPTER_UNSUPPORTED,
        "model.embed_tokens",
    ),
    "a norm": (
        _put("base_model.model.model.norm.lora_A.weight", 4, 32),
        Reason.ADAPTER_UNSUPPORTED,
        "model.norm",
    ),
    "trainable tokens": (
        _put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 32),
        Reason.ADAPTER_UNSUPPORTED,
        "trainable_tokens_delta",
    ),
    "a path that climbs": (
        _put("base_model.model.model.layers.0.self_attn.q_proj/../../x.lora_A.weight", 4, 32),
        Reason.ADAPTER_UNSUPPORTED,
        "not served",
    ),
    "NUL in a name": (
        _put("base_model.model.model.layers.0.self_attn.q_proj\0.lora_A.weight", 4, 32),
        Reason.ADAPTER_UNSUPPORTED,
        "x00",
    ),
    "a digit that is none of ASCII": (
        _put("base_model.model.model.layers.\u0660.self_attn.q_proj.lora_A.weight", 4, 32),
        Reason.ADAPTER_UNSUPPORTED,
        "not served",
    ),
    "a name of 10 KB": (
        _put(f"base_model.model.{'x' * 10_240}.lora_A.weight", 4, 32),
        Reason.ADAPTER_UNSUPPORTED,
        "not served",
    ),
    "a full weight": (
        _put("base_model.model.lm_head.weight", 64, 32),
        Reason.ADAPTER_UNSUPPORTED,
        "lm_head.weight",
    ),
    "another prefix": (
        _put("model.layers.0.self_attn.q_proj.lora_A.weight", 4, 32),
        Reason.ADAPTER_UNSUPPORTED,
        "base_model.model.",
    ),
    "adapter name in the key": (
        _put(f"{Q0}.lora_A.default.weight", 4, 32),
        Reason.ADAPTER_UNSUPPORTED,
        "default",
    ),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_weights_that_do_not_fit_are_refused(
    what: str, tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    change, reason, message = BAD_TENSORS[what]
    _write(tmp_path, shapes)
    _change_tensors(tmp_path, change)
    with pytest.raises(RpcError) as caught:
        convert_folder(tmp_path)
    assert caught.value.reason is reason
    assert message in caught.value.message
    assert len(caught.value.message) < 500
    assert caught.value.context.field
    caught.value.to_status()


def test_one_module_without_effect_does_not_matter(
    tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    def zero_one(tensors: dict[str, Any]) -> None:
        tensors[f"{Q0}.lora_B.weight"] = np.zeros_like(tensors[f"{Q0}.lora_B.weight"])

    _write(tmp_path, shapes)
    _change_tensors(tmp_path, zero_one)
    convert_folder(tmp_path)


@pytest.mark.parametrize(
    ("alpha", "message"), [(2.0**53, "overflows"), (1e-300, "no effect"), (5e-324, "no effect")]
)
def test_a_scale_that_leaves_the_range_of_numbers_is_refused(
    alpha: float, message: str, tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path, shapes)
    _change_config(tmp_path, lora_alpha=alpha)
    _change_tensors(tmp_path, _enlarge)
    with pytest.raises(RpcError) as caught:
        convert_folder(tmp_path)
    assert caught.value.reason is Reason.ADAPTER_INVALID
    assert message in caught.value.message


def _enlarge(tensors: dict[str, Any]) -> None:
    tensors[f"{Q0}.lora_B.weight"] = to_bits(np.full((32, 4), 1e30), "BF16")


def test_embedding_and_head_lie_before_and_behind_the_layers(
    tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    outer = {"embed_tokens": (64, 32), "lm_head": (32, 64)}
    _write(tmp_path, shapes | outer, target_modules=["lm_head", "q_proj", "embed_tokens"])
    converted = convert_folder(tmp_path)
    header = read_header(converted.blob)
    assert [chunk.layer for chunk in header.layers] == [-1, 0, 1, 2]
    first, last = header.modules[0], header.modules[-1]
    assert (first.module, first.in_features, first.out_features) == ("embed_tokens", 64, 32)
    assert (last.module, last.in_features, last.out_features) == ("lm_head", 32, 64)
    assert converted.weights.target_modules == ("embed_tokens", "lm_head", "q_proj")


OUTER = {
    "base_model.model.model.embed_tokens.lora_embedding_A": (4, 64),
    "base_model.model.model.embed_tokens.lora_embedding_B": (32, 4),
    "base_model.model.lm_head.lora_A.weight": (4, 32),
    "base_model.model.lm_head.lora_B.weight": (64, 4),
}


@pytest.mark.parametrize("name", OUTER)
def test_embedding_and_head_need_both_their_tensors(
    name: str, tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path, shapes)
    _change_config(tmp_path, target_modules=["q_proj", "v_proj", "lm_head", "embed_tokens"])

    def add(tensors: dict[str, Any]) -> None:
        for other, shape in OUTER.items():
            if other != name:
                _put(other, *shape)(tensors)

    _change_tensors(tmp_path, add)
    with pytest.raises(RpcError) as caught:
        convert_folder(tmp_path)
    assert (caught.value.reason, caught.value.context.field) == (Reason.ADAPTER_INVALID, name)


def test_the_peft_version_is_kept(tmp_path: Path, shapes: Shapes, convert_folder: Convert) -> None:
    _write(tmp_path, shapes)
    assert convert_folder(tmp_path).peft_version == ""
    _change_config(tmp_path, peft_version="0.19.1.dev0@4f2c")
    assert convert_folder(tmp_path).peft_version == "0.19.1.dev0@4f2c"


def test_many_targets_and_layers_together_are_refused(
    tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path, shapes)
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(20)]
    _change_config(tmp_path, target_modules=names, layers_to_transform=[0])
    with pytest.raises(RpcError) as caught:
        convert_folder(tmp_path)
    assert caught.value.context.field == "layers_to_transform"


def test_mixed_dtypes_are_refused(tmp_path: Path, shapes: Shapes, convert_folder: Convert) -> None:
    _write(tmp_path, shapes)
    header = {
        f"{Q0}.lora_A.weight": {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]},
        f"{Q0}.lora_B.weight": {"dtype": "BF16", "shape": [32, 4], "data_offsets": [512, 768]},
    }
    (tmp_path / WEIGHTS_FILE).write_bytes(with_header(header, bytes(768)))
    with pytest.raises(RpcError, match="BF16, F32"):
        convert_folder(tmp_path)


@pytest.mark.parametrize("named", ["acme/other-base", "meta-llama/Llama-3.1-8B"])
def test_an_adapter_of_another_base_is_refused(
    named: str, tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path, shapes, base_model=named)
    with pytest.raises(RpcError) as caught:
        convert_folder(tmp_path)
    assert caught.value.reason is Reason.ADAPTER_BASE_MISMATCH
    assert caught.value.context.field == "base_model_name_or_path"
    assert named in caught.value.message


@pytest.mark.parametrize("named", ["acme/tiny-base", "ACME/Tiny-Base", "/home/me/tiny", "./t", ""])
def test_the_served_base_or_a_path_is_accepted(
    named: str, tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path, shapes, base_model=named)
    assert convert_folder(tmp_path).weights.base_model == named


def test_a_target_that_the_base_does_not_have_is_another_base(
    tmp_path: Path, shapes: Shapes, convert_folder: Convert
) -> None:
    _write(tmp_path, shapes)
    _change_config(tmp_path, target_modules=["query_key_value"])
    key = "base_model.model.model.layers.0.self_attn.query_key_value.lora_A.weight"
    (tmp_path / WEIGHTS_FILE).write_bytes(
        safetensors_bytes({key: to_bits(np.ones((4, 32)), "BF16")}, "BF16")
    )
    with pytest.raises(RpcError) as caught:
        convert_folder(tmp_path)
    assert caught.value.reason is Reason.ADAPTER_BASE_MISMATCH
