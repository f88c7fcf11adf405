"""What must hold for any two files that somebody publishes, for the fuzz tests.

`check_files` lets through two outcomes: a blob that is what its digest says and holds the uploaded
bits, or a refusal of the adapter's kind that can travel. `seeds` are adapters to mutate.
"""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from services.adapter_store.base_tensors import BaseTensors
from services.adapter_store.peft import BaseModel, Converted, convert
from services.adapter_store.safetensors_file import bits_of
from services.common.adapter_container import verify
from services.common.base_model import load_config, outer_shapes
from services.common.errors import Reason, RpcError
from tests.support.peft_folders import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    write_peft_folder,
    write_tiny_model,
)

RANK_MAX: Final = 64
REASONS: Final = frozenset(
    {Reason.ADAPTER_INVALID, Reason.ADAPTER_UNSUPPORTED, Reason.ADAPTER_BASE_MISMATCH}
)
MESSAGE_CHARACTERS_MAX: Final = 2000


def check_files(config: bytes, weights: bytes, base: BaseModel) -> Converted | None:
    """Convert, and check what comes of it. None: refused. Raises whatever must not be."""
    data = memoryview(weights)
    try:
        converted = convert(config, data, base, rank_max=RANK_MAX)
    except RpcError as error:
        refusal = error
    else:
        _check_converted(converted, data)
        return converted
    assert refusal.reason in REASONS, refusal.reason
    assert refusal.context.field
    assert len(refusal.message) <= MESSAGE_CHARACTERS_MAX
    refusal.to_status()
    return None


def _check_converted(converted: Converted, data: memoryview) -> None:
    header = verify(converted.blob, converted.weights.digest)
    dtype = converted.weights.dtype
    assert len(header.modules) == len(converted.bindings) > 0
    for entry, bound in zip(header.modules, converted.bindings, strict=True):
        assert (entry.layer, entry.module) == (bound.module.layer, bound.module.name)
        assert 1 <= entry.rank == bound.rank <= RANK_MAX
        assert 0 < entry.scale == bound.scale < math.inf
        start = header.payload_offset + entry.offset
        middle = start + entry.a_bytes(dtype)
        end = middle + entry.b_bytes(dtype)
        assert converted.blob[start:middle] == bits_of(data, bound.a).tobytes()
        assert converted.blob[middle:end] == bits_of(data, bound.b).T.tobytes()
    assert header.payload_bytes <= len(data)


def tiny_base(folder: Path) -> BaseModel:
    """A base model of two layers, without weights."""
    write_tiny_model(folder)
    return BaseModel(load_config(folder), ("acme/tiny-base",), BaseTensors(folder))


def seeds() -> Iterator[tuple[bytes, bytes]]:
    """Config and weights of some adapters that are accepted."""
    options: tuple[dict[str, Any], ...] = (
        {},
        {"dtype": "F32", "use_rslora": True, "rank_pattern": {"v_proj": 2}},
        {"dtype": "F16", "target_modules": ["down_proj"], "alpha_pattern": {"0.mlp.down_proj": 3}},
        {
            "target_modules": ["gate_proj"],
            "config": {"target_modules": r".*\.(gate|x)_proj"},
        },
        {"target_modules": ["q_proj"], "config": {"exclude_modules": ["v_proj"]}},
        {"target_modules": ["embed_tokens", "v_proj", "lm_head"], "rank_pattern": {"lm_head": 3}},
    )
    with tempfile.TemporaryDirectory() as name:
        shapes = write_tiny_model(Path(name) / "model")
        shapes |= outer_shapes(load_config(Path(name) / "model"))
        for number, option in enumerate(options):
            folder = Path(name) / str(number)
            write_peft_folder(
                folder, shapes=shapes, num_layers=2, rank=4, base_model="acme/tiny-base", **option
            )
            yield (folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes()
