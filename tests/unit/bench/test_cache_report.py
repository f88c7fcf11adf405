"""The report over the adapter cache: its jobs, its bounds by hand, and its document."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from bench.cache import FULL, QUICK, Extent, sections
from bench.cache.regimes import Uses
from bench.cache.replay import AllResident, BestSet, Cached, Foreseeing, Strategy
from bench.cache.tables import filled
from services.core.types import Adapter, AdapterDigest

MIB = 2**20


def uses(*chosen: int, sizes: tuple[int, ...] = (1, 1, 1)) -> Uses:
    adapters = tuple(
        Adapter(AdapterDigest(f"sha256:{place:064x}"), 8 * size, size * MIB)
        for place, size in enumerate(sizes)
    )
    return Uses(adapters, np.arange(float(len(chosen))), np.array(chosen))


@pytest.mark.parametrize(
    ("strategy", "hits"),
    [
        (AllResident(), [0, 0, 0, 1, 1, 1]),
        (Foreseeing(by_size=False), [0, 0, 0, 1, 0, 1]),  # 2 takes the place of 1, used later
        (Cached("lru"), [0, 0, 0, 0, 0, 0]),
        (BestSet("hits"), [1, 1, 0, 1, 1, 0]),
    ],
)
def test_a_cache_of_two_is_replayed_as_by_hand(strategy: Strategy, hits: list[int]) -> None:
    found = strategy.hits(uses(0, 1, 2, 0, 1, 2), 2.0 * MIB)
    assert found.astype(int).tolist() == hits


def test_who_foresees_by_size_gives_up_the_large_one() -> None:
    seen = uses(0, 1, 2, 1, 0, sizes=(3, 1, 1))
    assert Foreseeing(by_size=True).hits(seen, 4.0 * MIB).tolist()[3:] == [True, False]


@pytest.mark.parametrize("extent", [FULL, QUICK])
def test_every_job_can_go_to_another_process(extent: Extent) -> None:
    for section in sections(extent):
        assert section.jobs
        for job in section.jobs.values():
            assert pickle.loads(pickle.dumps(job)) == job
            assert job.cost_s > 0


def test_every_table_of_the_document_can_be_filled() -> None:
    document = Path(__file__).parents[3] / "docs" / "cache.md"
    text = document.read_text(encoding="utf-8")
    rows = [
        {
            "section": "replay",
            "regime": "scan",
            "policy": "lru",
            "hit_rate": 0.25,
            "gib_per_1000": 70.5,
        },
        {"section": "served", "world": "w", "policy": "lru", "hit_rate": 0.125},
    ]
    found = filled(text, {"rows": rows, "targets": []})
    assert "| lru | 0.25 |\n" in found
    assert "| w | lru | 0.125 |" in found
    names = re.findall(r"<!-- table: (\w+) -->", text)
    assert names == ["hits", "bytes", "served", "overlap", "targets"]
