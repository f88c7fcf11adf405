"""What a base model's `config.json` means for the computation.

A field that would change the computation into one that the engine does not do is refused by name,
whatever the architecture: a wrong answer is worse than none. What is absent has the default of its
architecture in the reference implementation (transformers); they differ from one to another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from services.common.model_errors import UnsupportedModelError
from services.common.model_fields import flag, number, size, token_id, token_ids
from services.common.model_rope import RopeScaling, YarnRope, parse_rope

LAYERS_MAX: Final = 1024
_THETA: Final = 10_000.0
_FULL: Final = "full_attention"
_SLIDING: Final = "sliding_attention"


@dataclass(frozen=True, slots=True)
class _Family:
    """`defaults`: of fields that are absent; a null in the file is a null."""

    model_type: str
    rope_theta: float = _THETA
    has_bias_fields: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()


_FAMILIES: Final[Mapping[str, _Family]] = {
    "LlamaForCausalLM": _Family("llama", has_bias_fields=True),
    "MistralForCausalLM": _Family(
        "mistral", defaults=(("num_key_value_heads", 8), ("sliding_window", 4096))
    ),
    "Qwen2ForCausalLM": _Family(
        "qwen2",
        defaults=(("num_key_value_heads", 32), ("sliding_window", 4096), ("max_window_layers", 28)),
    ),
    "Qwen3ForCausalLM": _Family(
        "qwen3",
        has_bias_fields=True,
        defaults=(
            ("num_key_value_heads", 32),
            ("head_dim", 128),
            ("sliding_window", 4096),
            ("max_window_layers", 28),
        ),
    ),
    "SmolLM3ForCausalLM": _Family(
        "smollm3",
        rope_theta=2_000_000.0,
        has_bias_fields=True,
        defaults=(
            ("num_key_value_heads", 4),
            ("no_rope_layer_interval", 4),
            ("tie_word_embeddings", True),
        ),
    ),
}
SUPPORTED_ARCHITECTURES: Final = tuple(_FAMILIES)

# Fields of other architectures (Gemma, Granite, Cohere, MiniCPM, Llama 4, mixtures of experts, ...)
# and the values with which they change nothing. Null never does.
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rotary_emb_fraction": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "mup_width_multiplier": (1,),
    "attn_temperature_tuning": (False, 0),
    "attention_chunk_size": (),
    "attn_sink": (False,),
    "use_alibi": (False,),
    "alibi": (False,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_parallel_residual": (False,),
    "add_cross_attention": (False,),
    "clip_qkv": (),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "n_routed_experts": (0, 1),
    "cross_layer_attention": (False,),
    "num_nextn_predict_layers": (0,),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer of the Llama family.

    `attention_bias`: q, k and v have biases; `output_bias`: o has one; `mlp_bias`: gate, up and
    down have. `qk_norm`: RMSNorm over each head of q and k before rotation. `rotates`: for each
    layer, whether q and k are rotated by their positions. `sliding_window`: how many positions some
    layers attend to, itself included, so that contexts up to it are as without; None means all.
    """

    architecture: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    rotates: tuple[bool, ...]
    tie_embeddings: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def context_tokens_max(self) -> int:
        """The longest context for which attending to everything is what the model does."""
        return min(self.max_positions, self.sliding_window or self.max_positions)


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """The fields of `config.json`, and those of `generation_config.json` or none.

    Raises UnsupportedModelError, and KeyError, TypeError or ValueError that name the field.
    """
    architecture = _architecture(raw)
    family = _FAMILIES[architecture]
    _check_neutral(raw, family)
    return _config(dict(family.defaults) | dict(raw), architecture, generation)


