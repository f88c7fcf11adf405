"""UELLM's batches and those it was compared with, against values worked out by hand."""

import math
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.policies.static_batches import (
    Batch,
    OpenBatch,
    UellmConfig,
    form_batches,
    morphling_batches,
    s3_batches,
)
from services.core.types import Request
from tests.unit.core.core_world import request

SLO_ODBS = UellmConfig()
SLO_DBS = UellmConfig(length_weight=0.0)
ODBS = UellmConfig(slo_weight=0.0)
FAMILY = (SLO_ODBS, SLO_DBS, ODBS)


def one(name: str, slo_s: float, length: int, *, arrived_s: float = 0.0) -> Request:
    return request(name, arrived_s=arrived_s, deadline_s=arrived_s + slo_s, output=length)


def names(batches: tuple[Batch, ...]) -> list[list[str]]:
    return [[str(one.attempt.request_id) for one in batch] for batch in batches]


def paper_queries() -> list[Request]:
    """A hundred, with SLOs of 90 to 300 s and lengths below the jump that closes a batch."""
    return [one(f"q{index}", 90.0 + index * 37 % 210, 1 + index * 61 % 700) for index in range(100)]


@pytest.mark.parametrize("config", FAMILY)
def test_the_code_makes_ten_batches_of_ten_of_a_hundred(config: UellmConfig) -> None:
    queries = paper_queries()
    batches = form_batches(queries, config)
    assert [len(batch) for batch in batches] == [10] * 10
    ordered = sorted(queries, key=config.metric)
    assert [query for batch in batches for query in batch] == ordered


def test_the_code_sorts_by_slo_plus_half_the_length() -> None:
    queries = [one("a", 100, 100), one("b", 120, 20), one("c", 90, 200)]  # 150, 130, 190
    assert names(form_batches(queries, SLO_ODBS)) == [["b", "a", "c"]]
    assert names(form_batches(queries, SLO_DBS)) == [["c", "a", "b"]]
    assert names(form_batches(queries, ODBS)) == [["b", "a", "c"]]


def test_the_code_closes_a_batch_only_at_a_jump_of_1250_tokens_at_nine_members() -> None:
    nine = [one(f"s{index}", 1.0, 10) for index in range(9)]
    for length, sizes in ((1260, [10]), (1261, [9, 1])):  # 1250 · 10 · 1.2 = 15,000
        batches = form_batches([*nine, one("long", 1.0, length)], UellmConfig())
        assert [len(batch) for batch in batches] == sizes


def test_slo_dbs_closes_a_batch_at_a_jump_of_the_slo() -> None:
    config = replace(SLO_DBS, gap_threshold=240.0)
    queries = [one("a", 10, 5), one("b", 110, 5000), one("c", 111, 5)]
    assert names(form_batches(queries, config)) == [["a", "b", "c"]]  # 100 · 2 · 1.2 = 240
    assert names(form_batches([*queries[:1], one("d", 111, 5)], config)) == [["a"], ["d"]]


def test_the_published_sums_are_those_of_the_formula() -> None:
    """A member of 100 s and 40 tokens; one of 50 s and 200 tokens asks.

    The worst member is the only one: L_CM = 100, O_CM = 40; |batch| + 1 = 2.
    T_l = ((100 + 100) + (50 + 100)) · 2 · 1.1 = 770
    T_o = ((40 + 40) + (200 + 40)) · 2 · 1.3 = 832
    2 · 770 + 0.25 · 832 = 1748
    """
    for threshold, admits in ((1748.001, True), (1747.999, False)):
        batch = OpenBatch(
            UellmConfig(
                form="published",
                slo_weight=2.0,
                length_weight=0.25,
                slo_overhead=1.1,
                length_overhead=1.3,
                batch_threshold=threshold,
            )
        )
        batch.add(one("a", 100, 40))
        assert batch.admits(one("b", 50, 200)) == admits


