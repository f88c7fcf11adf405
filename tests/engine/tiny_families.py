"""A tiny random model of each family and variant that the engine serves, made by transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.auto import AutoModelForCausalLM

VOCAB = 320
POSITIONS = 256
WINDOW = 96
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# 96 / 6 heads is 16; these heads are wider, and those of the last one narrower.
_WIDE: dict[str, Any] = SHAPE | {"head_dim": 32}
_NARROW: dict[str, Any] = SHAPE | {"head_dim": 8}
_MULTI_HEAD: dict[str, Any] = SHAPE | {"num_key_value_heads": 6}
LLAMA3_ROPE: Any = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN: Any = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN_OPTIONS: Any = _YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "truncate": False}
_YARN_RATIO: Any = _YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}
_YARN_FACTOR: Any = _YARN | {"attention_factor": 0.9}
LINEAR_ROPE: Any = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}

FAMILIES: dict[str, PretrainedConfig] = {
    "llama 2": LlamaConfig(**_MULTI_HEAD, tie_word_embeddings=False),
    "llama 3": LlamaConfig(
        **SHAPE,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    ),
    "llama 3.1": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=False),
    "llama 3.2": LlamaConfig(
        **_WIDE, rope_parameters=LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True
    ),
    "llama, attention biases": LlamaConfig(**SHAPE, attention_bias=True),
    "llama, mlp biases": LlamaConfig(**_NARROW, mlp_bias=True),
    "llama, all biases": LlamaConfig(
        **_WIDE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama, linear rope": LlamaConfig(**SHAPE, rope_parameters=LINEAR_ROPE),
    "llama, yarn": LlamaConfig(**SHAPE, rope_parameters=_YARN_OPTIONS),
    "mistral 0.1": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "mistral 0.3": MistralConfig(**SHAPE, sliding_window=None),
    "mistral nemo": MistralConfig(**_WIDE, sliding_window=None),
    "qwen 2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen 2, upper layers slide": Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen 2.5": Qwen2Config(
        **SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}
    ),
    "qwen 2.5, yarn": Qwen2Config(**SHAPE, rope_parameters=_YARN),
    "qwen 3": Qwen3Config(**_WIDE, tie_word_embeddings=True),
    "qwen 3, untied with biases": Qwen3Config(**_WIDE, attention_bias=True),
    "qwen 3, yarn": Qwen3Config(**_WIDE, rope_parameters=_YARN_RATIO),
    "smollm 2": LlamaConfig(
        **SHAPE,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    ),
    "smollm 3": SmolLM3Config(**SHAPE),
    "smollm 3, other layers": SmolLM3Config(
        **SHAPE, no_rope_layers=[0, 1, 1, 0, 1], attention_bias=True, mlp_bias=True
    ),
    "smollm 3, sliding": SmolLM3Config(
        **SHAPE,
        use_sliding_window=True,
        sliding_window=WINDOW,
        no_rope_layer_interval=2,
        tie_word_embeddings=False,
    ),
    "smollm 3, yarn": SmolLM3Config(**SHAPE, rope_parameters=_YARN_FACTOR),
}


def tiny_family(folder: Path, name: str) -> PreTrainedModel:
    """A random model in fp32, the same for the same name, saved to the folder. See `FAMILIES`."""
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(FAMILIES[name]).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # They begin as ones and zeros, with which much would go unnoticed.
            if key.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model
