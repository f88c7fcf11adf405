"""From the two files of a PEFT folder to the worker-ready blob, or to the reason why not.

Fail-closed: every tensor must belong to a module that the config targets, every targeted module
must have both its tensors, and all shapes must be the base model's. So an adapter that was accepted
does what it did in training; "loaded, and without effect" can't happen. Nothing is unpickled, and
weights keep their published bits.

The base model's own embedding and head, which PEFT writes next to an adapter of one of them, are
left out when they are those of the served model, and refused when they are not.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from services.adapter_store.base_tensors import BaseTensors
from services.adapter_store.entries import Weights
from services.adapter_store.modules import EMBEDDING_PATH, PREFIX, Module, Side, modules_of
from services.adapter_store.peft_config import FILE as CONFIG_FILE
from services.adapter_store.peft_config import LoraConfig, parse_config
from services.adapter_store.refusals import invalid, mismatch, shown, unsupported
from services.adapter_store.safetensors_file import (
    FILE as WEIGHTS_FILE,
)
from services.adapter_store.safetensors_file import (
    Tensor,
    bits_of,
    largest,
    parse_tensors,
)
from services.common.adapter_container import HEAD, LoraRows, digest_of, encode
from services.common.base_model import BaseModelError, ModelConfig, is_hub_id
from services.common.errors import RpcError

_BROUGHT_ALONG = re.compile(
    rf"{re.escape(PREFIX)}(?P<path>{re.escape(EMBEDDING_PATH)}|{HEAD})(\.base_layer)?\.weight"
)
_LORA_NAME = re.compile(
    rf"{re.escape(PREFIX)}(?P<path>.+)\.lora_(embedding_[AB]|[AB]\.weight)", re.DOTALL
)
_LINEAR_PATH = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+", re.ASCII)
_SIDES: Final[tuple[Side, ...]] = ("A", "B")
_SMALLEST: Final = float(np.finfo(np.float32).tiny)
_LARGEST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What adapters are checked against. `names`: hub ids that an adapter may name; none: any."""

    config: ModelConfig
    names: tuple[str, ...]
    tensors: BaseTensors | None = None


@dataclass(frozen=True, slots=True)
class BoundModule:
    """A module with the tensors that an adapter has for it."""

    module: Module
    rank: int
    scale: float
    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class Converted:
    """A checked adapter: what the registry records, how it was bound, and the blob.

    `peft_version`: as the config has it, "" when it has none.
    """

    weights: Weights
    bindings: tuple[BoundModule, ...]
    blob: bytes
    peft_version: str


def convert(config_json: bytes, data: memoryview, base: BaseModel, *, rank_max: int) -> Converted:
    """Check and convert an adapter.

    Raises ADAPTER_INVALID, ADAPTER_UNSUPPORTED or ADAPTER_BASE_MISMATCH, with the field or tensor.
    """
    config = parse_config(config_json, rank_max=rank_max)
    _check_base(config.base_model, base)
    tensors = _without_base(parse_tensors(data), data, base)
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
    return Converted(weights, bindings, blob, config.peft_version)


def _check_base(named: str, base: BaseModel) -> None:
    """A path says nothing of the model, so only a hub id is held against the adapter."""
    if not is_hub_id(named) or not base.names:
        return
    if named.casefold() not in {name.casefold() for name in base.names}:
        raise mismatch(
            f"the adapter was trained on {shown(named)}; served here is {base.names[0]}",
            field="base_model_name_or_path",
        )


def _without_base(
    tensors: Mapping[str, Tensor], data: memoryview, base: BaseModel
) -> dict[str, Tensor]:
    """The adapter's own tensors. Raises when another is not the base model's."""
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _BROUGHT_ALONG.fullmatch(name)
        if match is None:
            own[name] = tensor
        elif not _is_of_base(match["path"], tensor, data, base):
            raise unsupported(
                f"tensor {name} is not that of the served base model; if it was not trained, save "
                "the adapter with save_embedding_layers=False",
                field=name,
            )
    return own


def _is_of_base(path: str, tensor: Tensor, data: memoryview, base: BaseModel) -> bool:
    if base.tensors is None or tensor.shape != (base.config.vocab_size, base.config.hidden_size):
        return False
    is_embedding = path == EMBEDDING_PATH or base.config.tie_embeddings
    name = f"{EMBEDDING_PATH if is_embedding else HEAD}.weight"
    try:
        return base.tensors.has_values(name, bits_of(data, tensor), tensor.dtype)
    except (BaseModelError, OSError):  # nothing to hold it against
        return False


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
    """Modules in the blob's order."""
    modules = tuple(modules_of(model))
    targeted = [module for module in modules if config.targets.include(module.path)]
    _check_names(tensors, modules, {module.path for module in targeted})
    if not targeted:
        raise mismatch("target_modules: the base model has none of them", field="target_modules")
    for module in targeted:
        rank = config.rank_of(module.path)
        yield BoundModule(
            module,
            rank,
            config.scale_of(module.path, rank=rank),
            _tensor(tensors, module, side="A", wanted=(rank, module.in_features)),
            _tensor(tensors, module, side="B", wanted=(module.out_features, rank)),
        )


def _check_names(
    tensors: Mapping[str, Tensor], modules: tuple[Module, ...], targeted: set[str]
) -> None:
    """Every tensor must be one that `_tensor` reads."""
    paths = {module.tensor_name(side): module.path for module in modules for side in _SIDES}
    for name in tensors:
        if name not in paths:
            raise _stranger(name)
        if paths[name] not in targeted:
            raise invalid(
                f"tensor {name} is of a module that {CONFIG_FILE} does not target", field=name
            )


def _stranger(name: str) -> RpcError:
    """Why a tensor is none of the base model's modules'."""
    match = _LORA_NAME.fullmatch(name)
    if match is None:
        return unsupported(
            f"tensor {shown(name)} is no lora_A.weight or lora_B.weight below {PREFIX}",
            field=shown(name),
        )
    path = match["path"]
    if _LINEAR_PATH.fullmatch(path):
        return mismatch(f"the base model has no {shown(path)}", field=shown(name))
    return unsupported(f"LoRA on {shown(path)} is not served", field=shown(name))


def _tensor(
    tensors: Mapping[str, Tensor], module: Module, *, side: Side, wanted: tuple[int, int]
) -> Tensor:
    name = module.tensor_name(side)
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
    """All are numbers, and remain so when the scale is folded in, and one product is not zero."""
    has_effect = False
    for bound in bindings:
        a_by_rank = _largest_by_rank(bound.a, data, axis=1)
        b_by_rank = _largest_by_rank(bound.b, data, axis=0) * bound.scale
        if b_by_rank.max() > _LARGEST:
            raise invalid(
                f"tensor {bound.b.name} overflows when multiplied by the scale {bound.scale}",
                field=bound.b.name,
            )
        has_effect |= bool(((a_by_rank > 0) & (b_by_rank >= _SMALLEST)).any())
    if not has_effect:
        raise invalid(
            f"{WEIGHTS_FILE}: every product B·A is zero, so the adapter has no effect",
            field=WEIGHTS_FILE,
        )


def _largest_by_rank(tensor: Tensor, data: memoryview, *, axis: int) -> npt.NDArray[np.float64]:
    values = largest(bits_of(data, tensor), tensor.dtype, axis=axis)
    if not np.isfinite(values).all():
        raise invalid(f"tensor {tensor.name} has infinite or NaN values", field=tensor.name)
    return values.astype(np.float64)


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
