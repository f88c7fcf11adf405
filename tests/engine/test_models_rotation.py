"""Rotary frequencies of published configurations, bit for bit those of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config, SmolLM3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from services.common.base_model import load_config
from services.worker.engine.rotation import (
    rotation_frequencies,
    rotation_scale,
    rotation_tables,
)

# What decides the rotation in the published files, in the spelling of those files.
_PUBLISHED: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "Llama 2 7B": (LlamaConfig, {"max_position_embeddings": 4096, "rope_scaling": None}),
    "Llama 3.1 8B": (
        LlamaConfig,
        {
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
    ),
    "a linear one": (
        LlamaConfig,
        {"max_position_embeddings": 16384, "rope_scaling": {"factor": 8.0, "type": "linear"}},
    ),
    "Qwen 2.5 7B, long": (
        Qwen2Config,
        {
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
        },
    ),
    "Qwen 3 8B, long": (
        Qwen3Config,
        {
            "max_position_embeddings": 131072,
            "rope_theta": 1000000,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
        },
    ),
    "SmolLM3 3B": (SmolLM3Config, {"max_position_embeddings": 65536, "rope_theta": 5000000.0}),
    "SmolLM3 3B, long": (
        SmolLM3Config,
        {
            "max_position_embeddings": 131072,
            "rope_theta": 5000000.0,
            "rope_scaling": {
                "factor": 2.0,
                "original_max_position_embeddings": 65536,
                "type": "yarn",
            },
        },
    ),
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
_SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize("name", _PUBLISHED)
def test_frequencies_and_scale_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, fields = _PUBLISHED[name]
    text = _SHAPE | fields | {"architectures": [_ARCHITECTURES[kind.model_type]]}
    (tmp_path / "config.json").write_text(json.dumps(text | {"model_type": kind.model_type}))
    config = load_config(tmp_path)

    expected, scale = _reference(kind(**_SHAPE, **json.loads(json.dumps(fields))))
    assert torch.equal(rotation_frequencies(config), expected)
    assert rotation_scale(config) == scale


def _reference(config: Any) -> tuple[torch.Tensor, float]:
    rope_type: str = config.rope_parameters["rope_type"]
    compute: Any = LlamaRotaryEmbedding.compute_default_rope_parameters
    if rope_type != "default":
        compute = ROPE_INIT_FUNCTIONS[rope_type]
    frequencies, scale = compute(config)
    return frequencies, scale


def test_tables_have_the_angle_of_each_position_scaled(tmp_path: Path) -> None:
    _, fields = _PUBLISHED["Qwen 2.5 7B, long"]
    text = _SHAPE | fields | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (tmp_path / "config.json").write_text(json.dumps(text))
    config = load_config(tmp_path)

    cos, signed_sin = rotation_tables(config, 1000, torch.device("cpu"))

    angles = 999 * rotation_frequencies(config).double()
    scale = 0.1 * torch.tensor(4.0).log() + 1
    assert cos.shape == signed_sin.shape == (1000, 1, 128)
    assert torch.allclose(cos[999, 0, :64].double(), angles.cos() * scale, atol=1e-4)
    assert torch.allclose(signed_sin[999, 0, 64:].double(), angles.sin() * scale, atol=1e-4)
    assert torch.equal(signed_sin[:, :, :64], -signed_sin[:, :, 64:])
    assert torch.equal(cos[:, :, :64], cos[:, :, 64:])
