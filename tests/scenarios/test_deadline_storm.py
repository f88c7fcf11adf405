"""Requests that cannot end in time: refused early, never computed after their deadline."""

from dataclasses import replace

import pytest

from bench.sim import Learned
from bench.workload import Arrival, Trace, merged
from services.core.systems import SYSTEMS
from tests.scenarios.scenario_worlds import conversations, p99_ttft_s, simulate
from tests.sim.sim_worlds import arrival, trace

STORM_S = (20.0, 30.0)
DEADLINE_S = 1.0


def doomed(at_s: float, *, prompt_tokens: int = 200) -> Arrival:
    """Its four hundred tokens take some ten seconds at best."""
    return replace(
        arrival(at_s, prompt_tokens=prompt_tokens, output_tokens=400, deadline_s=DEADLINE_S),
        tenant="storm",
    )


def storm(rate_rps: float) -> Trace:
    count = int((STORM_S[1] - STORM_S[0]) * rate_rps)
    return trace(*(doomed(STORM_S[0] + number / rate_rps) for number in range(count)))


def test_who_cannot_end_in_time_is_refused_at_once_and_nobody_else_notices() -> None:
    usual = conversations(4.0, 50.0, seed=2)
    calm = simulate("adaptive", usual)
    stormy = simulate("adaptive", merged("storm", (usual, storm(50.0))))
    refused = [record for record in stormy.requests if record.tenant == "storm"]
    others = [record for record in stormy.requests if record.tenant != "storm"]

    assert {record.reason for record in refused} == {"DEADLINE_UNREACHABLE"}
    assert max((record.end_s or 0.0) - record.arrived_s for record in refused) < 0.01
    assert {record.tokens for record in refused} == {0}
    assert all(record.outcome == "done" for record in others)
    assert p99_ttft_s(others) <= p99_ttft_s(calm.requests) + 0.01


@pytest.mark.parametrize("name", SYSTEMS)
def test_nothing_is_computed_after_its_deadline(name: str) -> None:
    """Lengths are not known, so some begin. By the last deadline all are gone, and steps end."""
    result = simulate(name, storm(20.0), predictor=Learned())
    assert all(record.outcome in {"deadline", "rejected"} for record in result.requests)
    assert max(record.end_s or 0.0 for record in result.requests) <= STORM_S[1] + DEADLINE_S
    busy_s = sum(worker.busy_s for worker in result.workers)
    step_s = 2.5  # a prompt step of the largest batch that the papers' systems build
    assert busy_s <= STORM_S[1] - STORM_S[0] + DEADLINE_S + step_s


def test_a_queue_that_is_late_is_not_served_late() -> None:
    """Three seconds of prompts at once, and two to answer in: those that would be late are told."""
    burst = trace(
        *(arrival(0.0, prompt_tokens=400, output_tokens=2, deadline_s=2.0) for _ in range(40))
    )
    result = simulate("adaptive", burst)
    done = [record for record in result.requests if record.outcome == "done"]
    late = [record for record in result.requests if record.outcome != "done"]
    assert len(done) >= 20
    # Those that a worker had already, for it to have something to compute, are the exception.
    sent_on = [record for record in late if record.reason != "DEADLINE_UNREACHABLE"]
    assert len(sent_on) <= 7
    assert sum(record.tokens for record in late) <= len(sent_on)
