"""The adapters of the cold-start benchmark, and its arithmetic."""

from pathlib import Path

import pytest

from bench.coldstart.adapters import rank_of, write_adapter
from bench.coldstart.neighbours import Neighbours, Turn
from services.adapter_store.peft import BaseModel, convert
from services.common.adapter_container import verify
from services.common.base_model import linear_shapes, load_config
from tests.support.peft_folders import CONFIG_FILE, WEIGHTS_FILE, write_tiny_model


@pytest.mark.parametrize("size_bytes", [20_000, 50_000])
def test_an_adapter_of_the_wanted_size_is_one_that_the_store_takes(
    tmp_path: Path, size_bytes: int
) -> None:
    write_tiny_model(tmp_path / "model")
    config = load_config(tmp_path / "model")
    rank = rank_of(size_bytes, config)
    write_adapter(tmp_path / "peft", config, rank=rank, seed=1)
    converted = convert(
        (tmp_path / "peft" / CONFIG_FILE).read_bytes(),
        memoryview((tmp_path / "peft" / WEIGHTS_FILE).read_bytes()),
        BaseModel(config, ()),
        rank_max=256,
    )
    header = verify(converted.blob, converted.weights.digest)
    assert len(header.modules) == config.num_layers * len(linear_shapes(config))
    assert header.payload_bytes == pytest.approx(size_bytes, rel=0.2)


def test_each_seed_makes_an_adapter_of_its_own(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    config = load_config(tmp_path / "model")
    for seed in (1, 2):
        write_adapter(tmp_path / str(seed), config, rank=2, seed=seed)
    one, two = ((tmp_path / str(seed) / WEIGHTS_FILE).read_bytes() for seed in (1, 2))
    assert one != two


def test_neighbours_are_compared_by_the_median_of_their_turns() -> None:
    turns = {p99: Turn([p99] * 100, requests=4, cold=3) for p99 in (0.1, 0.2, 0.3, 0.4)}
    result = Neighbours(
        warm=[turns[0.1], turns[0.2], turns[0.3]], cold=[turns[0.4], turns[0.4], turns[0.1]]
    )
    assert result.ratio == pytest.approx(2.0)
    warm, cold = result.rows()
    assert (warm["gap_p99_s"], cold["gap_p99_s"], cold["cold_loads"]) == (0.2, 0.4, 9)
