"""What a load does to an adapter's bytes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.common.adapter_container import LoraRows, encode, read_header
from services.common.base_model import load_config
from services.worker.engine import AdapterIncompatibleError
from services.worker.lora.weights import AdapterWeights
from tests.engine.engine_support import tiny_model

_RANK = 3


def _blob(value: float = 0.5) -> bytearray:
    """q_proj of all three layers: A is the layer's number and up, Bᵀ is `value`."""
    rows = [
        LoraRows(layer, "q_proj", _RANK, 2.0, 96, 192, _bytes(96, layer + 1), _bytes(192, value))
        for layer in range(3)
    ]
    return bytearray(encode(rows, dtype="F32"))


def _bytes(width: int, value: float) -> bytes:
    return torch.full((_RANK, width), float(value)).numpy().tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(path)
    return path


def _weights(folder: Path, blob: bytearray, dtype: torch.dtype) -> AdapterWeights:
    header = read_header(blob)
    payload = memoryview(blob)[header.payload_offset :]
    return AdapterWeights(header, payload, load_config(folder), dtype=dtype)


def _tensors(weights: AdapterWeights) -> list[Tensor]:
    return [t for layer in weights.layers for pair in layer.values() for t in (pair.a, pair.bt)]


def test_on_the_host_it_makes_views_and_copies_nothing(folder: Path) -> None:
    blob = _blob()
    weights = _weights(folder, blob, torch.float32)
    weights.extend(3)
    start = torch.frombuffer(blob, dtype=torch.uint8).data_ptr()
    assert len(_tensors(weights)) == 6
    assert all(start <= rows.data_ptr() < start + len(blob) for rows in _tensors(weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_part_has_the_rows_of_its_layers(folder: Path, dtype: torch.dtype) -> None:
    weights = _weights(folder, _blob(), dtype)
    for layers in (1, 3):
        weights.extend(layers)
        assert weights.ready_layers == layers
        assert [len(layer) for layer in weights.layers] == [int(n < layers) for n in range(3)]
    for index, layer in enumerate(weights.layers):
        pair = layer["q_proj"]
        assert (pair.a.dtype, pair.bt.dtype, pair.scale) == (dtype, dtype, 2.0)
        assert torch.equal(pair.a, torch.full((_RANK, 96), index + 1, dtype=dtype))
        assert torch.equal(pair.bt, torch.full((_RANK, 192), 0.5, dtype=dtype))


def test_a_part_that_overflows_is_not_ready(folder: Path) -> None:
    weights = _weights(folder, _blob(1e6), torch.float16)
    with pytest.raises(AdapterIncompatibleError, match="not all weights are finite"):
        weights.extend(1)
    assert weights.ready_layers == 0
