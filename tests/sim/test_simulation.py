"""Whole runs: determinism, exactness where it can be calculated, what faults may and may not do."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from bench.sim import (
    Accurate,
    Learned,
    Oracle,
    StoreDown,
    StoreSlow,
    Window,
    WorkerLoss,
    WorkerSlow,
    simulate,
)
from bench.workload import (
    AdapterPool,
    Gamma,
    Poisson,
    Popularity,
    Workload,
    build,
)
from bench.workload.arrivals import arrival_times_s
from services.core.config import ReplicaConfig
from services.core.systems import SYSTEMS
from tests.sim.sim_worlds import (
    POOL,
    WHOLE,
    arrival,
    card,
    conversations,
    scenario,
    system,
    trace,
)

ADAPTER = POOL.adapters()[4]  # rank 128
LINK_S = 0.0005


def test_the_same_scenario_gives_the_same_bytes_and_another_seed_does_not() -> None:
    noisy = replace(card(30_000), step_noise=0.1)
    faults = (WorkerLoss(0, at_s=5.0, back_s=9.0), WorkerSlow(1, 3.0, 8.0, factor=2.0))
    run = scenario(conversations(), hardware=noisy, workers=2, faults=faults, predictor=Learned())
    assert simulate(run).to_json() == simulate(run).to_json()
    assert simulate(run).to_json() != simulate(replace(run, seed=1)).to_json()


def test_an_idle_system_adds_nothing_but_its_links_to_the_cards_time() -> None:
    run = scenario(
        trace(arrival(1.0, adapter=ADAPTER), arrival(5.0, adapter=ADAPTER)),
        system=system(replica=WHOLE),
    )
    cold, warm = simulate(run).requests
    assert cold.ttft_s == pytest.approx(cold.isolated_cold_s + 3 * LINK_S)
    assert warm.ttft_s == pytest.approx(warm.isolated_warm_s + 3 * LINK_S)
    assert warm.slowdown == pytest.approx(warm.ttft_s / warm.isolated_cold_s)


def test_a_lone_request_decodes_at_the_cards_pace() -> None:
    run = scenario(trace(arrival(0.0, prompt_tokens=100, output_tokens=50)))
    (record,) = simulate(run).requests
    assert record.outcome == "done"
    assert record.e2e_s == pytest.approx(record.service_s + 3 * LINK_S, rel=1e-3)
    assert record.mean_tbt_s == pytest.approx(
        (record.service_s - record.isolated_warm_s) / 49, 1e-3
    )


def test_one_server_with_equal_requests_waits_as_an_m_d_1_queue_does() -> None:
    hardware = replace(card(), max_requests=1)
    service_s = hardware.isolated_ttft_s(300, None, is_cold=False)
    load = 0.7
    times_s = arrival_times_s(Poisson(load / service_s), 600.0, np.random.default_rng(5))
    arrivals = [arrival(float(time_s), output_tokens=1) for time_s in times_s]
    run = scenario(
        trace(*arrivals),
        hardware=hardware,
        system=system(replica=WHOLE),
        link_s=0.0,
        sample_s=None,
        checks_integrity=False,
    )
    waits_s = [record.wait_s for record in simulate(run).requests]
    assert len(waits_s) > 5000
    assert np.mean(waits_s) == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.1)


def test_every_token_arrives_once_although_memory_is_short() -> None:
    run = scenario(
        conversations(rate_rps=6.0),
        hardware=card(3_000),
        system=system("adaptive", replica=ReplicaConfig(prefill_tokens_per_step=512)),
        predictor=Learned(),
    )
    result = simulate(run)
    assert {record.outcome for record in result.requests} == {"done"}
    assert all(record.tokens == record.output_tokens for record in result.requests)
    assert sum(worker.evictions for worker in result.workers) > 0


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_gets_through_a_burst_in_little_memory(name: str) -> None:
    workload = Workload(arrivals=Gamma(3.0, 2.0), duration_s=15.0, scale=0.3, pool=AdapterPool(50))
    run = scenario(
        build(workload), system=SYSTEMS[name], hardware=card(4_000), predictor=Accurate(0.6)
    )
    result = simulate(run)
    assert {record.outcome for record in result.requests} == {"done"}
    assert all(record.tokens == record.output_tokens for record in result.requests)


def test_a_lost_workers_requests_go_on_at_another() -> None:
    faults = (WorkerLoss(0, at_s=10.0, back_s=20.0),)
    result = simulate(scenario(conversations(), workers=2, faults=faults))
    again = [record for record in result.requests if record.attempts > 1]
    assert again
    assert result.returns == len(again)
    assert all(record.outcome == "done" for record in result.requests)
    assert all(record.tokens == record.output_tokens for record in result.requests)
    assert [worker.worker_id for worker in result.workers] == [
        "worker-0.0",
        "worker-1.0",
        "worker-0.1",
    ]


def test_without_any_worker_requests_are_rejected_and_counted() -> None:
    faults = (WorkerLoss(0, at_s=5.0),)
    result = simulate(scenario(conversations(duration_s=10.0), faults=faults))
    outcomes = {record.outcome for record in result.requests}
    assert outcomes == {"done", "rejected"}
    assert {record.reason for record in result.requests} == {"", "NO_WORKER"}
    rejected = sum(record.outcome == "rejected" for record in result.requests)
    assert result.summary()["violations"] == rejected


def test_a_slow_worker_is_as_slow_as_stated() -> None:
    alone = trace(arrival(0.0, output_tokens=40))
    (usual,) = simulate(scenario(alone)).requests
    slow = (WorkerSlow(0, 0.0, 100.0, factor=3.0),)
    (slowed,) = simulate(scenario(alone, faults=slow)).requests
    assert slowed.e2e_s - 3 * LINK_S == pytest.approx(3 * (usual.e2e_s - 3 * LINK_S))


def test_an_adapter_that_is_not_in_host_memory_is_downloaded_first() -> None:
    cold = replace(card(), is_host_warm=False)
    one = trace(arrival(0.0, adapter=ADAPTER))
    run = scenario(one, hardware=cold, system=system(replica=WHOLE))
    expected_s = card().isolated_ttft_s(300, ADAPTER, is_cold=True) + 3 * LINK_S
    expected_s += cold.download_s(ADAPTER.size_bytes)
    (record,) = simulate(run).requests
    assert record.ttft_s == pytest.approx(expected_s)
    slow = replace(run, faults=(StoreSlow(0.0, 10.0, factor=4.0),))
    (slowed,) = simulate(slow).requests
    assert slowed.ttft_s - record.ttft_s == pytest.approx(3 * cold.download_s(ADAPTER.size_bytes))


def test_a_store_that_is_down_fails_those_who_need_it_and_no_others() -> None:
    cold = replace(card(), is_host_warm=False)
    other = POOL.adapters()[0]
    requests = trace(
        arrival(0.0, adapter=ADAPTER), arrival(6.0, adapter=other), arrival(6.0, adapter=ADAPTER)
    )
    run = scenario(requests, hardware=cold, faults=(StoreDown(5.0, 20.0),))
    outcomes = [(record.outcome, record.reason) for record in simulate(run).requests]
    assert outcomes == [("done", ""), ("failed", "unavailable"), ("done", "")]


def test_loads_that_block_stop_the_others_decoding_for_so_long() -> None:
    blocking = replace(card(), load_blocking=10.0)
    requests = trace(
        arrival(0.0, prompt_tokens=20, output_tokens=100), arrival(1.0, adapter=ADAPTER)
    )
    overlapping, stalling = (
        simulate(scenario(requests, hardware=hardware, system=system(replica=WHOLE))).requests[0]
        for hardware in (card(), blocking)
    )
    load_s = card().load_s(ADAPTER.size_bytes)
    assert stalling.max_gap_s - overlapping.max_gap_s > 4 * load_s
    assert stalling.e2e_s - overlapping.e2e_s == pytest.approx(10 * load_s, rel=0.15)


def test_a_request_leaves_at_its_deadline_and_takes_nothing_along() -> None:
    requests = trace(
        arrival(0.0, output_tokens=2000, deadline_s=3.0), arrival(1.0, output_tokens=10)
    )
    late, other = simulate(scenario(requests)).requests
    assert late.outcome == "deadline"
    assert late.end_s == pytest.approx(3.0)
    assert 0 < late.tokens < 2000
    assert other.outcome == "done"


def test_impatient_clients_leave_before_their_first_token() -> None:
    hardware = replace(card(), max_requests=1)
    requests = trace(arrival(0.0, output_tokens=200), arrival(0.1))
    first, second = simulate(scenario(requests, hardware=hardware, patience_s=2.0)).requests
    assert (first.outcome, second.outcome) == ("done", "cancelled")
    assert second.end_s == pytest.approx(2.1)


def test_what_is_left_at_the_end_counts_as_a_violation() -> None:
    run = scenario(
        trace(arrival(0.0, output_tokens=3000), arrival(0.0, output_tokens=2)),
        window=Window(drain_s=5.0),
    )
    result = simulate(run)
    assert [record.outcome for record in result.requests] == ["unfinished", "done"]
    figures = result.summary()
    assert figures["violations"] == 1
    assert figures["p99_e2e_s"] is None  # infinite
    assert figures["p50_ttft_s"] is not None


def test_requests_of_the_warm_up_are_in_no_figure() -> None:
    run = scenario(conversations(), window=Window(warmup_s=10.0))
    result = simulate(run)
    late = [record for record in result.requests if record.arrived_s >= 10.0]
    assert result.summary()["requests"] == len(late) < len(result.requests)


def test_the_timeline_shows_queues_and_memory_each_second() -> None:
    result = simulate(scenario(conversations(rate_rps=8.0), hardware=card(4_000)))
    times_s = [sample.time_s for sample in result.timeline]
    assert times_s == pytest.approx(list(range(len(times_s))))
    blocks = card(4_000).capacity.pool_blocks
    for sample in result.timeline:
        assert sample.kv_blocks + sample.adapter_blocks + sample.free_blocks == blocks
    assert max(queue.length for sample in result.timeline for queue in sample.queues) > 0


def test_many_workers_and_very_many_adapters_are_no_matter() -> None:
    workload = Workload(
        arrivals=Poisson(400.0),
        duration_s=3.0,
        scale=0.2,
        pool=AdapterPool(100_000),
        popularity=Popularity(exponent=0.8),
    )
    run = scenario(
        build(workload),
        system=system("adaptive"),
        workers=256,
        predictor=Oracle(),
        checks_integrity=False,
        window=Window(drain_s=120.0),
    )
    result = simulate(run)
    assert {record.outcome for record in result.requests} == {"done"}
    assert len(result.workers) == 256


def test_scenarios_and_results_travel_between_processes() -> None:
    run = scenario(conversations(duration_s=3.0))
    result = simulate(pickle.loads(pickle.dumps(run)))
    assert pickle.loads(pickle.dumps(result)) == simulate(run)