def test_the_published_worst_member_is_the_one_with_the_largest_composite_metric() -> None:
    batch = OpenBatch(UellmConfig(form="published"))
    for query in (one("a", 100, 40), one("b", 90, 400), one("c", 200, 10)):  # 120, 290, 205
        batch.add(query)
    assert batch.worst is not None
    assert batch.worst.attempt.request_id == "b"


def test_the_published_threshold_fills_a_batch_with_ten_of_150_s_and_150_tokens() -> None:
    queries = [one(f"q{index}", 150, 150) for index in range(25)]
    config = UellmConfig(form="published", cap=99)
    assert [len(batch) for batch in form_batches(queries, config)] == [10, 10, 5]


def test_the_published_form_sorts_by_slo_and_orders_batches_by_it() -> None:
    config = UellmConfig(form="published", batch_threshold=1.0)
    queries = [one("a", 30, 1), one("b", 10, 900), one("c", 20, 50)]
    assert names(form_batches(queries, config)) == [["b"], ["c"], ["a"]]
    odbs = replace(config, slo_weight=0.0)
    assert names(form_batches(queries, odbs)) == [["a"], ["c"], ["b"]]


def test_a_request_without_deadline_has_the_default_slo_and_a_past_one_none() -> None:
    config = UellmConfig(default_slo_s=7.0)
    assert config.slo_s(request("a")) == 7.0
    assert config.slo_s(request("b", arrived_s=5.0, deadline_s=4.0)) == 0.0


def test_the_weights_name_the_member_of_the_family() -> None:
    assert [config.name for config in FAMILY] == ["slo_odbs", "slo_dbs", "odbs"]


def test_s3_fills_batches_by_length_up_to_1024_tokens_and_20_members() -> None:
    queries = [one("long", 1, 600), *[one(f"s{index}", 1, 10) for index in range(25)]]
    queries.append(one("longer", 1, 900))
    assert [len(batch) for batch in s3_batches(queries)] == [20, 6, 1]
    exact = [one("a", 1, 500), one("b", 1, 524), one("c", 1, 525)]
    assert names(s3_batches(exact)) == [["a", "b"], ["c"]]


def test_morphling_takes_ten_at_a_time_as_they_come() -> None:
    queries = [one(f"q{index}", 1, 100 - index) for index in range(23)]
    batches = morphling_batches(queries)
    assert [len(batch) for batch in batches] == [10, 10, 3]
    assert [query for batch in batches for query in batch] == queries


@given(
    drawn=st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 5000)), max_size=60),
    member=st.sampled_from(FAMILY),
    form=st.sampled_from(["published", "implemented"]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_request_is_in_one_batch_within_the_cap(
    drawn: list[tuple[float, int]],
    member: UellmConfig,
    form: Literal["published", "implemented"],
) -> None:
    queries = [one(f"q{index}", slo_s, length) for index, (slo_s, length) in enumerate(drawn)]
    ours = form_batches(queries, replace(member, form=form))
    for batches in (ours, s3_batches(queries), morphling_batches(queries)):
        batched = [query.attempt for batch in batches for query in batch]
        assert sorted(batched) == sorted(query.attempt for query in queries)
        assert all(1 <= len(batch) <= 20 for batch in batches)
    assert all(len(batch) <= member.cap for batch in ours)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_numbers_that_cannot_work_are_refused_by_name(bad: float) -> None:
    with pytest.raises(ValueError, match="slo_weight must be finite"):
        UellmConfig(slo_weight=bad)
    with pytest.raises(ValueError, match="length_overhead must be positive"):
        UellmConfig(length_overhead=bad)
    with pytest.raises(ValueError, match="default_slo_s must be positive"):
        UellmConfig(default_slo_s=bad)


def test_two_weights_of_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="slo_weight_plus_length_weight must be positive"):
        UellmConfig(slo_weight=0.0, length_weight=0.0)
    with pytest.raises(ValueError, match="cap must be positive"):
        UellmConfig(cap=0)
