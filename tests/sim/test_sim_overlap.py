"""Prompts that are computed while their adapter comes: who gains, and that nobody loses."""

from dataclasses import replace

import pytest

from bench.sim import Hardware, Scenario, StoreDown, StoreSlow, WorkerLoss, simulate
from bench.sim.records import RequestRecord
from bench.workload import AdapterPool, Poisson, Workload, build
from services.core.config import ReplicaConfig
from services.core.types import Reserve
from tests.sim.sim_worlds import POOL, arrival, card, scenario, system, trace

ADAPTER = POOL.adapters()[4]  # rank 128: 256 MiB
COLD = replace(card(), is_host_warm=False)
SLOW_STORE = replace(COLD, store_bytes_per_s=0.25e9)
PROMPT_TOKENS = 1500
# Fast links to the device, so that a step's time is all that there is besides the load.
LINKS_S = 0.01


def overlapping(hardware: Hardware) -> Hardware:
    return replace(hardware, overlaps_prefill=True)


def alone(hardware: Hardware) -> RequestRecord:
    """The only request, with an adapter that must be downloaded."""
    world = trace(arrival(1.0, adapter=ADAPTER, prompt_tokens=PROMPT_TOKENS))
    (record,) = simulate(scenario(world, hardware=hardware)).requests
    return record


def beside_decodes(run: Scenario) -> RequestRecord:
    """The first of its requests, which decodes while the others come."""
    return simulate(run).requests[0]


@pytest.mark.parametrize("hardware", [COLD, SLOW_STORE])
def test_a_cold_request_gets_its_first_token_earlier(hardware: Hardware) -> None:
    whole, parts = alone(hardware), alone(overlapping(hardware))
    load_s = hardware.download_s(ADAPTER.size_bytes) + hardware.load_s(ADAPTER.size_bytes)
    hidden_s = whole.ttft_s - parts.ttft_s
    assert hidden_s > 0.6 * min(load_s, whole.isolated_warm_s)


def test_with_a_slow_store_little_is_left_to_do_once_the_adapter_is_there() -> None:
    """A quarter of the layers of the first chunk, and whatever is beyond that chunk."""
    record = alone(overlapping(SLOW_STORE))
    load_s = SLOW_STORE.download_s(ADAPTER.size_bytes) + SLOW_STORE.load_s(ADAPTER.size_bytes)
    assert record.ttft_s - load_s < 0.4 * record.isolated_warm_s


def test_an_adapter_in_host_memory_that_loads_within_a_step_is_not_loaded_in_parts() -> None:
    assert alone(overlapping(card())).ttft_s == alone(card()).ttft_s


def test_others_steps_are_no_longer_than_beside_a_prompt_whose_adapter_is_there() -> None:
    decoding = arrival(0.0, prompt_tokens=20, output_tokens=400)
    cold = arrival(3.0, adapter=ADAPTER, prompt_tokens=PROMPT_TOKENS, output_tokens=5)
    world = trace(decoding, cold)
    warm_gap_s = beside_decodes(scenario(world, hardware=card())).max_gap_s
    for hardware in (COLD, SLOW_STORE):
        record = beside_decodes(scenario(world, hardware=overlapping(hardware)))
        assert record.max_gap_s <= 1.1 * warm_gap_s


def test_a_store_that_stops_halfway_holds_nobody_back() -> None:
    """The first request's download takes half a minute; the second one needs none."""
    stopped = (StoreSlow(0.0, 2.0, factor=100.0),)
    world = trace(
        arrival(1.0, adapter=ADAPTER, prompt_tokens=PROMPT_TOKENS), arrival(10.0, output_tokens=50)
    )
    run = scenario(world, hardware=overlapping(COLD), faults=stopped)
    slow, other = simulate(run).requests
    assert slow.outcome == "done"
    assert other.ttft_s < other.isolated_warm_s + LINKS_S


@pytest.mark.parametrize(
    "replica",
    [
        ReplicaConfig(reserve=Reserve.PREDICTED),
        ReplicaConfig(stepping="chunked", keeps_idle_adapters=False),
        ReplicaConfig(stepping="chunked", admission="slora", keeps_idle_adapters=False),
        ReplicaConfig(overlap_min_share=0.01, tbt_target_s=0.03),
    ],
)
def test_every_request_gets_its_tokens_whatever_fails(replica: ReplicaConfig) -> None:
    """Hundreds of cold loads, with a small pool, a worker lost, and a store that fails."""
    workload = Workload(arrivals=Poisson(6.0), duration_s=40.0, pool=AdapterPool(200), scale=0.3)
    hardware = overlapping(replace(SLOW_STORE, host_cache_bytes=2**30).with_pool_tokens(12_000))
    faults = (WorkerLoss(0, at_s=15.0, back_s=18.0), StoreDown(25.0, 28.0))
    run = scenario(
        build(workload, seed=3),
        hardware=hardware,
        system=system(replica=replica),
        workers=2,
        faults=faults,
    )
    records = simulate(run).requests
    for record in records:
        assert record.outcome in {"done", "failed"}
        if record.outcome == "done":
            assert record.tokens == record.output_tokens
        else:
            assert record.reason == "unavailable"
    assert sum(record.outcome == "done" for record in records) > 0.7 * len(records)
