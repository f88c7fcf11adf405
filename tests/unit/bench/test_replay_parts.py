"""The parts of the live replay that need no suite."""

import json
import math
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from bench.replay.adapters import write_adapters
from bench.replay.lengths import LengthSeeds
from bench.replay.live import possible
from bench.report import Target
from bench.workload import AdapterPool, Poisson, Workload, build
from services.core.types import Adapter, AdapterDigest
from services.worker.engine.simulated import output_tokens, sequence_seed


@pytest.fixture(scope="module")
def seeds() -> LengthSeeds:
    return LengthSeeds()


def test_a_seed_makes_the_engine_end_after_its_length(seeds: LengthSeeds) -> None:
    for length in (5, 78, 129, 424, 1000):
        assert seeds.nearest(length) == length
        assert output_tokens(sequence_seed(0, seeds.seed(length))) == length - 1  # and its end


def test_a_length_that_no_seed_gives_becomes_the_nearest(seeds: LengthSeeds) -> None:
    shortest = seeds.nearest(1)
    assert 1 < shortest <= 8
    assert seeds.nearest(10**9) < 10**5


def test_a_trace_takes_the_published_adapters_and_keeps_the_rest(seeds: LengthSeeds) -> None:
    pool = AdapterPool(count=5, ranks=(8,))
    wanted = build(Workload(arrivals=Poisson(5.0), duration_s=20.0, pool=pool))
    published = [Adapter(AdapterDigest(f"sha256:{n:064x}"), 8, 1000 + n) for n in range(50, 55)]
    trace = possible(wanted, published, seeds)
    assert trace.adapters == tuple(published)
    for before, after in zip(wanted.arrivals, trace.arrivals, strict=True):
        assert (before.arrival_s, before.prompt_tokens) == (after.arrival_s, after.prompt_tokens)
        assert after.output_tokens == seeds.nearest(before.output_tokens)
        assert before.adapter is not None
        assert after.adapter is published[wanted.adapters.index(before.adapter)]


def test_adapters_of_one_rank_differ(tmp_path: Path) -> None:
    one, other = write_adapters(tmp_path, [8, 8])
    assert json.loads((tmp_path / one / "adapter_config.json").read_text())["r"] == 8
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in (one, other)
    )
    assert first.keys() == second.keys()
    assert any((first[name] != second[name]).any() for name in first)


def test_a_target_is_a_lower_or_an_upper_bound() -> None:
    holds = {
        (value, is_upper): Target("t", 10.0, value, "s", is_upper=is_upper).holds
        for value in (9.0, 10.0, 11.0)
        for is_upper in (False, True)
    }
    assert [holds[value, False] for value in (9.0, 10.0, 11.0)] == [False, True, True]
    assert [holds[value, True] for value in (9.0, 10.0, 11.0)] == [True, True, False]
    assert not any(Target("t", 1.0, math.nan, "s", is_upper=upper).holds for upper in (False, True))
