"""An adapter's parts over the shards of a model: what each has, and that they are the whole."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from services.common.adapter_container import (
    ContainerHeader,
    LoraRows,
    ModuleEntry,
    encode,
    read_header,
)
from services.common.base_model import ModelConfig, linear_shapes, load_config, outer_shapes
from services.worker.engine.parallel_shard import SPLITS, Shard, ShardingError, check_divides
from services.worker.lora.layout import check_fits
from services.worker.lora.sharding import AdapterShard, entries_below, shard_adapter

Bytes = NDArray[np.uint8]
_ITEMSIZE = {"F32": 4, "BF16": 2}


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 24,'
        ' "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 12,'
        ' "num_key_value_heads": 6, "head_dim": 4, "vocab_size": 31,'
        ' "max_position_embeddings": 64, "rms_norm_eps": 1e-5}'
    )
    return load_config(tmp_path)


def _adapter(config: ModelConfig, dtype: str) -> tuple[ContainerHeader, memoryview]:
    """Every module of every layer, of different ranks, with random bytes."""
    random = np.random.default_rng(1)
    at = [(-1, "embed_tokens", outer_shapes(config)["embed_tokens"])]
    for layer in range(config.num_layers):
        at += [(layer, module, shape) for module, shape in linear_shapes(config).items()]
    at.append((config.num_layers, "lm_head", outer_shapes(config)["lm_head"]))
    rows = []
    for index, (layer, module, (fan_in, fan_out)) in enumerate(at):
        rank = 1 + index % 5
        a, bt = (random.bytes(rank * width * _ITEMSIZE[dtype]) for width in (fan_in, fan_out))
        rows.append(LoraRows(layer, module, rank, 0.5, fan_in, fan_out, a, bt))
    blob = bytearray(encode(rows, dtype=dtype))
    header = read_header(blob)
    return header, memoryview(blob)[header.payload_offset :]


def _matrices(payload: memoryview, entry: ModuleEntry, itemsize: int) -> tuple[Bytes, Bytes]:
    """A and Bᵀ as bytes, `[rank, features, itemsize]`."""
    data = np.frombuffer(payload, dtype=np.uint8)[entry.offset :]
    middle = entry.rank * entry.in_features * itemsize
    end = middle + entry.rank * entry.out_features * itemsize
    shape = (entry.rank, -1, itemsize)
    return data[:middle].reshape(shape), data[middle:end].reshape(shape)


def _copied(part: AdapterShard, payload: memoryview, num_layers: int) -> memoryview:
    """Layer by layer."""
    out = memoryview(bytearray(part.header.payload_bytes))
    done = 0
    for layers in range(1, num_layers + 1):
        entries = entries_below(part.whole, layers, num_layers=num_layers)
        part.copy(payload, out, entries=slice(done, entries))
        done = entries
    return out


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_parts_together_are_the_adapter(config: ModelConfig, count: int, dtype: str) -> None:
    header, payload = _adapter(config, dtype)
    itemsize = _ITEMSIZE[dtype]
    parts = [shard_adapter(header, Shard(index, count)) for index in range(count)]
    payloads = [_copied(part, payload, config.num_layers) for part in parts]
    for place, entry in enumerate(header.modules):
        a, bt = _matrices(payload, entry, itemsize)
        own = [
            _matrices(data, part.header.modules[place], itemsize)
            for part, data in zip(parts, payloads, strict=True)
        ]
        side = SPLITS.get(entry.module)
        for own_a, own_bt in own:
            assert side == "inputs" or np.array_equal(own_a, a), entry.module
            assert side == "outputs" or np.array_equal(own_bt, bt), entry.module
        if side == "inputs":
            assert np.array_equal(np.concatenate([own_a for own_a, _ in own], axis=1), a)
        if side == "outputs":
            assert np.array_equal(np.concatenate([own_bt for _, own_bt in own], axis=1), bt)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_part_is_an_adapter_of_the_shards_model(config: ModelConfig, count: int) -> None:
    header, _ = _adapter(config, "BF16")
    for index in range(count):
        shard = Shard(index, count)
        own = shard_adapter(header, shard).header
        check_fits(own, shard.config(config))
        assert own.layers[0].offset == 0
        ends = [chunk.offset + chunk.size_bytes for chunk in own.layers]
        assert [chunk.offset for chunk in own.layers[1:]] == ends[:-1]
        assert ends[-1] == own.payload_bytes < header.payload_bytes


def test_parts_of_any_size_cover_it_once() -> None:
    for size in range(1, 40):
        for count in range(1, 9):
            parts = [Shard(index, count).part(size) for index in range(count)]
            covered = [place for part in parts for place in range(part.start, part.stop)]
            assert covered == list(range(size))
            widths = [part.stop - part.start for part in parts]
            assert max(widths) - min(widths) <= 1


def test_what_does_not_divide_is_named(config: ModelConfig) -> None:
    check_divides(config, 6)
    with pytest.raises(ShardingError, match="6 key/value heads can't be split evenly over 4"):
        check_divides(config, 4)
    with pytest.raises(ShardingError, match="1 shards; 2 to 16 are supported"):
        check_divides(config, 1)
