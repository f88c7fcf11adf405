"""Traces: the same for the same seed, and with the statistics that were asked for."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from bench.workload import (
    LENGTHS,
    AdapterPool,
    Arrivals,
    FromTrace,
    Gamma,
    OnOff,
    Poisson,
    Popularity,
    Workload,
    build,
    merged,
    public_data,
)
from bench.workload.arrivals import arrival_times_s


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[None]:
    readers = (public_data.read_arrivals, public_data.read_pairs, public_data.read_clients)
    monkeypatch.setenv("CALUMMA_SHARED", str(tmp_path))
    for reader in readers:
        reader.cache_clear()
    yield
    for reader in readers:
        reader.cache_clear()


def needs(path: str) -> None:
    if not (public_data.data_folder() / path).is_file():
        pytest.skip(f"{path} is not in the data folder")


def test_the_same_seed_gives_the_same_trace_and_another_gives_another() -> None:
    workload = Workload(duration_s=60)
    assert build(workload, seed=3) == build(workload, seed=3)
    assert build(workload, seed=3) != build(workload, seed=4)


def test_a_higher_rate_only_brings_the_same_requests_sooner() -> None:
    slow = build(Workload(arrivals=Poisson(2.0), duration_s=100, max_output="actual"))
    fast = build(Workload(arrivals=Poisson(4.0), duration_s=50, max_output="actual"))
    assert len(slow.arrivals) == len(fast.arrivals)
    for one, other in zip(slow.arrivals, fast.arrivals, strict=True):
        assert replace(one, arrival_s=0.0) == replace(other, arrival_s=0.0)
        assert one.arrival_s == pytest.approx(2 * other.arrival_s)


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [(Poisson(20.0), 1.0), (Gamma(20.0, 3.0), 3.0), (FromTrace(20.0), None)],
)
def test_arrivals_have_their_rate_and_variation(arrivals: Arrivals, cv: float | None) -> None:
    times_s = arrival_times_s(arrivals, 2000.0, np.random.default_rng(1))
    assert len(times_s) / 2000 == pytest.approx(20.0, rel=0.1)
    assert (np.diff(times_s) >= 0).all()
    if cv is not None:
        gaps_s = np.diff(times_s)
        assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.1)


def test_bursts_come_when_they_should_and_keep_the_mean() -> None:
    arrivals = OnOff(10.0, burst=3.0, on_s=20.0, period_s=100.0)
    times_s = arrival_times_s(arrivals, 10_000.0, np.random.default_rng(2))
    in_burst = (times_s % 100.0 < 20.0).sum()
    assert len(times_s) == pytest.approx(100_000, rel=0.02)
    assert in_burst == pytest.approx(100 * 20 * 30, rel=0.03)


def test_adapters_have_their_ranks_evenly_and_favourites_within_a_rank() -> None:
    trace = build(Workload(arrivals=Poisson(100.0), duration_s=200))
    ranks = Counter(one.adapter.rank for one in trace.arrivals if one.adapter)
    assert set(ranks) == {8, 16, 32, 64, 128}
    assert max(ranks.values()) < 1.15 * min(ranks.values())
    of_rank = Counter(
        one.adapter for one in trace.arrivals if one.adapter and one.adapter.rank == 8
    )
    first, second = (count for _, count in of_rank.most_common(2))
    assert first == pytest.approx(2 * second, rel=0.2)  # 1/1 against 1/2


def test_the_hot_set_shifts() -> None:
    popularity = Popularity(exponent=2.0, shift_s=50.0)
    trace = build(Workload(arrivals=Poisson(50.0), duration_s=100, popularity=popularity))
    halves = [
        Counter(one.adapter for one in trace.arrivals if (one.arrival_s < 50) == is_first)
        for is_first in (True, False)
    ]
    hot, hot_later = ({adapter for adapter, _ in half.most_common(5)} for half in halves)
    assert not hot & hot_later


def test_a_scan_goes_through_all_adapters() -> None:
    popularity = Popularity(scan_share=1.0)
    pool = AdapterPool(50)
    trace = build(Workload(duration_s=60, pool=pool, popularity=popularity))
    assert [one.adapter for one in trace.arrivals[:50]] == list(pool.adapters())


def test_some_requests_ask_for_the_base_model() -> None:
    trace = build(Workload(duration_s=300, popularity=Popularity(base_share=0.3)))
    share = sum(one.adapter is None for one in trace.arrivals) / len(trace.arrivals)
    assert share == pytest.approx(0.3, abs=0.05)


def test_long_requests_are_cut_to_the_context_and_limits_hold() -> None:
    workload = Workload(duration_s=300, context_tokens_max=1000, max_output=500)
    for one in build(workload).arrivals:
        assert one.prompt_tokens + one.max_output_tokens <= 1000
        assert one.output_tokens <= one.max_output_tokens


def test_scaling_scales_both_lengths() -> None:
    whole, half = (
        build(Workload(duration_s=300, scale=scale, max_output="actual")) for scale in (1.0, 0.5)
    )
    for one, other in zip(whole.arrivals[:50], half.arrivals[:50], strict=True):
        if one.prompt_tokens + one.output_tokens < 4096:
            assert other.prompt_tokens == max(1, round(one.prompt_tokens / 2))
            assert other.output_tokens == max(1, round(one.output_tokens / 2))


def test_a_noisy_tenant_does_not_change_the_others_requests() -> None:
    quiet = build(Workload(tenant="quiet", arrivals=Poisson(1.0), duration_s=100), seed=1)
    noisy = build(Workload(tenant="noisy", arrivals=Poisson(50.0), duration_s=100), seed=2)
    both = merged("noisy", [quiet, noisy])
    assert [one for one in both.arrivals if one.tenant == "quiet"] == list(quiet.arrivals)
    assert len(both.arrivals) == len(quiet.arrivals) + len(noisy.arrivals)
    assert both.adapters == quiet.adapters


def test_a_hundred_thousand_adapters_are_distinct() -> None:
    adapters = AdapterPool(100_000).adapters()
    assert len({adapter.digest for adapter in adapters}) == 100_000


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.usefixtures("no_data")
def test_without_the_data_fitted_generators_take_over(name: str) -> None:
    trace = build(Workload(lengths=name, arrivals=Poisson(50.0), duration_s=60))
    assert len(trace.arrivals) > 2000


@pytest.mark.usefixtures("no_data")
def test_the_fitted_conversations_have_the_published_statistics() -> None:
    trace = build(Workload(arrivals=Poisson(100.0), duration_s=300, context_tokens_max=100_000))
    prompts = [one.prompt_tokens for one in trace.arrivals]
    outputs = [one.output_tokens for one in trace.arrivals]
    assert np.mean(prompts) == pytest.approx(1155, rel=0.08)
    assert np.quantile(prompts, [0.5, 0.9]) == pytest.approx([1020, 2734], rel=0.05)
    assert np.mean(outputs) == pytest.approx(211, rel=0.05)
    assert np.quantile(outputs, [0.5, 0.9, 0.99]) == pytest.approx([129, 424, 601], rel=0.1)


def test_the_recorded_conversations_have_the_published_statistics() -> None:
    needs("azure/AzureLLMInferenceTrace_conv.csv.gz")
    trace = build(Workload(arrivals=Poisson(100.0), duration_s=300, context_tokens_max=100_000))
    outputs = [one.output_tokens for one in trace.arrivals]
    assert np.mean([one.prompt_tokens for one in trace.arrivals]) == pytest.approx(1155, rel=0.03)
    assert np.quantile(outputs, [0.5, 0.9]) == pytest.approx([129, 424], rel=0.05)


def test_servegens_clients_differ_in_length_and_rate() -> None:
    needs("servegen/m-large.npz")
    workload = Workload(
        lengths="servegen-m-large",
        arrivals=Poisson(100.0),
        duration_s=100,
        popularity=Popularity(adapters="clients"),
        max_output="actual",
    )
    trace = build(workload)
    by_adapter = Counter(one.adapter for one in trace.arrivals)
    assert by_adapter.most_common(1)[0][1] > 5 * len(trace.arrivals) / len(trace.adapters)
