"""True costs: the published points, and the arithmetic of the derived cards."""

import random

import pytest

from bench.sim import hardware
from bench.sim.hardware import Hardware
from bench.workload import AdapterPool
from services.core.types import Adapter
from services.worker.engine.profiles import PROFILES, StepLoad

# Times to first token of one request by adapter rank, as published; its prompt has the length that
# the fit was made with.
PUBLISHED_TTFT_MS = {8: 74.1, 16: 78.7, 32: 88.1, 64: 106.8, 128: 144.2}
PROMPT_TOKENS = 300


def adapter_of(rank: int) -> Adapter:
    return next(one for one in AdapterPool(5).adapters() if one.rank == rank)


@pytest.mark.parametrize(("rank", "published_ms"), PUBLISHED_TTFT_MS.items())
def test_a_lone_request_on_the_a40_takes_what_was_published(rank: int, published_ms: float) -> None:
    ttft_s = hardware("a40-llama-7b").isolated_ttft_s(PROMPT_TOKENS, adapter_of(rank), is_cold=True)
    assert ttft_s * 1000 == pytest.approx(published_ms, rel=0.02)


def test_loading_is_its_published_share_at_rank_128() -> None:
    card, adapter = hardware("a40-llama-7b"), adapter_of(128)
    ttft_s = card.isolated_ttft_s(PROMPT_TOKENS, adapter, is_cold=True)
    assert card.load_s(adapter.size_bytes) / ttft_s == pytest.approx(0.175, rel=0.02)
    base_s = card.isolated_ttft_s(PROMPT_TOKENS, None, is_cold=True)
    assert 1 - base_s / ttft_s == pytest.approx(0.598, rel=0.02)


def test_an_adapter_of_rank_32_has_64_mebibytes() -> None:
    assert adapter_of(32).size_bytes == 64 * 2**20


def test_a_step_adds_up_as_stated() -> None:
    load = StepLoad(
        prefill_tokens=200,
        prefill_rank_tokens=200 * 16,
        decode_sequences=10,
        decode_ranks=320,
        cached_tokens=5000,
        has_adapters=True,
    )
    expected_ms = 6 + 200 * 0.173 + 11.5 + 1.29e-3 * 3200 + 0.1 * 10 + 0.0042 * 320 + 1.08e-3 * 5000
    step_s = hardware("a40-llama-7b").step_s(load, random.Random(0))
    assert step_s * 1000 == pytest.approx(expected_ms)


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_has_memory_for_adapters_and_context(name: str) -> None:
    capacity = hardware(name).capacity
    assert capacity.pool_blocks * capacity.block_tokens > 2 * capacity.max_context_tokens


def test_faster_cards_are_faster_in_every_step() -> None:
    rng = random.Random(0)
    steps = (
        StepLoad(512, 512 * 32, 0, 0, 0, has_adapters=True),
        StepLoad(0, 0, 64, 64 * 32, 64 * 500, has_adapters=True),
    )
    for step in steps:
        a40, a100, h200 = (
            hardware(name).step_s(step, rng)
            for name in ("a40-llama-7b", "a100-llama-7b", "h200-llama-8b")
        )
        assert h200 < a100 < a40


def test_free_lora_kernels_leave_the_base_models_cost() -> None:
    card = hardware("a40-llama-7b").with_lora_scale(0.0)
    with_adapter_s = card.isolated_ttft_s(PROMPT_TOKENS, adapter_of(64), is_cold=False)
    assert with_adapter_s == card.isolated_ttft_s(PROMPT_TOKENS, None, is_cold=False)


def test_noise_keeps_the_median_and_repeats_with_its_seed() -> None:
    card = Hardware(PROFILES["a40-llama-7b"], step_noise=0.2)
    load = StepLoad(0, 0, 8, 0, 4000, has_adapters=False)
    draws = [card.step_s(load, random.Random(seed)) for seed in range(500)]
    assert sorted(draws)[250] == pytest.approx(card.profile.step_s(load), rel=0.05)
    assert draws[7] == card.step_s(load, random.Random(7))


def test_service_alone_is_the_sum_of_its_steps() -> None:
    card, adapter = hardware("a40-llama-7b"), adapter_of(32)
    total_s = card.isolated_ttft_s(100, adapter, is_cold=False)
    for i in range(1, 11):
        total_s += card.profile.step_s(StepLoad(0, 0, 1, 32, 100 + i - 1, has_adapters=True))
    assert card.isolated_service_s(100, 11, adapter) == pytest.approx(total_s, rel=1e-3)
