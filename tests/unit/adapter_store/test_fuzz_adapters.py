"""Whatever is published gives an adapter that verifies or the typed refusal, and nothing else."""

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from services.adapter_store.peft import BaseModel
from services.adapter_store.peft_config import parse_config
from services.adapter_store.safetensors_file import parse_tensors
from services.common.errors import RpcError
from tests.support.adapter_checks import RANK_MAX, check_files, seeds, tiny_base
from tests.support.peft_folders import with_header

SEEDS = list(seeds())
WORK = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_what_is_mutated_below_is_accepted_as_it_is(number: int, base: BaseModel) -> None:
    assert check_files(*SEEDS[number], base) is not None


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["q_proj", "lm_head", "embed_tokens", "all-linear", "LORA", "none", "gaussian", ".*",
         "model.layers.0.self_attn.q_proj", r".*\.(q|v)_proj", "(a+)+", "acme/other", "../..",
         "\0", "\ud800"]
    )
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["q_proj", "v_proj", "a"]) | st.text(max_size=4), inner)
    ),
    max_leaves=8,
)
fields = st.sampled_from(
    ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "bias",
     "exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path",
     "peft_type", "peft_version", "task_type", "init_lora_weights", "fan_in_fan_out", "use_dora",
     "modules_to_save", "lora_bias", "loftq_config"]
) | st.text(max_size=6)  # fmt: skip


@WORK
@given(
    seed=st.sampled_from(range(len(SEEDS))),
    changes=st.dictionaries(fields, values, min_size=1, max_size=4),
)
@example(seed=0, changes={"layers_pattern": ["a)|(?:model"], "layers_to_transform": [0]})
@example(seed=0, changes={"lora_alpha": 10**400})
@example(seed=0, changes={"rank_pattern": {"(": 1}})
def test_a_config_with_other_values(seed: int, changes: dict[str, Any], base: BaseModel) -> None:
    config, weights = SEEDS[seed]
    check_files(json.dumps({**json.loads(config), **changes}).encode(), weights, base)


changed_bytes = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "cut", "repeat"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=6,
)


def _mutated(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, content in changes:
        at = int(where * len(data))
        match kind:
            case "set":
                data = data[:at] + content + data[at + len(content) :]
            case "insert":
                data = data[:at] + content + data[at:]
            case "delete":
                data = data[:at] + data[at + len(content) :]
            case "repeat":
                data = data[:at] + data[at : at + 64] + data[at:]
            case _:
                data = data[:at]
    return data


@WORK
@given(
    seed=st.sampled_from(range(len(SEEDS))),
    changes=changed_bytes,
    file=st.sampled_from(["config", "weights"]),
)
def test_files_with_other_bytes(
    seed: int,
    changes: list[tuple[str, float, bytes]],
    file: str,
    base: BaseModel,
) -> None:
    config, weights = SEEDS[seed]
    if file == "config":
        check_files(_mutated(config, changes), weights, base)
    else:
        # Most of the file is weights, where any change is another adapter: aim at the header.
        front, rest = weights[:1600], weights[1600:]
        check_files(config, _mutated(front, changes) + rest, base)


@WORK
@given(
    seed=st.sampled_from(range(len(SEEDS))),
    where=st.floats(0, 1),
    bits=st.sampled_from([0x7F80, 0x7FC0, 0xFC00, 0, 0x8000]),
)
def test_weights_of_any_value(seed: int, where: float, bits: int, base: BaseModel) -> None:
    config, weights = SEEDS[seed]
    (header_bytes,) = struct.unpack_from("<Q", weights)
    start = 8 + header_bytes
    at = start + int(where * (len(weights) - start - 2))
    check_files(config, weights[:at] + struct.pack("<H", bits) + weights[at + 2 :], base)


names = st.sampled_from(
    ["base_model.model.lm_head.weight", "base_model.model.lm_head.lora_A.weight",
     "base_model.model.model.embed_tokens.lora_embedding_A", "__metadata__", "",
     "base_model.model.model.embed_tokens.base_layer.weight", "x" * 10_240,
     "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", "\0", "../x", "\ud800"]
)  # fmt: skip
sizes = st.integers(-1, 140) | st.sampled_from([2**31, 2**32, 2**48, 2**63, 2**64])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["BF16", "F16", "F32", "F64", "I8"]) | values,
        "shape": st.lists(sizes, max_size=9) | values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | values,
    }
)


