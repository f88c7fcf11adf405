"""Fields of `config.json`: defaults that differ by architecture, and what is refused by name."""

import math
from typing import Any

import pytest

from services.common.base_model import (
    LinearRope,
    ModelConfig,
    UnsupportedModelError,
    YarnRope,
)
from services.common.model_config import LAYERS_MAX, SUPPORTED_ARCHITECTURES, parse_config

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
}
SIZES: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 172,
    "max_position_embeddings": 512,
    "num_attention_heads": 64,
    "num_hidden_layers": 6,
    "rms_norm_eps": 1e-05,
    "vocab_size": 512,
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}


def parse(architecture: str = "LlamaForCausalLM", **changes: Any) -> ModelConfig:
    """A configuration of the sizes above; a field that is `...` is not there."""
    raw = SIZES | {"architectures": [architecture], "model_type": MODEL_TYPES[architecture]}
    return parse_config({k: v for k, v in (raw | changes).items() if v is not ...}, {})


def test_every_supported_architecture_is_read() -> None:
    assert set(MODEL_TYPES) == set(SUPPORTED_ARCHITECTURES)
    for architecture, model_type in MODEL_TYPES.items():
        config = parse(architecture)
        assert (config.architecture, config.model_type) == (architecture, model_type)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", (64, 64, 10_000.0, False, None)),
        ("MistralForCausalLM", (8, 64, 10_000.0, False, 4096)),
        ("Qwen2ForCausalLM", (32, 64, 10_000.0, False, None)),
        ("Qwen3ForCausalLM", (32, 128, 10_000.0, False, None)),
        ("SmolLM3ForCausalLM", (4, 64, 2_000_000.0, True, None)),
    ],
)
def test_what_is_absent_has_the_default_of_its_architecture(
    architecture: str, expected: tuple[object, ...]
) -> None:
    config = parse(architecture)

    heads = config.num_kv_heads, config.head_dim
    others = config.rope_theta, config.tie_embeddings, config.sliding_window
    assert (*heads, *others) == expected


def test_a_null_is_no_absence() -> None:
    assert parse("MistralForCausalLM", sliding_window=None).sliding_window is None
    assert parse("MistralForCausalLM", num_key_value_heads=None).num_kv_heads == 64
    assert parse("Qwen3ForCausalLM", head_dim=None).head_dim == 64


@pytest.mark.parametrize(
    ("fields", "rotates"),
    [
        ({}, [True, True, True, False, True, True]),
        ({"no_rope_layer_interval": 2}, [True, False, True, False, True, False]),
        ({"no_rope_layers": [0, 1, 1, 1, 1, 0]}, [False, True, True, True, True, False]),
        ({"no_rope_layers": [1, 0, 1, 1, 1, 1, 0, 0]}, [True, False, True, True, True, True]),
    ],
)
def test_smollm3_names_the_layers_that_rotate(fields: dict[str, Any], rotates: list[bool]) -> None:
    assert list(parse("SmolLM3ForCausalLM", **fields).rotates) == rotates


@pytest.mark.parametrize("architecture", [a for a in MODEL_TYPES if not a.startswith("SmolLM3")])
def test_all_layers_of_others_rotate(architecture: str) -> None:
    assert parse(architecture).rotates == (True,) * 6


@pytest.mark.parametrize("listed", [[1, 1, 0], [1, 1, 1, 1, 1, 2], "111011", 3])
def test_a_list_that_does_not_name_each_layer_is_refused(listed: object) -> None:
    with pytest.raises(ValueError, match="no_rope_layers"):
        parse("SmolLM3ForCausalLM", no_rope_layers=listed)


