"""Adapters that PEFT itself made and saved, on a tiny Llama: the same modules, ranks and deltas."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.adapter_store.base_tensors import BaseTensors
from services.adapter_store.peft import BaseModel, Converted, convert
from services.adapter_store.peft_config import _NO_EFFECT, _READ
from services.common.adapter_container import BlobVerifier
from services.common.base_model import load_config
from services.common.errors import Reason, RpcError
from tests.support.peft_folders import CONFIG_FILE, WEIGHTS_FILE, read_tensors, safetensors_bytes

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what is asked for on purpose

NUM_LAYERS = 2
HEADS = ["embed_tokens", "lm_head"]


@dataclass(frozen=True, slots=True)
class Folders:
    """The same tiny model with tied and with separate embeddings."""

    tied: Path
    untied: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    made = Folders(tmp_path_factory.mktemp("tied"), tmp_path_factory.mktemp("untied"))
    for folder, is_tied in ((made.tied, True), (made.untied, False)):
        torch.manual_seed(7)
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            max_position_embeddings=128,
            tie_word_embeddings=is_tied,
        )
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder)
    return made


def _adapted(folder: Path, out: Path, *, save: dict[str, Any] | None = None, **fields: Any) -> Any:
    """PEFT's model with random LoRA weights, saved to `out`."""
    torch.manual_seed(11)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **fields})
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(out, **(save or {}))
    return model


def _convert(out: Path, folder: Path) -> Converted:
    base = BaseModel(load_config(folder), (), BaseTensors(folder))
    config = (out / CONFIG_FILE).read_bytes()
    return convert(config, memoryview((out / WEIGHTS_FILE).read_bytes()), base, rank_max=64)


def _lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            yield path, layer


def _check_agreement(model: Any, converted: Converted) -> None:
    """Same modules, rank, scale, and the blob's bytes give PEFT's own delta."""
    layers = dict(_lora_layers(model))
    assert {bound.module.path for bound in converted.bindings} == set(layers)
    verifier = BlobVerifier(converted.weights.digest)
    verifier.feed(converted.blob)
    header = verifier.header
    assert header is not None
    assert verifier.is_complete
    assert converted.weights.dtype == "F32"
    for bound, entry in zip(converted.bindings, header.modules, strict=True):
        layer = layers[bound.module.path]
        assert (entry.layer, entry.module) == (bound.module.layer, bound.module.name)
        assert entry.rank == bound.rank == layer.r["default"]
        assert entry.scale == bound.scale == layer.scaling["default"]
        start = header.payload_offset + entry.offset
        values = np.frombuffer(
            converted.blob,
            dtype=np.float32,
            count=entry.rank * (entry.in_features + entry.out_features),
            offset=start,
        )
        a = torch.tensor(values[: entry.rank * entry.in_features]).reshape(entry.rank, -1)
        bt = torch.tensor(values[entry.rank * entry.in_features :]).reshape(entry.rank, -1)
        delta = entry.scale * (bt.T @ a)
        theirs = layer.get_delta_weight("default")
        if entry.module == "embed_tokens":
            delta = delta.T  # an embedding's weight is [vocabulary, hidden]
        assert torch.allclose(delta, theirs, rtol=1e-5, atol=1e-6)


ADAPTERS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "all linears by their names": {
        "target_modules": [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ]
    },
    "all-linear": {"target_modules": "all-linear"},
    "all-linear in capitals": {"target_modules": "All-Linear"},
    "all-linear without some": {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    "expression": {"target_modules": r"model\.layers\.1\.(self_attn|mlp)\.\w+_proj"},
    "excluded by expression": {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layers of a pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
    "a whole path beside layers": {
        "target_modules": ["q_proj", "model.layers.1.mlp.up_proj", "lm_head"],
        "layers_to_transform": [0],
    },
    "an embedding beside layers": {
        "target_modules": ["q_proj", "embed_tokens"],
        "layers_to_transform": [0],
    },
    "rank pattern": {
        "target_modules": ["q_proj", "down_proj", "lm_head", "embed_tokens"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 7, "lm_head": 2, "embed_tokens": 3},
    },
    "anchored rank pattern": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 5},
    },
    "alpha pattern": {
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
        "alpha_pattern": {"embed_tokens": 32, "lm_head": 3, "layers.0.self_attn.q_proj": 1},
    },
    "rsLoRA": {
        "target_modules": ["q_proj", *HEADS],
        "use_rslora": True,
        "rank_pattern": {"q_proj": 9, "embed_tokens": 3},
    },
    "output head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding by its whole path": {"target_modules": ["model.embed_tokens", "v_proj"]},
    "embedding and head by expression": {"target_modules": r"(model\.embed_tokens|lm_head)"},
    "everything": {"target_modules": ["q_proj", "down_proj", *HEADS]},
    "fan_in_fan_out": {"target_modules": ["q_proj", *HEADS], "fan_in_fan_out": True},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("what", ADAPTERS)
