"""UELLM's experiment: the executor against hand-computed times."""

import pytest

from bench import uellm
from bench.uellm import SYSTEMS, execute, make_queries, outcome_of, serve
from bench.workload.lengths import Fitted

LENGTHS = Fitted("test", prompt=((0.0, 5), (1.0, 50)), output=((0.0, 5), (1.0, 900)))
BY_NAME = {system.name: system for system in SYSTEMS}


def test_a_hundred_queries_have_the_slos_of_the_published_set() -> None:
    queries = make_queries(LENGTHS, seed=1)
    assert len({query.attempt for query in queries}) == 100
    for index, (low, high) in enumerate(uellm.SLOS_S):
        part = [query.deadline_s for query in queries[20 * index : 20 * index + 20]]
        assert all(slo_s is not None and low <= slo_s <= high for slo_s in part)
    assert queries == make_queries(LENGTHS, seed=1) != make_queries(LENGTHS, seed=2)


def test_a_batch_on_one_device_runs_to_its_limit_or_to_its_longest() -> None:
    queries = make_queries(LENGTHS, seed=1)
    to_limit = execute(BY_NAME["uelm-deploy"], queries, ends="limit", step_s=0.01)
    assert to_limit.total_s == pytest.approx(10 * 1024 * 0.01)
    assert to_limit.mean_completion_s == pytest.approx(5.5 * 1024 * 0.01)
    longest = [
        max(query.predicted_output_tokens for query in queries[start : start + 10])
        for start in range(0, 100, 10)
    ]
    to_longest = execute(BY_NAME["uelm-deploy"], queries, ends="longest", step_s=0.01)
    assert to_longest.total_s == pytest.approx(sum(longest) * 0.01)


def test_hops_and_the_stress_test_cost_what_the_sweep_says() -> None:
    queries = make_queries(LENGTHS, seed=1)
    four = execute(BY_NAME["uelm-batch"], queries, ends="limit", step_s=0.01)
    assert four.total_s == pytest.approx(10 * 1024 * 0.01 * 11.9 / 6.8)
    tested = execute(BY_NAME["morphling"], queries, ends="limit", step_s=0.01)
    assert tested.total_s == pytest.approx(10 * 1024 * 0.01 * (1 + 11.8 / 6.8))


def test_an_outcome_counts_who_ended_after_the_slo() -> None:
    queries = make_queries(LENGTHS, seed=1)
    ends_s = {query.attempt.request_id: 170.0 for query in queries}
    outcome = outcome_of(ends_s, queries)
    assert outcome.total_s == outcome.mean_completion_s == 170.0
    assert 0.4 < outcome.late <= 0.6  # 40 have at most 120 s, 20 about 165


def test_only_the_calibrated_row_is_made_to_match() -> None:
    report = uellm.run(quick=True)
    fitted = [row for row in report.rows if row["is_calibrated"]]
    assert len(fitted) == 4
    assert all(row["total_s"] == pytest.approx(row["published_s"]) for row in fitted)
    assert all(target.holds for target in report.targets)


def test_the_default_policy_serves_the_same_queries_by_the_step() -> None:
    queries = make_queries(LENGTHS, seed=1)
    one = serve(queries[:1], replicas=1, step_s=0.01)
    tokens = queries[0].predicted_output_tokens
    assert one.total_s == pytest.approx(tokens * 0.01 * 6.3 / 6.8, abs=0.03)  # messages, prompt
    ten = serve([queries[0]] * 10, replicas=1, step_s=0.01)
    assert ten.total_s == pytest.approx(tokens * 0.01, rel=0.1)
    four = serve(queries, replicas=4, step_s=0.01)
    batches = execute(BY_NAME["uelm-all"], queries, ends="longest", step_s=0.01)
    assert four.mean_completion_s < batches.mean_completion_s
    assert four.late == 0