@WORK
@given(
    seed=st.sampled_from(range(len(SEEDS))),
    changes=st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(["dtype", "shape", "data_offsets"]), values)
    ),
    more=st.dictionaries(names, entries | values, max_size=2),
)
@example(
    seed=0,
    changes=[],
    more={
        "base_model.model.lm_head.weight": {
            "dtype": "BF16",
            "shape": [2**40, 2**40, 0],
            "data_offsets": [0, 0],
        }
    },
)
def test_a_header_with_other_values(
    seed: int,
    changes: list[tuple[float, str, Any]],
    more: dict[str, Any],
    base: BaseModel,
) -> None:
    config, weights = SEEDS[seed]
    (header_bytes,) = struct.unpack_from("<Q", weights)
    header = json.loads(weights[8 : 8 + header_bytes])
    tensors = [name for name in header if name != "__metadata__"]
    for where, field, value in changes:
        header[tensors[int(where * (len(tensors) - 1))]][field] = value
    header.update(more)
    check_files(config, with_header(header, weights[8 + header_bytes :]), base)


@WORK
@given(config=st.binary(max_size=300), weights=st.binary(max_size=300))
def test_any_bytes_at_all(config: bytes, weights: bytes, base: BaseModel) -> None:
    assert check_files(config, weights, base) is None
    assert check_files(SEEDS[0][0], weights, base) is None
    assert check_files(config, SEEDS[0][1], base) is None


pieces = st.sampled_from(
    [".", ".*", ".+", "?", "*", "+", "{2}", "(?:", "(", ")", "|", "[a-z]", "[^.]", r"\d", r"\.",
     r"\1", "(?=", "(?i)", "q", "_proj", "layers", "$", "^", "(?P<idx>", "\\", "[", "]"]
)  # fmt: skip


@WORK
@given(
    text=st.lists(pieces, max_size=14).map("".join),
    field=st.sampled_from(["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"]),
)
def test_any_pattern_is_refused_or_soon_done(text: str, field: str, base: BaseModel) -> None:
    config = json.loads(SEEDS[0][0])
    value: Any = {text: 4} if field == "rank_pattern" else text
    config.update({field: value, "layers_to_transform": [0] if field == "layers_pattern" else None})
    started_s = time.thread_time()
    check_files(json.dumps(config).encode(), SEEDS[0][1], base)
    assert time.thread_time() - started_s < 10.0


# The dearest ways to spend a file's bytes on JSON.
DENSE: dict[str, Callable[[int], str]] = {
    "lists": lambda size: '{"a":[' + "[]," * (size // 3) + "0]}",
    "objects": lambda size: '{"a":[' + "{}," * (size // 3) + "0]}",
    "objects in objects": lambda size: '{"a":[' + '{"b":0},' * (size // 8) + "0]}",
    "texts": lambda size: '{"a":[' + '"ab",' * (size // 5) + "0]}",
    "numbers": lambda size: '{"a":[' + "999," * (size // 4) + "0]}",
    "keys": lambda size: "{" + ",".join(f'"{n}":0' for n in range(size // 10)) + "}",
}


@pytest.mark.parametrize("what", DENSE)
def test_a_files_json_takes_memory_in_proportion(what: str) -> None:
    raw = DENSE[what](2**18).encode()
    tracemalloc.start()
    try:
        with pytest.raises(RpcError):
            parse_config(b'{"peft_type": "LORA", "x": ' + raw + b"}", rank_max=RANK_MAX)
        with pytest.raises(RpcError):
            parse_tensors(memoryview(with_header(raw, b"")))
        assert tracemalloc.get_traced_memory()[1] < 64 * len(raw)
    finally:
        tracemalloc.stop()