def _architecture(raw: Mapping[str, Any]) -> str:
    model_type = raw.get("model_type")
    named = raw.get("architectures") or [f"model_type {model_type!r}"]
    if not isinstance(named, list):
        raise TypeError(f"architectures: {named!r} is no list")
    architecture = str(named[0])
    if architecture not in _FAMILIES:
        raise UnsupportedModelError(
            f"{architecture} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    if model_type != _FAMILIES[architecture].model_type:
        raise UnsupportedModelError(f"{architecture} of model_type {model_type!r} is not supported")
    return architecture


def _check_neutral(raw: Mapping[str, Any], family: _Family) -> None:
    """Raise UnsupportedModelError for what the engine would compute otherwise, or not at all."""
    for field in ("quantization_config", "compression_config"):
        if quantization := raw.get(field):
            named = quantization.get("quant_method") if isinstance(quantization, dict) else None
            method = named or "a method without name"
            raise UnsupportedModelError(
                f"{field}: checkpoints quantised with {method} are not supported"
            )
    if "AutoModelForCausalLM" in (raw.get("auto_map") or {}):
        raise UnsupportedModelError("auto_map: a model with code of its own is not supported")
    neutral = _NEUTRAL if family.has_bias_fields else _NEUTRAL | {"mlp_bias": (False,)}
    if family.model_type == "mistral":
        neutral = neutral | {"attention_bias": (False,)}
    if family.model_type != "smollm3" and not all(raw.get("no_rope_layers") or ()):
        raise UnsupportedModelError(f"no_rope_layers in a {family.model_type} is not supported")
    for field, values in neutral.items():
        value = raw.get(field)
        if value is not None and value not in values:
            raise UnsupportedModelError(f"{field} {value!r} is not supported")


def _config(
    raw: Mapping[str, Any], architecture: str, generation: Mapping[str, Any]
) -> ModelConfig:
    family = _FAMILIES[architecture]
    heads, hidden = size(raw, "num_attention_heads"), size(raw, "hidden_size")
    kv_heads = size(raw, "num_key_value_heads", default=heads)
    attention_bias, output_bias = _attention_biases(raw, architecture)
    rope_theta, rope_scaling = parse_rope(raw, theta=family.rope_theta)
    num_layers = _num_layers(raw)
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads: {kv_heads} does not divide {heads} heads")
    bos = generation.get("bos_token_id", raw.get("bos_token_id"))
    return ModelConfig(
        architecture=architecture,
        model_type=family.model_type,
        hidden_size=hidden,
        intermediate_size=size(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(raw, hidden=hidden, heads=heads),
        vocab_size=size(raw, "vocab_size"),
        max_positions=_max_positions(raw, rope_scaling),
        rms_norm_eps=number(raw, "rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rotates=_rotates(raw, architecture, num_layers),
        tie_embeddings=flag(raw, "tie_word_embeddings"),
        attention_bias=attention_bias,
        output_bias=output_bias,
        mlp_bias=flag(raw, "mlp_bias"),
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_sliding_window(raw, architecture, num_layers),
        eos_token_ids=token_ids(
            generation.get("eos_token_id", raw.get("eos_token_id")), "eos_token_id"
        ),
        bos_token_id=None if bos is None else token_id(bos, "bos_token_id"),
    )


def _num_layers(raw: Mapping[str, Any]) -> int:
    num_layers = size(raw, "num_hidden_layers")
    if num_layers > LAYERS_MAX:
        raise ValueError(f"num_hidden_layers: {num_layers} is above {LAYERS_MAX}")
    return num_layers


def _head_dim(raw: Mapping[str, Any], *, hidden: int, heads: int) -> int:
    if raw.get("head_dim") is None and hidden % heads:
        raise ValueError(f"hidden_size: {heads} heads do not divide {hidden}")
    head_dim = size(raw, "head_dim", default=hidden // heads)
    if head_dim % 2:
        raise ValueError(f"head_dim: {head_dim} is odd, rotation goes by halves")
    return head_dim


def _max_positions(raw: Mapping[str, Any], rope: RopeScaling | None) -> int:
    """As given; with YaRN at least what it stretches, which many a configuration leaves out."""
    positions = size(raw, "max_position_embeddings")
    if isinstance(rope, YarnRope):
        return max(positions, int(rope.original_max_positions * rope.factor))
    return positions


def _attention_biases(raw: Mapping[str, Any], architecture: str) -> tuple[bool, bool]:
    """(q/k/v, o). Qwen2 always has the first and never the second, whatever its config says."""
    if architecture == "Qwen2ForCausalLM":
        return True, False
    bias = flag(raw, "attention_bias")
    return bias, bias


def _rotates(raw: Mapping[str, Any], architecture: str, num_layers: int) -> tuple[bool, ...]:
    """In spite of its name, a 1 in SmolLM3's list is a layer with rotation.

    Without the list each layer whose number is a multiple of the interval goes without. All layers
    of other architectures rotate.
    """
    if architecture != "SmolLM3ForCausalLM":
        return (True,) * num_layers
    listed = raw.get("no_rope_layers")
    if listed is None:
        interval = size(raw, "no_rope_layer_interval")
        return tuple((index + 1) % interval != 0 for index in range(num_layers))
    if (
        not isinstance(listed, list)
        or len(listed) < num_layers
        or any(item not in (0, 1) for item in listed)
    ):
        raise ValueError("no_rope_layers: it is no list of a 0 or 1 for each layer")
    return tuple(bool(item) for item in listed[:num_layers])


def _sliding_window(raw: Mapping[str, Any], architecture: str, num_layers: int) -> int | None:
    """Mistral's window holds in every layer, others' in those that flags or a list name."""
    kinds = raw.get("layer_types")
    if kinds is not None:
        _check_layer_types(kinds, num_layers)
    if architecture == "MistralForCausalLM":
        is_sliding = raw.get("sliding_window") is not None
        expected = _SLIDING if is_sliding else _FULL
        if kinds is not None and set(kinds) != {expected}:
            raise UnsupportedModelError("layer_types that differ from Mistral's are not supported")
        return size(raw, "sliding_window") if is_sliding else None
    if kinds is not None:
        return size(raw, "sliding_window") if _SLIDING in kinds else None
    if not flag(raw, "use_sliding_window") or raw.get("sliding_window") is None:
        return None
    if architecture.startswith("Qwen"):
        has_sliding = int(raw["max_window_layers"]) < num_layers
    else:
        has_sliding = not all(_rotates(raw, architecture, num_layers))
    return size(raw, "sliding_window") if has_sliding else None


def _check_layer_types(kinds: object, num_layers: int) -> None:
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ValueError("layer_types: it does not name each layer")
    for kind in kinds:
        if kind not in (_FULL, _SLIDING):
            raise UnsupportedModelError(f"layer_types with {kind!r} is not supported")
