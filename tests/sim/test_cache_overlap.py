"""The study of overlapped loads: a row for every case, and the order that cannot be otherwise."""

from typing import Any

import pytest

from bench.cache import overlap
from bench.policies.jobs import Findings

Key = tuple[str, str, str, float]


@pytest.fixture(scope="module")
def findings() -> Findings:
    """Of runs that are too short to claim anything by."""
    section = overlap.section(duration_s=40.0, seeds=(0,))
    return section.findings({key: job.run() for key, job in section.jobs.items()})


def rows(findings: Findings) -> dict[Key, dict[str, Any]]:
    return {
        (row["adapters in"], row["a load"], row["cache"], row["rate_rps"]): row
        for row in findings.rows
    }


def test_every_case_has_a_row_of_its_own_with_figures(findings: Findings) -> None:
    found = rows(findings)
    assert len(found) == len(findings.rows) == 13
    assert all(0 < row["p50_ttft_s"] <= row["p99_ttft_s"] < 60 for row in found.values())


def test_loads_that_stop_the_device_cost_more_than_hidden_ones(findings: Findings) -> None:
    found, rate_rps = rows(findings), overlap.RATE_RPS
    hidden = found["host memory", "by layer", "none", rate_rps]
    for load in ("stops the device", "stops it for twice its time"):
        blocking = found["host memory", load, "none", rate_rps]
        assert blocking["p50_ttft_s"] > hidden["p50_ttft_s"]


def test_on_a_quiet_worker_a_cold_request_gains_by_layers(findings: Findings) -> None:
    found = rows(findings)
    whole = found["store", "beside the steps", "none", 0.5]
    by_layer = found["store", "by layer", "none", 0.5]
    assert by_layer["p99_ttft_s"] < whole["p99_ttft_s"]


def test_without_a_cache_fewer_requests_find_their_adapter(findings: Findings) -> None:
    found, rate_rps = rows(findings), overlap.RATE_RPS
    none = found["host memory", "by layer", "none", rate_rps]
    lru = found["host memory", "by layer", "lru", rate_rps]
    assert none["hit_rate"] < lru["hit_rate"]
    assert none["loads_per_request"] > lru["loads_per_request"]
