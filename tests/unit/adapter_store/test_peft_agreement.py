"""Which modules an adapter has, and with which rank, as PEFT's own code decides it."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from services.adapter_store.modules import modules_of
from services.adapter_store.peft_config import parse_config
from services.common.base_model import ModelConfig

CONFIGS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "longer suffixes": {"target_modules": ["self_attn.q_proj", "1.mlp.up_proj"]},
    "whole path": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "parts of names do not match": {"target_modules": ["proj", "up_proj"]},
    "expression": {"target_modules": r".*\.(q|k)_proj"},
    "expression of a layer": {"target_modules": r"model\.layers\.(0|11)\.mlp\..*"},
    "excluded": {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "excluded by expression": {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1, 11]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "output head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding by its whole path": {"target_modules": ["model.embed_tokens"]},
    "everything by expression": {"target_modules": r".*(_proj|embed_tokens)|lm_head"},
    "head and embedding excluded": {
        "target_modules": ["q_proj", "lm_head", "embed_tokens"],
        "exclude_modules": ["lm_head", "embed_tokens"],
    },
    "a whole path is in any layer": {
        "target_modules": ["q_proj", "model.layers.3.mlp.up_proj", "lm_head", "embed_tokens"],
        "layers_to_transform": [1],
    },
    "layers below a name": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "layers below another name": {
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "blocks"],
    },
    "layers below the second name": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
    "alternatives reach to the ends of a layer's pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers|blocks",
    },
    "alternatives with the number in the last": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["blocks|(?:model\\.)?layers"],
    },
}
RANKS: dict[str, dict[str, int]] = {
    "module": {"q_proj": 2},
    "layer": {"layers.1.self_attn.q_proj": 3, "q_proj": 2},
    "first wins": {"q_proj": 2, "layers.1.self_attn.q_proj": 3},
    "expression": {r"layers\.[01]\.mlp\.(up|down)_proj": 5},
    "whole path": {"model.layers.0.mlp.up_proj": 6},
    "parts of names do not match": {"proj": 9, "_proj": 9},
    "alternatives at the top": {"q_proj|up_proj": 7},
    "anchored": {"^model.layers.0.mlp.up_proj": 7, "^layers.1.mlp.up_proj": 9},
    "head and embedding": {"lm_head": 2, "embed_tokens": 3},
    "brackets that end the group": {"q_proj)|(?:up_proj": 4},
}


def _config_json(**fields: Any) -> bytes:
    known = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    return json.dumps({**known, **fields}).encode()


def _paths() -> list[str]:
    heads = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 1}
    model = SimpleNamespace(
        hidden_size=1, intermediate_size=1, num_layers=12, vocab_size=1, **heads
    )
    config: ModelConfig = model  # type: ignore[assignment]
    return [module.path for module in modules_of(config)]


@pytest.mark.parametrize("what", CONFIGS)
def test_the_same_modules_are_targeted(what: str) -> None:
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    fields = CONFIGS[what]
    ours = parse_config(_config_json(**fields), rank_max=64).targets
    absent = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    theirs = SimpleNamespace(**absent, modules_to_save=None, target_parameters=None)
    theirs.__dict__.update(fields)
    for path in _paths():
        assert ours.include(path) == bool(tuners.check_target_module_exists(theirs, path)), path


@pytest.mark.parametrize("what", RANKS)
def test_the_same_rank_is_found(what: str) -> None:
    other = pytest.importorskip("peft.utils.other")
    pattern = RANKS[what]
    ours = parse_config(_config_json(rank_pattern=pattern), rank_max=64)
    for path in _paths():
        theirs = pattern.get(other.get_pattern_key(pattern.keys(), path), 8)
        assert ours.rank_of(path) == theirs, path