def test_what_peft_saved_is_bound_as_peft_binds_it(
    what: str, kind: str, folders: Folders, tmp_path: Path
) -> None:
    folder: Path = getattr(folders, kind)
    model = _adapted(folder, tmp_path, **ADAPTERS[what])
    converted = _convert(tmp_path, folder)
    _check_agreement(model, converted)
    assert converted.peft_version == peft.__version__


def _edit_config(out: Path, **fields: Any) -> None:
    config = json.loads((out / CONFIG_FILE).read_text())
    (out / CONFIG_FILE).write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("target", [["q_proj"], ["embed_tokens"], ["embed_tokens", "q_proj"]])
def test_fan_in_fan_out_in_a_file_changes_nothing(
    target: list[str], folders: Folders, tmp_path: Path
) -> None:
    _adapted(folders.tied, tmp_path, target_modules=target)
    plain = _convert(tmp_path, folders.tied)
    _edit_config(tmp_path, fan_in_fan_out=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(folders.tied, dtype=torch.bfloat16)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    converted = _convert(tmp_path, folders.tied)
    _check_agreement(loaded, converted)
    assert converted.weights.digest == plain.weights.digest


@pytest.mark.parametrize("target", ["all-linear", "All-LINEAR"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_all_linear_in_a_file_is_what_peft_takes_it_for(
    target: str, kind: str, folders: Folders, tmp_path: Path
) -> None:
    folder: Path = getattr(folders, kind)
    _adapted(folder, tmp_path, target_modules="all-linear")  # which PEFT saves as a list
    _edit_config(tmp_path, target_modules=target)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    converted = _convert(tmp_path, folder)
    _check_agreement(loaded, converted)
    assert len(converted.bindings) == 7 * NUM_LAYERS


def test_lora_on_a_tied_head_leaves_the_embedding_alone(folders: Folders, tmp_path: Path) -> None:
    model = _adapted(folders.tied, tmp_path, target_modules=["lm_head"])
    tokens = torch.tensor([[3, 5, 8]])
    embedded = model.get_input_embeddings()(tokens)
    logits = model(tokens).logits
    with model.disable_adapter():
        assert torch.equal(model.get_input_embeddings()(tokens), embedded)
        assert not torch.equal(model(tokens).logits, logits)
    assert [bound.module.name for bound in _convert(tmp_path, folders.tied).bindings] == ["lm_head"]


SAVED = {"q_proj": ".weight", "embed_tokens": ".base_layer.weight", "lm_head": ".base_layer.weight"}


@pytest.mark.parametrize("target", SAVED)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_base_models_own_tensors_are_left_out(
    target: str, kind: str, folders: Folders, tmp_path: Path
) -> None:
    folder: Path = getattr(folders, kind)
    always = {"save_embedding_layers": True}
    model = _adapted(folder, tmp_path / "with", target_modules=[target], save=always)
    model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    brought = read_tensors((tmp_path / "with" / WEIGHTS_FILE).read_bytes())
    assert any(name.endswith(SAVED[target]) for name in brought if "lora_" not in name)
    first, second = _convert(tmp_path / "with", folder), _convert(tmp_path / "without", folder)
    assert first.weights.digest == second.weights.digest


def _refused(out: Path, folder: Path) -> RpcError:
    with pytest.raises(RpcError) as caught:
        _convert(out, folder)
    return caught.value


def test_another_models_tensors_are_refused(folders: Folders, tmp_path: Path) -> None:
    _adapted(folders.untied, tmp_path, target_modules=["lm_head"])
    error = _refused(tmp_path, folders.tied)
    assert error.reason is Reason.ADAPTER_UNSUPPORTED
    assert "base_model.model.lm_head.base_layer.weight" in error.message
    assert "save_embedding_layers=False" in error.message


@pytest.mark.parametrize("index", [0, -1])
def test_base_tensors_that_were_trained_are_refused(
    index: int, folders: Folders, tmp_path: Path
) -> None:
    model = _adapted(folders.untied, tmp_path, target_modules=["embed_tokens"])
    with torch.no_grad():
        model.get_input_embeddings().base_layer.weight.view(-1)[index] += 1
    model.save_pretrained(tmp_path)
    assert _refused(tmp_path, folders.untied).reason is Reason.ADAPTER_UNSUPPORTED


def test_an_embedding_that_was_resized_is_refused(folders: Folders, tmp_path: Path) -> None:
    model = _adapted(folders.untied, tmp_path, target_modules=["q_proj"])
    model.base_model.model.resize_token_embeddings(72)
    model.save_pretrained(tmp_path)
    assert _refused(tmp_path, folders.untied).reason is Reason.ADAPTER_UNSUPPORTED


def test_base_tensors_of_another_dtype_are_compared_by_value(
    folders: Folders, tmp_path: Path
) -> None:
    model = _adapted(folders.untied, tmp_path, target_modules=["lm_head"])
    model.to(torch.float32).save_pretrained(tmp_path)
    names = {
        tensor.name
        for bound in _convert(tmp_path, folders.untied).bindings
        for tensor in (bound.a, bound.b)
    }
    assert names == {
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.lm_head.lora_B.weight",
    }


def test_base_tensors_are_refused_where_there_is_nothing_to_hold_them_against(
    folders: Folders, tmp_path: Path
) -> None:
    empty = tmp_path / "no weights"
    empty.mkdir()
    (empty / "config.json").write_bytes((folders.untied / "config.json").read_bytes())
    _adapted(folders.untied, tmp_path, target_modules=["lm_head"])
    assert _refused(tmp_path, empty).reason is Reason.ADAPTER_UNSUPPORTED


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02" + bytes(7) + b"[]", "cut", "int8"])
def test_base_weights_that_cannot_be_read_are_none(
    content: bytes | str, folders: Folders, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((folders.untied / "config.json").read_bytes())
    weights = (folders.untied / "model.safetensors").read_bytes()
    if content == "cut":
        content = weights[: 8 + int.from_bytes(weights[:8], "little") + 100]
    elif content == "int8":
        content = weights.replace(b'"BF16"', b'"I8"  ')
    assert isinstance(content, bytes)
    (broken / "model.safetensors").write_bytes(content)
    _adapted(folders.untied, tmp_path, target_modules=["lm_head"])
    assert _refused(tmp_path, broken).reason is Reason.ADAPTER_UNSUPPORTED


def test_the_base_models_weights_may_lie_in_several_files(folders: Folders, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    model = transformers.AutoModelForCausalLM.from_pretrained(folders.untied, dtype=torch.bfloat16)
    model.save_pretrained(sharded, max_shard_size="8KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    _adapted(folders.untied, tmp_path, target_modules=HEADS)
    assert len(_convert(tmp_path, sharded).bindings) == 2


def test_a_module_that_is_trained_whole_is_refused_by_name(
    folders: Folders, tmp_path: Path
) -> None:
    _adapted(folders.untied, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    error = _refused(tmp_path, folders.untied)
    assert (error.reason, error.context.field) == (Reason.ADAPTER_UNSUPPORTED, "modules_to_save")


# Fields of which any value is accepted: they matter to training, or to a feature with a switch.
WITHOUT_EFFECT = {
    "lora_dropout", "inference_mode", "revision", "auto_mapping", "megatron_core",
    "qalora_group_size", "eva_config",
}  # fmt: skip
READ = {
    "peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias",
    "base_model_name_or_path", "init_lora_weights", "fan_in_fan_out", "peft_version",
}  # fmt: skip


def _config_fields() -> list[str]:
    return sorted(peft.LoraConfig.__dataclass_fields__)


def test_the_fields_that_are_read_or_without_effect_are_these_and_no_other() -> None:
    assert _READ == READ
    assert _NO_EFFECT == WITHOUT_EFFECT
    assert set(_config_fields()) >= READ | WITHOUT_EFFECT


@pytest.mark.parametrize("field", sorted({*_config_fields(), "arrow_config", "unheard_of"} - READ))
@pytest.mark.parametrize("value", [True, 1, "on", [1], {"a": 1}, {"a": False, "b": "x"}, [[]]])
def test_every_other_field_of_peft_is_refused_by_its_name(
    field: str, value: Any, folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("adapter")
    (out / CONFIG_FILE).write_text(json.dumps({**PLAIN, field: value}))
    (out / WEIGHTS_FILE).write_bytes(_plain_weights())
    if field in WITHOUT_EFFECT:
        assert _convert(out, folders.tied).weights.rank == 4
        return
    error = _refused(out, folders.tied)
    assert (error.reason, error.context.field) == (Reason.ADAPTER_UNSUPPORTED, field)
    assert field in error.message


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["lm_head"]}


def _plain_weights() -> bytes:
    ones = {"A": np.ones((4, 32), np.uint16), "B": np.ones((64, 4), np.uint16)}
    # Bits 0x3f80 are 1.0.
    named = {
        f"base_model.model.lm_head.lora_{side}.weight": bits * 0x3F80 for side, bits in ones.items()
    }
    return safetensors_bytes(named, "BF16")


INITIALISATIONS = [
    "pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica", "unheard_of", 7, [],
]  # fmt: skip


@pytest.mark.parametrize("value", INITIALISATIONS)
def test_an_initialisation_that_may_change_the_base_is_refused(
    value: Any, folders: Folders, tmp_path: Path
) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**PLAIN, "init_lora_weights": value}))
    (tmp_path / WEIGHTS_FILE).write_bytes(_plain_weights())
    error = _refused(tmp_path, folders.tied)
    assert (error.reason, error.context.field) == (Reason.ADAPTER_UNSUPPORTED, "init_lora_weights")


def test_what_peft_writes_for_its_defaults_is_accepted(folders: Folders, tmp_path: Path) -> None:
    peft.LoraConfig(target_modules=["lm_head"], r=4).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(_plain_weights())
    assert _convert(tmp_path, folders.tied).peft_version == peft.__version__
