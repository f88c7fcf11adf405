"""What a base-model folder is: where it lies, what its configuration means, which bytes it is.

A model folder is laid out as on the model hub: `config.json`, safetensors weights, `tokenizer.json`
with a chat template in `tokenizer_config.json` or `chat_template.jinja`, and perhaps
`generation_config.json`. `calumma model pull` adds `calumma.json` with the model's name and digest.
Everything here reads files only: no torch, no transformers, so every service may use it.

Two spellings of rotary embeddings are in the wild: `rope_theta` with `rope_scaling`, and one
`rope_parameters` object. Both are read.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, assert_never

DEFAULT_MODEL: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_FILE: Final = "calumma.json"
WEIGHTS_FILE: Final = "model.safetensors"
WEIGHTS_INDEX_FILE: Final = "model.safetensors.index.json"
LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SUPPORTED_ARCHITECTURES: Final = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
JSON_BYTES_MAX: Final = (
    64 * 2**20
)  # the largest JSON file that is read; a real index is under 1 MiB
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_CHUNK_BYTES = 2**22


class BaseModelError(Exception):
    """A base model can't be used; the message says why and what to do."""


class ModelNotFoundError(BaseModelError):
    """There is no folder for this model."""


class ModelIncompleteError(BaseModelError):
    """A file or a field that every model needs is missing or unreadable."""


class UnsupportedModelError(BaseModelError):
    """The model is of a kind that the engine does not compute."""


@dataclass(frozen=True, slots=True)
class LinearRope:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Low frequencies divided by `factor`, high ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


RopeScaling = LinearRope | Llama3Rope


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer of the Llama family.

    `attention_bias`: q, k and v have biases; `output_bias`: o has one; `mlp_bias`: gate, up and
    down have. `qk_norm`: RMSNorm over each head of q and k before rotation. `sliding_window`: how
    many positions each layer attends to, itself included; None means all.
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
    tie_embeddings: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """`digest`: "sha256:<64 hex>" over configuration and weights."""

    name: str
    digest: str


def cache_home() -> Path:
    """The folder for everything that can be fetched or computed again."""
    return Path(os.environ.get("CALUMMA_HOME") or Path.home() / ".cache" / "calumma")


def models_dir(home: Path | None = None) -> Path:
    return (home or cache_home()) / "models"


def is_hub_id(model: str) -> bool:
    return _HUB_ID.fullmatch(model) is not None and ".." not in model


def pulled_folder(model: str, *, home: Path | None = None) -> Path:
    """Where a pulled hub id lies, whether or not it is there. Raises ModelNotFoundError."""
    if not is_hub_id(model):
        raise ModelNotFoundError(f"{model!r} is neither a folder nor a hub id like org/name")
    return models_dir(home) / model.replace("/", "--")


def locate(model: str) -> Path:
    """Folder of a model given as a path or as a hub id. Raises ModelNotFoundError."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    folder = pulled_folder(model)
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"{model} is not in {folder.parent}: fetch it with `calumma model pull {model}`"
        )
    return folder


def load_config(folder: Path) -> ModelConfig:
    """Parse `config.json`. Raises ModelIncompleteError and UnsupportedModelError."""
    raw = _read_json(folder / "config.json")
    architecture = _supported_architecture(raw)
    try:
        return _parse(raw, architecture, _read_generation(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelIncompleteError(f"{folder / 'config.json'}: bad or missing {error}") from error


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files, in order of name. Raises ModelIncompleteError."""
    index = folder / WEIGHTS_INDEX_FILE
    if not index.is_file():
        return (_present(folder / WEIGHTS_FILE),)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelIncompleteError(f"{index} has no weight_map")
    # `Path.name` keeps a crafted index inside the folder.
    return tuple(_present(folder / Path(str(n)).name) for n in sorted(set(weight_map.values())))


