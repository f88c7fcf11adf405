"""Fair queueing over tenants."""

import math
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.policies.vtc import Vtc, VtcConfig
from services.core.types import Request, TenantId
from tests.unit.core.core_world import request
from tests.unit.core.policy_world import Answers, drain, push

A, B, C = TenantId("a"), TenantId("b"), TenantId("c")


def of(tenant: TenantId, name: str, *, context: int = 100, output: int = 50) -> Request:
    return request(f"{tenant}{name}", tenant=tenant, context=context, output=output)


def take(policy: Vtc, count: int) -> list[str]:
    place = Answers()
    outcomes = (policy.take(place, now=0.0) for _ in range(count))
    return [taken.request.attempt.request_id for taken in outcomes if taken is not None]  # type: ignore[union-attr]


def test_a_dispatch_charges_the_prompt_and_twice_the_predicted_output() -> None:
    policy = Vtc()
    push(policy, of(A, "1", context=100, output=50), of(A, "2"))
    take(policy, 1)
    assert policy.counter(A) == 200.0


def test_the_tenant_with_the_smallest_counter_goes_next() -> None:
    policy = Vtc()
    push(policy, *[of(A, str(index)) for index in range(4)])
    push(policy, of(B, "0", context=500), of(B, "1"))
    assert drain(policy) == ["a0", "b0", "a1", "a2", "b1", "a3"]  # b stands at 600


def test_a_weight_of_three_gets_three_times_the_service() -> None:
    policy = Vtc(VtcConfig(weights={A: 3.0}))
    for index in range(40):
        push(policy, of(A, str(index)), of(B, str(index)))
    served = take(policy, 40)
    assert sum(name.startswith("a") for name in served) == 30


def test_a_tenant_from_idle_is_lifted_to_the_least_active_counter() -> None:
    policy = Vtc()
    push(policy, *[of(A, str(index)) for index in range(20)])
    push(policy, *[of(B, str(index)) for index in range(20)])
    take(policy, 20)
    push(policy, *[of(C, str(index)) for index in range(20)])
    assert policy.counter(C) == min(policy.counter(A), policy.counter(B)) == 2000.0
    served = take(policy, 9)
    assert sorted(name[0] for name in served) == ["a"] * 3 + ["b"] * 3 + ["c"] * 3


def test_a_tenant_that_left_with_more_than_the_others_keeps_its_debt() -> None:
    policy = Vtc()
    push(policy, of(A, "0", context=1000), of(B, "0"), of(B, "1"))
    assert take(policy, 2) == ["a0", "b0"]
    push(policy, of(A, "1"))
    assert policy.counter(A) == 1100.0
    assert drain(policy) == ["b1", "a1"]


def test_with_nobody_queued_one_is_lifted_to_who_went_last() -> None:
    policy = Vtc()
    push(policy, of(A, "0"))
    drain(policy)
    push(policy, of(B, "0"))
    assert policy.counter(B) == 200.0


def test_priority_goes_before_the_counter() -> None:
    policy = Vtc()
    push(policy, of(A, "0"), of(B, "0"), request("urgent", tenant="a", priority=1))
    take(policy, 1)
    assert policy.counter(A) == 30.0
    assert drain(policy) == ["b0", "a0"]


def test_a_cancelled_head_leaves_its_tenant_where_it_belongs() -> None:
    policy = Vtc()
    push(policy, of(A, "0"), of(B, "0"), request("urgent", tenant="a", priority=1))
    policy.remove(request("urgent").attempt.request_id)
    policy.check_integrity()
    policy.remove(request("a0").attempt.request_id)
    policy.check_integrity()
    assert drain(policy) == ["b0"]


def test_another_tenant_may_pass_a_head_that_does_not_fit_if_allowed() -> None:
    place = Answers(lambda asked: asked.context_tokens < 400)
    for bypasses, expected in ((0, []), (1, ["b0"])):
        policy = Vtc(VtcConfig(bypasses=bypasses))
        push(policy, of(A, "0", context=400), of(A, "1"), of(B, "0"), of(B, "1"))
        assert drain(policy, place) == expected


def test_only_so_many_idle_tenants_are_remembered() -> None:
    policy = Vtc(VtcConfig(idle_tenants=2))
    for tenant in (A, B, C):
        push(policy, of(tenant, "0"))
        drain(policy)
    assert [policy.counter(tenant) for tenant in (A, B, C)] == [0.0, 400.0, 600.0]


lengths = st.tuples(st.integers(1, 1000), st.integers(1, 500))


@given(jobs_a=st.lists(lengths, min_size=30), jobs_b=st.lists(lengths, min_size=30))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_service_of_two_backlogged_tenants_differs_by_at_most_twice_the_largest_charge(
    jobs_a: list[tuple[int, int]], jobs_b: list[tuple[int, int]]
) -> None:
    """The paper's bound, over any interval in which both have requests queued."""
    policy = Vtc()
    for tenant, jobs in ((A, jobs_a), (B, jobs_b)):
        for index, (context, output) in enumerate(jobs):
            push(policy, of(tenant, str(index), context=context, output=output))
    largest = max(context + 2 * output for context, output in [*jobs_a, *jobs_b])
    gaps = [0.0]
    place = Answers()
    while sum(1 for _ in islice(_tenants(policy), 2)) == 2:
        gaps.append(policy.counter(A) - policy.counter(B))
        assert abs(gaps[-1]) <= largest
        assert policy.take(place, now=0.0) is not None
    assert max(gaps) - min(gaps) <= 2 * largest


def _tenants(policy: Vtc) -> set[TenantId]:
    return {one.tenant_id for one in policy.upcoming()}


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan, math.inf])
def test_a_weight_that_cannot_work_is_refused_by_name(bad: float) -> None:
    with pytest.raises(ValueError, match="weight of a must be positive"):
        VtcConfig(weights={A: bad})
    with pytest.raises(ValueError, match="default_weight must be positive"):
        VtcConfig(default_weight=bad)


def test_tokens_that_count_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="input_plus_output_weight must be positive"):
        VtcConfig(input_weight=0.0, output_weight=0.0)
    with pytest.raises(ValueError, match="output_weight must be finite and at least zero"):
        VtcConfig(output_weight=-2.0)
