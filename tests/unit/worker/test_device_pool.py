"""Adapters in blocks of the pool: what the account in blocks promises, and whose room is whose."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.common.adapter_container import ContainerHeader, LoraRows, encode, read_header
from services.common.base_model import LINEARS, ModelConfig, linear_shapes
from services.common.model_config import parse_config
from services.worker.lora.device_pool import (
    AdapterPool,
    accounted_block_bytes,
    has_aligned_rows,
)
from services.worker.lora.paging import place


def _config(**changes: float) -> ModelConfig:
    fields = {
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    architecture = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return parse_config(architecture | fields | changes, {})


CONFIG = _config()
BLOCK_ELEMENTS = 2 * 2 * 1 * 16 * 16  # of 16 tokens


def _blob(ranks: list[int], dtype: str = "F32") -> bytearray:
    """Ranks by turns over all linears."""
    shapes = linear_shapes(CONFIG)
    size = {"F32": 4, "BF16": 2}[dtype]
    places = [(layer, module) for layer in range(CONFIG.num_layers) for module in LINEARS]
    rows: list[LoraRows] = []
    for index, (layer, module) in enumerate(places):
        rank = ranks[index % len(ranks)]
        inputs, outputs = shapes[module]
        a, bt = (bytes(rank * width * size) for width in (inputs, outputs))
        rows.append(LoraRows(layer, module, rank, 1.0, inputs, outputs, a, bt))
    return bytearray(encode(rows, dtype=dtype))


@given(
    ranks=st.lists(st.integers(1, 70), min_size=1, max_size=7),
    block_elements=st.integers(41, 400).map(lambda eighths: eighths * 8),
    dtype=st.sampled_from(["BF16", "F32"]),
)
def test_an_adapter_fits_into_the_blocks_that_its_bytes_are_counted_as(
    ranks: list[int], block_elements: int, dtype: str
) -> None:
    header = read_header(_blob(ranks, dtype))
    accounted = accounted_block_bytes(CONFIG, block_elements)
    assert accounted > 0
    needed = place(header, block_elements=block_elements).blocks
    assert needed <= -(-header.payload_bytes // accounted)


def test_a_block_that_is_smaller_than_a_page_holds_nothing() -> None:
    assert accounted_block_bytes(CONFIG, 8 * 40) < 1


def test_rows_of_odd_widths_are_not_aligned() -> None:
    assert has_aligned_rows(CONFIG)
    assert not has_aligned_rows(_config(intermediate_size=44))


def _pool() -> AdapterPool:
    memory = torch.full((96 * BLOCK_ELEMENTS,), float("nan"))
    return AdapterPool(CONFIG, memory, block_elements=BLOCK_ELEMENTS)


def _add(pool: AdapterPool, digest: str, blob: bytearray, first: int) -> ContainerHeader:
    header = read_header(blob)
    pool.begin(digest, header, memoryview(blob)[header.payload_offset :], range(first, first + 24))
    pool.extend(digest, CONFIG.num_layers)
    return header


def test_tables_of_removed_adapters_make_room_for_others() -> None:
    pool = _pool()
    places: list[int | None] = []
    for turn in range(3):
        for index, rank in enumerate((8, 30, 16)):
            _add(pool, f"{turn} {index}", _blob([rank]), 24 * index)
        places.append(pool[f"{turn} 0"].table_at)
        for index in (1, 0, 2):
            pool.remove(f"{turn} {index}")
    assert places == [0, 0, 0]


def test_an_adapter_without_room_for_its_table_is_a_memory_error() -> None:
    pool = _pool()
    blob = _blob([30])
    table_elements = CONFIG.num_layers * len(LINEARS) * (1 + 2 * 4)
    room = len(pool.tables) // table_elements
    for index in range(room):
        _add(pool, str(index), blob, 0)
    with pytest.raises(MemoryError, match="page table"):
        _add(pool, "one more", blob, 0)
    pool.remove("one more")
    pool.remove("0")
    _add(pool, "again", blob, 0)
    assert pool["again"].ready_layers == CONFIG.num_layers


def test_rows_arrive_layer_by_layer() -> None:
    pool = _pool()
    blob = _blob([8])
    header = read_header(blob)
    payload = memoryview(blob)[header.payload_offset :]
    values = np.frombuffer(payload, dtype=np.float32)
    values[:] = np.arange(len(values))
    pool.begin("a", header, payload, range(24))
    assert pool["a"].ready_layers == 0
    pool.extend("a", 1)
    table = pool["a"].table_at
    assert table is not None
    assert pool["a"].ready_layers == 1
    first = int(pool.tables[table + 1]) // 16 * 8
    assert first == 0
    pool.extend("a", 2)
    assert pool["a"].payload is None