def check_folder(folder: Path) -> ModelConfig:
    """Configuration of a folder that has all a worker needs. Raises as its parts do."""
    config = load_config(folder)
    weight_files(folder)
    _present(folder / "tokenizer.json")
    return config


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """`(in_features, out_features)` of each linear of a layer that an adapter may target."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    return {
        "q_proj": (hidden, q_width),
        "k_proj": (hidden, kv_width),
        "v_proj": (hidden, kv_width),
        "o_proj": (q_width, hidden),
        "gate_proj": (hidden, ffn),
        "up_proj": (hidden, ffn),
        "down_proj": (ffn, hidden),
    }


def outer_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """`(in_features, out_features)` of embedding and output head, which an adapter may target too.

    A tied head is a module of its own: an adapter of one of the two does not change the other.
    """
    return {
        "embed_tokens": (config.vocab_size, config.hidden_size),
        "lm_head": (config.hidden_size, config.vocab_size),
    }


def model_identity(folder: Path) -> ModelIdentity:
    """Name and digest: as written at pull, else computed once and remembered in the cache home."""
    written = folder / MODEL_FILE
    if written.is_file():
        fields = _read_json(written)
        if isinstance(fields.get("name"), str) and isinstance(fields.get("digest"), str):
            return ModelIdentity(fields["name"], fields["digest"])
    files = _identity_files(folder)
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    remembered = cache_home() / "identities" / f"{key}.json"
    if remembered.is_file():
        with suppress(ModelIncompleteError):
            fields = _read_json(remembered)
            if fields.get("stamp") == stamp:
                return ModelIdentity(folder.name, str(fields["digest"]))
    digest = folder_digest(folder)
    # A read-only cache home costs time at the next start and nothing else.
    with suppress(OSError):
        write_json(remembered, {"path": str(folder.resolve()), "stamp": stamp, "digest": digest})
    return ModelIdentity(folder.name, digest)


def folder_digest(folder: Path) -> str:
    """sha256 over `config.json` and the weights: name, size and bytes of each file."""
    total = hashlib.sha256()
    for file in _identity_files(folder):
        total.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                total.update(chunk)
    return f"sha256:{total.hexdigest()}"


def write_json(path: Path, fields: Mapping[str, object]) -> None:
    """Replace a JSON file at once, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _identity_files(folder: Path) -> tuple[Path, ...]:
    return (_present(folder / "config.json"), *weight_files(folder))


def _present(path: Path) -> Path:
    if not path.is_file():
        raise ModelIncompleteError(f"{path} is missing")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    if _present(path).stat().st_size > JSON_BYTES_MAX:
        raise ModelIncompleteError(f"{path} is larger than {JSON_BYTES_MAX} bytes")
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelIncompleteError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ModelIncompleteError(f"{path} is not a JSON object")
    return fields


def _read_generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return _read_json(path) if path.is_file() else {}


def _supported_architecture(raw: Mapping[str, Any]) -> str:
    named = raw.get("architectures") or [f"model_type {raw.get('model_type')!r}"]
    architecture = str(named[0])
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModelError(
            f"{architecture} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unnamed")
        raise UnsupportedModelError(f"checkpoints quantised with {method} are not supported")
    if (activation := raw.get("hidden_act", "silu")) != "silu":
        raise UnsupportedModelError(f"hidden_act {activation!r} is not supported")
    return architecture


def _parse(raw: Mapping[str, Any], architecture: str, generation: Mapping[str, Any]) -> ModelConfig:
    heads = _positive(raw, "num_attention_heads")
    hidden = _positive(raw, "hidden_size")
    attention_bias, output_bias = _attention_biases(raw, architecture)
    rope_theta, rope_scaling = _rope(raw)
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    bos = generation.get("bos_token_id", raw.get("bos_token_id"))
    return ModelConfig(
        architecture=architecture,
        model_type=str(raw["model_type"]),
        hidden_size=hidden,
        intermediate_size=_positive(raw, "intermediate_size"),
        num_layers=_positive(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        vocab_size=_positive(raw, "vocab_size"),
        max_positions=_positive(raw, "max_position_embeddings"),
        rms_norm_eps=float(raw["rms_norm_eps"]),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=attention_bias,
        output_bias=output_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_sliding_window(raw, architecture),
        eos_token_ids=_token_ids(eos),
        bos_token_id=None if bos is None else int(bos),
    )


def _positive(raw: Mapping[str, Any], field: str) -> int:
    value = int(raw[field])
    if value < 1:
        raise ValueError(f"{field} {value}")
    return value


def _attention_biases(raw: Mapping[str, Any], architecture: str) -> tuple[bool, bool]:
    """(q/k/v, o). Qwen2 always has the first and never the second; its config says neither."""
    if architecture == "Qwen2ForCausalLM":
        return True, False
    bias = bool(raw.get("attention_bias", False))
    return bias, bias


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRope(float(rope["factor"]))
    if kind == "llama3":
        return theta, Llama3Rope(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_positions=int(rope["original_max_position_embeddings"]),
        )
    raise UnsupportedModelError(f"rope type {kind!r} is not supported")


def _sliding_window(raw: Mapping[str, Any], architecture: str) -> int | None:
    """Mistral's window holds in every layer; Qwen's is off unless a flag puts it on in some."""
    if architecture.startswith("Qwen"):
        if raw.get("use_sliding_window"):
            raise UnsupportedModelError("use_sliding_window in some layers only is not supported")
        return None
    if architecture != "MistralForCausalLM":
        return None
    window = raw.get("sliding_window")
    return None if window is None else int(window)


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    match value:
        case None:
            return ()
        case int():
            return (value,)
        case list():
            return tuple(int(item) for item in value)
        case _:
            assert_never(value)
