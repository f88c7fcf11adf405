"""What a base-model folder is: where it lies, what its configuration means, which bytes it is.

A model folder is laid out as on the model hub: `config.json`, safetensors weights, `tokenizer.json`
with a chat template in `tokenizer_config.json` or `chat_template.jinja`, and perhaps
`generation_config.json`. `calumma model pull` adds `calumma.json` with the model's name and digest.
Everything here reads files only: no torch, no transformers, so every service may use it.

Its parts: `model_config` (the fields of `config.json`), `model_rope` (its rotary embeddings) and
`model_errors`; what others need of them is here, too. `model_tensors` looks into the weights.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.common.model_config import SUPPORTED_ARCHITECTURES, ModelConfig, parse_config
from services.common.model_errors import (
    BaseModelError,
    ContextTooLongError,
    ModelIncompleteError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from services.common.model_rope import LinearRope, Llama3Rope, RopeScaling, YarnRope

__all__ = [
    "DEFAULT_MODEL",
    "JSON_BYTES_MAX",
    "LINEARS",
    "MODEL_FILE",
    "SUPPORTED_ARCHITECTURES",
    "WEIGHTS_FILE",
    "WEIGHTS_INDEX_FILE",
    "BaseModelError",
    "ContextTooLongError",
    "LinearRope",
    "Llama3Rope",
    "ModelConfig",
    "ModelIdentity",
    "ModelIncompleteError",
    "ModelNotFoundError",
    "RopeScaling",
    "UnsupportedModelError",
    "YarnRope",
    "cache_home",
    "check_folder",
    "folder_digest",
    "is_hub_id",
    "linear_shapes",
    "load_config",
    "locate",
    "model_identity",
    "models_dir",
    "outer_shapes",
    "pulled_folder",
    "read_json",
    "weight_files",
    "write_json",
]

DEFAULT_MODEL: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_FILE: Final = "calumma.json"
WEIGHTS_FILE: Final = "model.safetensors"
WEIGHTS_INDEX_FILE: Final = "model.safetensors.index.json"
LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
JSON_BYTES_MAX: Final = (
    64 * 2**20
)  # the largest JSON file that is read; a real index is under 1 MiB
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_CHUNK_BYTES = 2**22


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
    raw = read_json(folder / "config.json")
    try:
        return parse_config(raw, _read_generation(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelIncompleteError(f"{folder / 'config.json'}: bad or missing {error}") from error


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files, in order of name. Raises ModelIncompleteError."""
    index = folder / WEIGHTS_INDEX_FILE
    if not index.is_file():
        return (_present(folder / WEIGHTS_FILE),)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelIncompleteError(f"{index} has no weight_map")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelIncompleteError(f"{index}: its weight_map has a value that names no file")
    # `Path.name` keeps a crafted index inside the folder.
    return tuple(_present(folder / Path(name).name) for name in sorted(set(weight_map.values())))


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
        fields = read_json(written)
        if isinstance(fields.get("name"), str) and isinstance(fields.get("digest"), str):
            return ModelIdentity(fields["name"], fields["digest"])
    files = _identity_files(folder)
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    remembered = cache_home() / "identities" / f"{key}.json"
    if remembered.is_file():
        with suppress(ModelIncompleteError):
            fields = read_json(remembered)
            if fields.get("stamp") == stamp:
                return ModelIdentity(folder.name, str(fields["digest"]))
    digest = folder_digest(folder)
    # A read-only cache home costs time at the next start and nothing else.
    with suppress(OSError):
        write_json(remembered, {"path": str(folder.resolve()), "stamp": stamp, "digest": digest})
    return ModelIdentity(folder.name, digest)


def folder_digest(folder: Path) -> str:
    """sha256 over `config.json` and the weights: name, size and bytes of each file.

    Raises ModelIncompleteError.
    """
    total = hashlib.sha256()
    for file in _identity_files(folder):
        try:
            total.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    total.update(chunk)
        except OSError as error:
            raise ModelIncompleteError(f"{file} cannot be read: {error}") from error
    return f"sha256:{total.hexdigest()}"


def read_json(path: Path) -> dict[str, Any]:
    """An object in a file. Raises ModelIncompleteError."""
    if _present(path).stat().st_size > JSON_BYTES_MAX:
        raise ModelIncompleteError(f"{path} is larger than {JSON_BYTES_MAX} bytes")
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelIncompleteError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelIncompleteError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ModelIncompleteError(f"{path} is not a JSON object")
    return fields


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


def _read_generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}