@pytest.mark.parametrize(
    ("architecture", "fields", "window"),
    [
        ("MistralForCausalLM", {"sliding_window": 128}, 128),
        ("LlamaForCausalLM", {"sliding_window": 128}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 128}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 128, "use_sliding_window": True}, None),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 5},
            128,
        ),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "max_window_layers": 0}, 4096),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention"] * 6}, None),
        (
            "Qwen3ForCausalLM",
            {"layer_types": ["full_attention"] * 5 + ["sliding_attention"], "sliding_window": 64},
            64,
        ),
        ("SmolLM3ForCausalLM", {"use_sliding_window": True, "sliding_window": 64}, 64),
        (
            "SmolLM3ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 64, "no_rope_layer_interval": 7},
            None,
        ),
    ],
)
def test_a_window_of_any_layer_is_the_models(
    architecture: str, fields: dict[str, Any], window: int | None
) -> None:
    config = parse(architecture, max_position_embeddings=8192, **fields)

    assert config.sliding_window == window
    assert config.context_tokens_max == (window or 8192)


def test_the_length_of_the_original_context_may_be_in_three_places() -> None:
    inner = YARN | {"original_max_position_embeddings": 128}

    def original(**fields: Any) -> int:
        scaling = parse(**fields).rope_scaling
        assert isinstance(scaling, YarnRope)
        return scaling.original_max_positions

    assert original(rope_scaling=YARN) == 512
    assert original(rope_scaling=inner) == 128
    assert original(rope_scaling=inner, original_max_position_embeddings=64) == 64


def test_yarn_has_the_defaults_of_its_paper() -> None:
    scaling = parse(rope_scaling=YARN).rope_scaling

    assert scaling == YarnRope(
        factor=4.0,
        attention_factor=0.1 * math.log(4.0) + 1.0,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=True,
        original_max_positions=512,
    )


@pytest.mark.parametrize(
    ("original", "positions", "expected"), [(512, 512, 2048), (512, 2048, 2048), (512, 9000, 9000)]
)
def test_yarn_stretches_the_positions(original: int, positions: int, expected: int) -> None:
    rope = YARN | {"original_max_position_embeddings": original}
    config = parse(rope_scaling=rope, max_position_embeddings=positions)

    assert config.max_positions == expected


