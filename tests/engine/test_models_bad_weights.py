"""What is wrong with a model folder, or with what it is to hold, is said by name at load."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.common.base_model import (
    BaseModelError,
    ContextTooLongError,
    ModelIncompleteError,
    UnsupportedModelError,
    load_config,
)
from services.worker.engine import EngineSettings, build_engine
from services.worker.engine.model import Weights
from services.worker.engine.sizing import (
    EngineMemoryError,
    check_weights_fit,
    context_tokens,
    host_bytes_available,
    pool_blocks,
    weights_bytes,
)
from tests.engine.engine_support import DType, generated, model_engine, reference_greedy, spec
from tests.engine.tiny_families import FAMILIES, POSITIONS, tiny_family

Q1 = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def _with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _with_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [EMBEDDING, Q1, "model.norm.weight", HEAD])
def test_a_value_that_is_not_finite_is_named_by_its_tensor(
    name: str, dtype: DType, value: float, tmp_path: Path
) -> None:
    tiny_family(tmp_path, "llama 2")

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    _with_tensors(tmp_path, spoil)
    with pytest.raises(ModelIncompleteError, match=f"{name} has values that are not finite"):
        model_engine(tmp_path, dtype=dtype)


def test_a_value_beyond_the_range_of_float16_is_named(tmp_path: Path) -> None:
    tiny_family(tmp_path, "llama 2")

    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[Q1][0, 0] = 70_000.0

    _with_tensors(tmp_path, enlarge)
    model_engine(tmp_path, dtype="float32")
    with pytest.raises(ModelIncompleteError, match=rf"{Q1} .*float16"):
        model_engine(tmp_path, dtype="float16")


def test_large_values_whose_sum_is_not_finite_are_none_of_that(tmp_path: Path) -> None:
    tiny_family(tmp_path, "llama 2")

    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][:] = 3e38

    _with_tensors(tmp_path, enlarge)
    model_engine(tmp_path, dtype="float32")


def test_a_head_that_repeats_the_embedding_it_is_tied_to_is_accepted(tmp_path: Path) -> None:
    reference = tiny_family(tmp_path, "llama 3.2")

    def repeat(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()

    _with_tensors(tmp_path, repeat)
    prompt = [7, 8, 9]
    output = generated(model_engine(tmp_path), [spec("a", prompt)])
    assert output["a"] == reference_greedy(reference, prompt)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    tiny_family(tmp_path, "llama 3.2")

    def add(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING] * 2

    _with_tensors(tmp_path, add)
    with pytest.raises(UnsupportedModelError, match="tie_word_embeddings"):
        model_engine(tmp_path)


def test_fewer_layers_than_the_configuration_knows_are_refused(tmp_path: Path) -> None:
    tiny_family(tmp_path, "llama 2")
    _with_config(tmp_path, num_hidden_layers=6)
    with pytest.raises(ModelIncompleteError, match=r"the weights lack model\.layers\.5"):
        model_engine(tmp_path)


def test_biases_that_the_configuration_does_not_know_are_refused(tmp_path: Path) -> None:
    tiny_family(tmp_path, "llama, attention biases")
    _with_config(tmp_path, attention_bias=False)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn\.k_proj\.bias"):
        model_engine(tmp_path)


def test_more_layers_than_the_configuration_knows_are_refused(tmp_path: Path) -> None:
    tiny_family(tmp_path, "llama 2")
    _with_config(tmp_path, num_hidden_layers=4)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.4"):
        model_engine(tmp_path)


def test_heads_that_are_not_those_of_the_configuration_are_refused(tmp_path: Path) -> None:
    tiny_family(tmp_path, "llama 3")
    _with_config(tmp_path, num_key_value_heads=3)
    with pytest.raises(ModelIncompleteError, match=r"k_proj\.weight .*\(32, 96\).*\(48, 96\)"):
        model_engine(tmp_path)


def test_a_quantised_tensor_is_refused(tmp_path: Path) -> None:
    tiny_family(tmp_path, "llama 2")

    def quantise(tensors: dict[str, Tensor]) -> None:
        tensors[Q1] = tensors[Q1].to(torch.float8_e4m3fn)

    _with_tensors(tmp_path, quantise)
    with pytest.raises(UnsupportedModelError, match=f"{Q1} .*F8_E4M3"):
        model_engine(tmp_path)


def test_a_file_whose_tensors_overlap_is_refused(tmp_path: Path) -> None:
    tiny_family(tmp_path, "llama 2")
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    norms = [f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")]
    header[norms[0]]["data_offsets"] = header[norms[1]]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    with pytest.raises(ModelIncompleteError, match=r"model\.safetensors cannot be read"):
        model_engine(tmp_path)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_each_stored_type_are_converted(stored: torch.dtype, tmp_path: Path) -> None:
    tiny_family(tmp_path, "llama 2")
    tensors = {name: tensor.to(stored) for name, tensor in _tensors(tmp_path).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = Weights(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    loaded = weights.get(Q1, tuple(tensors[Q1].shape))
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, tensors[Q1].float())


def _tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_context_longer_than_the_models_is_refused_with_both_lengths(tmp_path: Path) -> None:
    tiny_family(tmp_path, "llama 2")
    assert model_engine(tmp_path).info.max_context_tokens == POSITIONS
    assert model_engine(tmp_path, max_context_tokens=40).info.max_context_tokens == 40
    with pytest.raises(ContextTooLongError, match=f"{POSITIONS + 1} tokens .* has {POSITIONS}$"):
        model_engine(tmp_path, max_context_tokens=POSITIONS + 1)


def test_a_context_longer_than_a_sliding_window_is_refused(tmp_path: Path) -> None:
    tiny_family(tmp_path, "mistral 0.1")
    with pytest.raises(ContextTooLongError, match="its sliding window 96"):
        model_engine(tmp_path, max_context_tokens=97)


def test_a_context_that_nobody_asked_for_is_not_longer_than_the_default(tmp_path: Path) -> None:
    FAMILIES["llama 2"].save_pretrained(tmp_path)
    _with_config(tmp_path, max_position_embeddings=100_000, architectures=["LlamaForCausalLM"])
    config = load_config(tmp_path)
    assert context_tokens(None, config) == 2048
    assert context_tokens(100_000, config) == 100_000


def test_a_pool_without_room_for_a_block_names_needed_and_given_bytes(tmp_path: Path) -> None:
    tiny_family(tmp_path, "llama 2")
    block_bytes = model_engine(tmp_path).info.block_bytes
    with pytest.raises(EngineMemoryError, match=f"{block_bytes - 1} bytes; .* {block_bytes}$"):
        model_engine(tmp_path, memory_bytes=block_bytes - 1)
    assert model_engine(tmp_path, memory_bytes=block_bytes).info.pool_blocks == 1
    assert pool_blocks(10, 3) == 3


def test_a_pool_larger_than_addresses_is_refused(tmp_path: Path) -> None:
    tiny_family(tmp_path, "llama 2")
    with pytest.raises(ValueError, match="bytes of memory cannot be mapped"):
        model_engine(tmp_path, memory_bytes=2**60)


def test_weights_larger_than_memory_name_needed_and_given_bytes(tmp_path: Path) -> None:
    reference = tiny_family(tmp_path, "llama 2")
    parameters = sum(parameter.numel() for parameter in reference.parameters())
    assert weights_bytes(load_config(tmp_path), 2) == 2 * parameters
    with pytest.raises(EngineMemoryError, match="need 100 bytes of memory, 99 are there"):
        check_weights_fit(100, 99)
    check_weights_fit(100, 100)
    check_weights_fit(100, None)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much it could give")
def test_the_memory_of_this_machine_is_known() -> None:
    available = host_bytes_available()
    assert available is not None
    assert available > 2**20


def test_a_folder_without_anything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"config\.json is missing"):
        build_engine(EngineSettings(model=tmp_path))
