"""Whatever goes wrong: each request ends once, tokens are exact, and the machines' books agree."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.sim import (
    Accurate,
    Adversarial,
    Broken,
    Constant,
    Fault,
    Learned,
    Oracle,
    PredictorKind,
    Scenario,
    StoreDown,
    StoreSlow,
    Window,
    WorkerLoss,
    WorkerSlow,
    simulate,
)
from bench.workload import Arrival
from services.core.config import ClusterConfig, ReplicaConfig
from services.core.systems import SYSTEMS
from tests.sim.sim_worlds import POOL, card, scenario, system, trace

moments = st.floats(0.0, 20.0)
predictors: st.SearchStrategy[PredictorKind] = st.sampled_from(
    [Oracle(), Accurate(0.6), Adversarial(), Constant(3), Broken(), Learned()]
)


@st.composite
def faults(draw: st.DrawFn, workers: int) -> Fault:
    worker = draw(st.integers(0, workers - 1))
    begin_s, length_s = draw(moments), draw(moments)
    factor = draw(st.floats(1.0, 5.0))
    options: list[Fault] = [
        WorkerSlow(worker, begin_s, begin_s + length_s, factor),
        StoreSlow(begin_s, begin_s + length_s, factor),
        StoreDown(begin_s, begin_s + length_s),
    ]
    return draw(st.sampled_from(options))


@st.composite
def losses(draw: st.DrawFn, workers: int) -> list[Fault]:
    """At most one per worker, who comes back or not."""
    lost = draw(st.sets(st.integers(0, workers - 1)))
    return [
        WorkerLoss(worker, at_s, draw(st.sampled_from([None, at_s + 0.5, at_s + 8.0])))
        for worker in sorted(lost)
        for at_s in (draw(moments),)
    ]


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    output_tokens = draw(st.integers(1, 120))
    return Arrival(
        arrival_s=draw(moments),
        tenant=draw(st.sampled_from(["a", "b"])),
        adapter=draw(st.sampled_from([None, *POOL.adapters()])),
        prompt_tokens=draw(st.integers(1, 800)),
        output_tokens=output_tokens,
        max_output_tokens=output_tokens + draw(st.integers(0, 100)),
        priority=draw(st.integers(-1, 1)),
        deadline_s=draw(st.sampled_from([None, None, 2.0, 15.0])),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    workers = draw(st.integers(1, 3))
    requests = sorted(
        draw(st.lists(arrivals(), min_size=1, max_size=25)), key=lambda one: one.arrival_s
    )
    names = sorted(SYSTEMS)
    chosen = SYSTEMS[draw(st.sampled_from(names))]
    small = draw(st.booleans())
    if small:
        chunked = ReplicaConfig(stepping="chunked", prefill_tokens_per_step=128)
        chosen = system(chosen.policy, cluster=ClusterConfig(worker_grace_s=1.0), replica=chunked)
    return scenario(
        trace(*requests),
        system=chosen,
        hardware=card(draw(st.sampled_from([1700, 3000, 60_000]))),
        workers=workers,
        predictor=draw(predictors),
        faults=tuple(draw(losses(workers)) + draw(st.lists(faults(workers), max_size=2))),
        patience_s=draw(st.sampled_from([None, None, 10.0])),
        seed=draw(st.integers(0, 9)),
        window=Window(drain_s=2000.0),
    )


@given(scenarios())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_nothing_is_lost_or_counted_twice(world: Scenario) -> None:
    """`checks_integrity` asserts the machines' own invariants after every event, and at the end
    that nothing holds memory or quota for anyone.
    """
    result = simulate(world)
    assert [record.index for record in result.requests] == list(range(len(world.trace.arrivals)))
    for record in result.requests:
        assert record.outcome != "unfinished"
        assert record.tokens <= record.output_tokens
        assert (record.outcome == "done") == (record.tokens == record.output_tokens)
        assert (
            record.outcome == "done"
            or world.faults
            or record.outcome
            in {
                "deadline",
                "cancelled",
                "rejected",
            }
        )