def test_a_linear_factor_leaves_the_positions() -> None:
    config = parse(rope_scaling={"rope_type": "linear", "factor": 4.0})

    assert config.rope_scaling == LinearRope(4.0)
    assert config.max_positions == 512


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "longrope"),
        ({"type": "mrope", "mrope_section": [16, 24, 24]}, "mrope"),
        ({"rope_type": "proportional"}, "proportional"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "beta_fast"),
        (YARN | {"short_factor": [1.0]}, "short_factor"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
    ],
)
def test_a_rotation_that_is_not_computed_is_refused_by_name(
    rope: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        parse(rope_scaling=rope)
    with pytest.raises(UnsupportedModelError, match=named):
        parse(rope_parameters=rope)


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0.5}, "factor"),
        ({"rope_type": "linear", "factor": "4"}, "factor"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4},
            "high_freq_factor",
        ),
        (YARN | {"beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast"),
        (YARN | {"factor": 1e308}, "factor"),
        (YARN | {"truncate": "yes"}, "truncate"),
        (YARN | {"attention_factor": -1.0}, "attention_factor"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ("yarn", "rope_scaling"),
    ],
)
def test_a_bad_field_of_a_rotation_is_named(rope: object, named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        parse(rope_scaling=rope)


@pytest.mark.parametrize(
    ("architecture", "field", "value"),
    [
        ("LlamaForCausalLM", "hidden_act", "gelu"),
        ("LlamaForCausalLM", "hidden_activation", "gelu_pytorch_tanh"),
        ("LlamaForCausalLM", "partial_rotary_factor", 0.75),
        ("LlamaForCausalLM", "rotary_pct", 0.25),
        ("Qwen2ForCausalLM", "use_mrope", True),
        ("LlamaForCausalLM", "attn_logit_softcapping", 50.0),
        ("LlamaForCausalLM", "final_logit_softcapping", 30.0),
        ("LlamaForCausalLM", "logits_scaling", 8.0),
        ("LlamaForCausalLM", "logit_scale", 0.0625),
        ("LlamaForCausalLM", "residual_multiplier", 0.22),
        ("LlamaForCausalLM", "embedding_multiplier", 12.0),
        ("LlamaForCausalLM", "attention_multiplier", 0.015625),
        ("LlamaForCausalLM", "query_pre_attn_scalar", 256),
        ("LlamaForCausalLM", "scale_emb", 12),
        ("LlamaForCausalLM", "scale_depth", 1.4),
        ("LlamaForCausalLM", "dim_model_base", 256),
        ("LlamaForCausalLM", "attn_temperature_tuning", 4),
        ("LlamaForCausalLM", "attention_chunk_size", 8192),
        ("LlamaForCausalLM", "use_alibi", True),
        ("LlamaForCausalLM", "is_causal", False),
        ("LlamaForCausalLM", "use_bidirectional_attention", True),
        ("LlamaForCausalLM", "clip_qkv", 8.0),
        ("LlamaForCausalLM", "qk_layernorm", True),
        ("LlamaForCausalLM", "use_qk_norm", True),
        ("MistralForCausalLM", "num_local_experts", 8),
        ("Qwen3ForCausalLM", "num_experts", 128),
        ("LlamaForCausalLM", "no_rope_layers", [1, 1, 1, 0, 1, 1]),
        ("LlamaForCausalLM", "auto_map", {"AutoModelForCausalLM": "modeling_own.OwnModel"}),
        ("LlamaForCausalLM", "quantization_config", {"quant_method": "fp8"}),
        ("LlamaForCausalLM", "quantization_config", {"bits": 4}),
        ("LlamaForCausalLM", "quantization_config", "int8"),
        ("LlamaForCausalLM", "compression_config", {"quant_method": "compressed-tensors"}),
        ("MistralForCausalLM", "attention_bias", True),
        ("MistralForCausalLM", "mlp_bias", True),
        ("Qwen2ForCausalLM", "mlp_bias", True),
        ("Qwen2ForCausalLM", "layer_types", ["chunked_attention"] * 6),
        ("MistralForCausalLM", "layer_types", ["full_attention"] * 6),
    ],
)
def test_a_field_that_changes_the_computation_is_refused_by_name(
    architecture: str, field: str, value: Any
) -> None:
    with pytest.raises(UnsupportedModelError, match=field):
        parse(architecture, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "swish"),
        ("hidden_act", ...),
        ("partial_rotary_factor", 1.0),
        ("logits_scaling", 1.0),
        ("attn_logit_softcapping", None),
        ("attention_multiplier", None),
        ("use_mrope", False),
        ("num_local_experts", 0),
        ("quantization_config", None),
        ("auto_map", {"AutoTokenizer": "tokenization_own.Own"}),
        ("pretraining_tp", 2),
        ("attention_dropout", 0.1),
        ("rope_scaling", {"rope_type": "default", "partial_rotary_factor": 1.0}),
        ("no_rope_layers", [1, 1, 1, 1, 1, 1]),
    ],
)
def test_a_field_that_changes_nothing_is_accepted(field: str, value: Any) -> None:
    assert parse(**{field: value}) == parse()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 4096.5),
        ("hidden_size", "4096"),
        ("hidden_size", True),
        ("hidden_size", 2**31),
        ("hidden_size", 4095),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 7),
        ("num_hidden_layers", LAYERS_MAX + 1),
        ("head_dim", -64),
        ("head_dim", 63),
        ("vocab_size", ...),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", float("inf")),
        ("rope_theta", 10**400),
        ("rope_theta", -1.0),
        ("tie_word_embeddings", "false"),
        ("attention_bias", 1),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, -1]),
        ("bos_token_id", 1.5),
        ("layer_types", ["full_attention"]),
        ("architectures", "LlamaForCausalLM"),
    ],
)
def test_a_field_of_the_wrong_type_or_size_is_named(field: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=field):
        parse(**{field: value})


def test_an_architecture_of_another_model_type_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'mistral'"):
        parse(model_type="mistral")
