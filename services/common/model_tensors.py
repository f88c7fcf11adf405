"""Which tensors a base model has, in which files, and whether they are those of its configuration.

Only the headers of the safetensors files are read. What would fail later, or worse, would not fail,
is said here by name: files cut short, an index that contradicts its files, tensors that are
missing, of another shape, of a type that the engine does not read, or that no model of this
configuration has: those belong to another architecture, whatever the configuration says.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.common.base_model import (
    LINEARS,
    WEIGHTS_INDEX_FILE,
    linear_shapes,
    read_json,
    weight_files,
)
from services.common.model_config import ModelConfig
from services.common.model_errors import ModelIncompleteError, UnsupportedModelError

EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
FINAL_NORM: Final = "model.norm.weight"
DTYPE_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}
HEADER_BYTES_MAX: Final = 100 * 10**6  # that of the format's own reader
_LENGTH_BYTES: Final = 8
# Old checkpoints have the frequencies of the rotation, which follow from the configuration.
_DERIVED: Final = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_NAMES_MAX: Final = 3  # in a message
# What reading a header may raise that is not one: wrong types, too few or too large numbers, depth.
_MALFORMED: Final = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """`dtype`: as safetensors spells it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def checked_tensors(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """The model's tensors by name, and the head of a model whose head is tied, if there is one.

    Raises ModelIncompleteError and UnsupportedModelError.
    """
    stored = _stored_tensors(folder)
    _check_index(folder, stored)
    expected = dict(expected_tensors(config))
    _check_names(stored, expected, config)
    for name, shape in expected.items():
        _check_tensor(name, stored[name], shape)
    tied_head = {HEAD: stored[HEAD]} if HEAD in stored else {}
    if tied_head:
        _check_tensor(HEAD, stored[HEAD], expected[EMBEDDING])
    return {name: stored[name] for name in expected} | tied_head


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor that a model of this configuration has."""
    yield EMBEDDING, (config.vocab_size, config.hidden_size)
    for index in range(config.num_layers):
        yield from _layer_tensors(config, f"model.layers.{index}")
    yield FINAL_NORM, (config.hidden_size,)
    if not config.tie_embeddings:
        yield HEAD, (config.vocab_size, config.hidden_size)


def _layer_tensors(config: ModelConfig, at: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    attention_biases = {"o_proj": config.output_bias}
    shapes = linear_shapes(config)
    for name in LINEARS:
        is_mlp = name in ("gate_proj", "up_proj", "down_proj")
        part = "mlp" if is_mlp else "self_attn"
        in_features, out_features = shapes[name]
        yield f"{at}.{part}.{name}.weight", (out_features, in_features)
        if config.mlp_bias if is_mlp else attention_biases.get(name, config.attention_bias):
            yield f"{at}.{part}.{name}.bias", (out_features,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{at}.{name}.weight", (config.hidden_size,)
    if config.qk_norm:
        yield f"{at}.self_attn.q_norm.weight", (config.head_dim,)
        yield f"{at}.self_attn.k_norm.weight", (config.head_dim,)


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            tensors = _read_header(path)
        except OSError as error:
            raise ModelIncompleteError(f"{path} cannot be read: {error}") from error
        except _MALFORMED as error:
            raise ModelIncompleteError(f"{path} is not a safetensors file: {error}") from error
        for name, tensor in tensors.items():
            if name in stored:
                files = f"{stored[name].path.name} and {path.name}"
                raise ModelIncompleteError(f"{folder} has {name} twice, in {files}")
            stored[name] = tensor
    return stored


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Raises ModelIncompleteError for a file cut short, and what a malformed header causes."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if header_bytes > HEADER_BYTES_MAX:
            raise ValueError(f"a header of {header_bytes} bytes")
        if file_bytes < _LENGTH_BYTES + header_bytes:
            raise ModelIncompleteError(f"{path} is cut short: {file_bytes} bytes, in its header")
        header: dict[str, Any] = json.loads(file.read(header_bytes))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    data_bytes = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    needed_bytes = _LENGTH_BYTES + header_bytes + data_bytes
    if file_bytes < needed_bytes:
        raise ModelIncompleteError(f"{path} is cut short: {file_bytes} of {needed_bytes} bytes")
    return {name: _stored_tensor(path, name, entry) for name, entry in entries.items()}


def _stored_tensor(path: Path, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
    start, end = (int(offset) for offset in entry["data_offsets"])
    item_bytes = DTYPE_BYTES.get(dtype)
    if start < 0 or (item_bytes and end - start != math.prod(shape) * item_bytes):
        raise ValueError(f"{name} of {dtype} {shape} is at bytes {start} to {end}")
    return StoredTensor(path, dtype, shape)


def _check_index(folder: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Each tensor that an index names must be where it says."""
    index = folder / WEIGHTS_INDEX_FILE
    if not index.is_file():
        return
    for name, file in read_json(index)["weight_map"].items():
        if name not in stored:
            raise ModelIncompleteError(f"{index} has {name} in {file}, which lacks it")
        if stored[name].path.name != Path(str(file)).name:
            raise ModelIncompleteError(
                f"{index} has {name} in {file}, but it is in {stored[name].path.name}"
            )


def _check_names(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
) -> None:
    if missing := [name for name in expected if name not in stored]:
        raise ModelIncompleteError(f"the weights lack {_some(missing)}")
    unknown = sorted(
        name
        for name in stored
        if name not in expected and name != HEAD and not _DERIVED.fullmatch(name)
    )
    if unknown:
        raise UnsupportedModelError(
            f"the weights have {_some(unknown)}, which {config.architecture} of this configuration "
            "does not have"
        )


def _check_tensor(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in DTYPE_BYTES:
        raise UnsupportedModelError(
            f"{name} in {tensor.path.name} is of type {tensor.dtype}; supported: "
            + ", ".join(DTYPE_BYTES)
        )
    if tensor.shape != shape:
        raise ModelIncompleteError(
            f"{name} in {tensor.path.name} is {tensor.shape}, expected {shape}"
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_MAX])
    more = len(names) - _NAMES_MAX
    return f"{shown} and {more} more" if more > 0 else shown
