"""One tenant asks for a hundred times what the others ask for."""

import functools
from dataclasses import replace

import pytest

from bench.sim import Constant, Learned, Oracle, PredictorKind, Result, Window
from bench.workload import Poisson, Trace, Workload, build, merged
from services.core.tenants import TenantLimits, Tenants
from services.core.types import TenantId
from tests.scenarios.scenario_worlds import (
    SERVED,
    conversations,
    jain,
    p99_ttft_s,
    simulate,
    system,
)

NOISY = TenantId("noisy")
QUOTA = Tenants(
    named={
        NOISY: TenantLimits(tokens_per_s=400.0, burst_tokens=800.0, max_running=8, max_queued=50)
    }
)
SEEDS = (0, 1, 2)
ENDS = Window(drain_s=30.0)  # what the noisy one still waits for then is of no interest


@functools.cache
def traffic(noise: float, seed: int) -> Trace:
    """Three tenants with one request a second each, and one with so many."""
    rates_rps = {"a": 1.0, "b": 1.0, "c": 1.0, NOISY: noise}
    return merged(
        "tenants",
        (
            conversations(rate_rps, 40.0, seed=10 * seed + i, tenant=tenant)
            for i, (tenant, rate_rps) in enumerate(rates_rps.items())
        ),
    )


def others_p99_s(name: str, noise: float, tenants: Tenants | None = None) -> float:
    """Of all seeds together, so that one slow request does not decide."""
    return p99_ttft_s(
        record
        for seed in SEEDS
        for record in _run(name, traffic(noise, seed), tenants).requests
        if record.tenant != NOISY
    )


def _run(
    name: str,
    trace: Trace,
    tenants: Tenants | None = None,
    *,
    predictor: PredictorKind | None = None,
) -> Result:
    return simulate(
        system(name, tenants),
        trace,
        predictor=predictor or Learned(),
        window=ENDS,
        sample_s=None,
        checks_integrity=False,
    )


@pytest.mark.parametrize("name", SERVED)
def test_with_a_quota_the_others_hardly_notice(name: str) -> None:
    quiet_s = others_p99_s(name, 1.0, QUOTA)
    assert others_p99_s(name, 100.0, QUOTA) <= 1.2 * quiet_s


@pytest.mark.parametrize("name", ["adaptive", "vtc"])
def test_with_weights_alone_the_others_wait_as_long_as_full_workers_take(name: str) -> None:
    quiet_s = others_p99_s(name, 1.0)
    assert others_p99_s(name, 100.0) <= min(6.0 * quiet_s, 5.0)


def test_an_order_that_knows_no_tenants_protects_nobody() -> None:
    assert others_p99_s("fifo", 100.0) > 20.0


@pytest.mark.parametrize("name", ["adaptive", "vtc"])
def test_tenants_who_all_want_too_much_get_shares_by_their_weights(name: str) -> None:
    weights = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 4.0}
    rates_rps = {"a": 6.0, "b": 60.0, "c": 10.0, "d": 20.0}
    trace = merged(
        "shares",
        (
            conversations(rate_rps, 60.0, seed=i, tenant=tenant)
            for i, (tenant, rate_rps) in enumerate(rates_rps.items())
        ),
    )
    named = {TenantId(tenant): TenantLimits(weight) for tenant, weight in weights.items()}
    # With guesses that are still being learned, a flood is charged by those that it came with.
    result = _run(name, trace, Tenants(named=named), predictor=Oracle())
    served = dict.fromkeys(weights, 0)
    for record in result.requests:
        if record.dispatched_s is not None and 20.0 <= record.dispatched_s < 60.0:
            served[record.tenant] += record.prompt_tokens + record.output_tokens
    assert jain(served[tenant] / weight for tenant, weight in weights.items()) >= 0.95


@pytest.mark.parametrize("predicted", [5.0, 500.0])
@pytest.mark.parametrize("name", SERVED)
def test_a_quota_is_exact_to_1_percent_over_a_minute_whatever_is_predicted(
    name: str, predicted: float
) -> None:
    rate_tokens_s = 1000.0
    tenants = Tenants(default=TenantLimits(tokens_per_s=rate_tokens_s, burst_tokens=100.0))
    workload = Workload(arrivals=Poisson(40.0), duration_s=100.0, scale=0.05, max_output=64)
    trace = replace(build(workload), adapters=())
    trace = replace(trace, arrivals=tuple(replace(one, adapter=None) for one in trace.arrivals))
    result = simulate(
        system(name, tenants),
        trace,
        predictor=Constant(predicted),
        window=Window(drain_s=0.0),
        sample_s=None,
        checks_integrity=False,
    )
    used = sum(
        record.prompt_tokens + record.output_tokens
        for record in result.requests
        if record.end_s is not None and record.outcome == "done" and 30.0 <= record.end_s < 90.0
    )
    assert used == pytest.approx(60.0 * rate_tokens_s, rel=0.01)
