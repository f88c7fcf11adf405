"""From the two files of a PEFT folder to the worker-ready blob, or to the reason why not.

Fail-closed: every tensor must belong to a module that the config targets, every targeted module
must have both its tensors, and all shapes must be the base model's. So an adapter that was accepted
does what it did in training; "loaded, and without effect" can't happen. Nothing is unpickled, and
weights keep their published bits.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from services.adapter_store.entries import Weights
from services.adapter_store.peft_config import FILE as CONFIG_FILE
from services.adapter_store.peft_config import LoraConfig, parse_config
from services.adapter_store.refusals import invalid, mismatch, shown, unsupported
from services.adapter_store.safetensors_file import (
    FILE as WEIGHTS_FILE,
)
from services.adapter_store.safetensors_file import (
    Tensor,
    bits_of,
    is_finite,
    is_zero,
    parse_tensors,
)
from services.common.adapter_container import LoraRows, digest_of, encode
from services.common.base_model import LINEARS, ModelConfig, is_hub_id, linear_shapes

_PREFIX: Final = "base_model.model."
_ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
_SUFFIX = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight", re.DOTALL)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What adapters are checked against. `names`: hub ids that an adapter may name; none: any."""

    config: ModelConfig
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Module:
    """A linear of the base model."""

    layer: int
    name: str
    path: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BoundModule:
    """A linear with the tensors that an adapter has for it."""

    module: Module
    rank: int
    scale: float
    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class Converted:
    """A checked adapter: what the registry records, how it was bound, and the blob."""

    weights: Weights
    bindings: tuple[BoundModule, ...]
    blob: bytes


def convert(config_json: bytes, data: memoryview, base: BaseModel, *, rank_max: int) -> Converted:
    """Check and convert an adapter.

    Raises ADAPTER_INVALID, ADAPTER_UNSUPPORTED or ADAPTER_BASE_MISMATCH, with the field or tensor.
    """
    config = parse_config(config_json, rank_max=rank_max)
    _check_base(config.base_model, base)
    tensors = parse_tensors(data)
    dtype = _common_dtype(tensors)
    bindings = tuple(_bind(config, tensors, base.config))
    _check_values(bindings, data)
    blob = encode((_rows(bound, data) for bound in bindings), dtype=dtype)
    weights = Weights(
        digest=digest_of(blob),
        rank=max(bound.rank for bound in bindings),
        size_bytes=len(blob),
        target_modules=tuple(sorted({bound.module.name for bound in bindings})),
        dtype=dtype,
        base_model=config.base_model,
        parameters=sum(math.prod(t.shape) for bound in bindings for t in (bound.a, bound.b)),
    )
    return Converted(weights, bindings, blob)


def _check_base(named: str, base: BaseModel) -> None:
    """A path says nothing of the model, so only a hub id is held against the adapter."""
    if not is_hub_id(named) or not base.names:
        return
    if named.casefold() not in {name.casefold() for name in base.names}:
        raise mismatch(
            f"the adapter was trained on {shown(named)}; served here is {base.names[0]}",
            field="base_model_name_or_path",
        )


def _common_dtype(tensors: Mapping[str, Tensor]) -> str:
    dtypes = sorted({tensor.dtype for tensor in tensors.values()})
    if not dtypes:
        raise invalid(f"{WEIGHTS_FILE}: no tensors", field=WEIGHTS_FILE)
    if len(dtypes) > 1:
        raise unsupported(
            f"{WEIGHTS_FILE}: tensors of different dtypes ({', '.join(dtypes)})", field=WEIGHTS_FILE
        )
    return dtypes[0]


def _bind(
    config: LoraConfig, tensors: Mapping[str, Tensor], model: ModelConfig
) -> Iterator[BoundModule]:
    """Modules in the blob's order: by layer, then q, k, v, o, gate, up, down."""
    modules = {module.path: module for module in _modules(model)}
    targeted = [module for module in modules.values() if config.targets.include(module.path)]
    targeted_paths = {module.path for module in targeted}
    for name in tensors:
        _check_tensor(name, modules, targeted_paths)
    if not targeted:
        raise mismatch("target_modules: the base model has none of them", field="target_modules")
    for module in targeted:
        rank = config.rank_of(module.path)
        yield BoundModule(
            module,
            rank,
            config.scale_of(module.path),
            _tensor(tensors, module, side="A", wanted=(rank, module.in_features)),
            _tensor(tensors, module, side="B", wanted=(module.out_features, rank)),
        )


def _modules(model: ModelConfig) -> Iterator[Module]:
    shapes = linear_shapes(model)
    for layer in range(model.num_layers):
        for name in LINEARS:
            block = "self_attn" if name in _ATTENTION else "mlp"
            yield Module(layer, name, f"model.layers.{layer}.{block}.{name}", *shapes[name])


def _check_tensor(name: str, modules: Mapping[str, Module], targeted: set[str]) -> None:
    """Every tensor must be one that `_tensor` reads."""
    match = _SUFFIX.fullmatch(name)
    if match is None or not name.startswith(_PREFIX):
        raise unsupported(
            f"tensor {shown(name)} is no lora_A.weight or lora_B.weight below {_PREFIX}",
            field=shown(name),
        )
    path = match["path"].removeprefix(_PREFIX)
    if path not in modules:
        if re.fullmatch(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+", path):
            raise mismatch(f"the base model has no {shown(path)}", field=shown(name))
        raise unsupported(f"LoRA on {shown(path)} is not served", field=shown(name))
    if path not in targeted:
        raise invalid(
            f"tensor {shown(name)} is of a module that {CONFIG_FILE} does not target",
            field=shown(name),
        )


def _tensor(
    tensors: Mapping[str, Tensor], module: Module, *, side: str, wanted: tuple[int, int]
) -> Tensor:
    name = f"{_PREFIX}{module.path}.lora_{side}.weight"
    tensor = tensors.get(name)
    if tensor is None:
        raise invalid(f"tensor {name} is missing", field=name)
    if tensor.shape == wanted:
        return tensor
    message = f"{module.path}: lora_{side} is {shown(list(tensor.shape))}, needed is {list(wanted)}"
    features = 1 if side == "A" else 0
    if len(tensor.shape) == 2 and tensor.shape[features] == wanted[features]:
        raise invalid(f"{message}: the rank is not the config's", field=name)
    raise mismatch(f"{message} by the base model", field=name)


def _check_values(bindings: tuple[BoundModule, ...], data: memoryview) -> None:
    has_effect = False
    for bound in bindings:
        sides = [(tensor, bits_of(data, tensor)) for tensor in (bound.a, bound.b)]
        for tensor, bits in sides:
            if not is_finite(bits, tensor.dtype):
                raise invalid(f"tensor {tensor.name} has infinite or NaN values", field=tensor.name)
        has_effect |= not any(is_zero(bits, tensor.dtype) for tensor, bits in sides)
    if not has_effect:
        raise invalid(
            f"{WEIGHTS_FILE}: every product B·A is zero, so the adapter has no effect",
            field=WEIGHTS_FILE,
        )


def _rows(bound: BoundModule, data: memoryview) -> LoraRows:
    return LoraRows(
        layer=bound.module.layer,
        module=bound.module.name,
        rank=bound.rank,
        scale=bound.scale,
        in_features=bound.module.in_features,
        out_features=bound.module.out_features,
        a_rows=bits_of(data, bound.a).tobytes(),
        bt_rows=np.ascontiguousarray(bits_of(data, bound.b).T).tobytes(),
    )
