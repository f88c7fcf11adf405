"""What work is believed to cost, against values worked out by hand."""

import pytest

from services.core.costs import StepCosts, StepShape
from tests.unit.core.core_world import adapter, request

# Round numbers, one decimal place apiece, so that a sum shows what is in it.
COSTS = StepCosts(
    step_s=1.0,
    prefill_s=0.5,
    prefill_token_s=0.01,
    prefill_rank_token_s=0.001,
    decode_sequence_s=0.1,
    decode_rank_s=0.02,
    cached_token_s=0.0001,
    load_byte_s=0.002,
    batch=4.0,
)


@pytest.mark.parametrize(
    ("shape", "seconds"),
    [
        (StepShape(), 1.0),
        (StepShape(decode_sequences=3), 1.3),
        (StepShape(decode_sequences=3, decode_ranks=24, cached_tokens=1000), 1.88),
        (StepShape(prefill_tokens=50), 2.0),
        (StepShape(prefill_tokens=50, prefill_rank_tokens=50 * 8), 2.4),
        (
            StepShape(
                prefill_tokens=50,
                prefill_rank_tokens=400,
                decode_sequences=3,
                decode_ranks=24,
                cached_tokens=1000,
            ),
            3.28,
        ),
    ],
)
def test_a_step_costs_the_sum_of_what_it_computes(shape: StepShape, seconds: float) -> None:
    assert COSTS.step_time_s(shape) == pytest.approx(seconds)


def test_a_prompt_alone_is_a_step_with_nothing_but_prompt() -> None:
    assert COSTS.prompt_s(50, 0) == pytest.approx(2.0)
    assert COSTS.prompt_s(50, 8) == pytest.approx(2.4)
    shape = StepShape(prefill_tokens=50, prefill_rank_tokens=50 * 8)
    assert COSTS.prompt_s(50, 8) == pytest.approx(COSTS.step_time_s(shape))


def test_a_prompt_never_takes_negative_time() -> None:
    assert StepCosts(step_s=0.01, prefill_s=-1.0).prompt_s(10, 8) == 0.0


def test_a_load_is_in_proportion_to_the_bytes() -> None:
    assert COSTS.load_s(adapter(blocks=3)) == pytest.approx(6.0)


def test_decoding_shares_the_fixed_cost_of_steps_and_reads_half_of_its_output_on_average() -> None:
    # Per token 1.0 / 4 + 0.1 + 0.0001 · (100 + 40 / 2) = 0.362, and 0.02 · 8 more by rank.
    assert COSTS.decode_s(request("a", context=100, output=40)) == pytest.approx(40 * 0.362)
    tuned = request("b", using=adapter(rank=8), context=100, output=40)
    assert COSTS.decode_s(tuned) == pytest.approx(40 * 0.522)


def test_a_batch_below_one_is_taken_as_one() -> None:
    alone = StepCosts(step_s=1.0, decode_sequence_s=0.0, cached_token_s=0.0, batch=0.0)
    assert alone.decode_s(request("a", output=3)) == pytest.approx(3.0)


def test_service_is_load_prompt_and_what_is_left_to_decode() -> None:
    one = request("a", using=adapter(blocks=3, rank=8), context=100, output=40, prior=10)
    # Prompt 1.5 + 100 · 0.018 = 3.3; 30 tokens of 1.0 / 4 + 0.1 + 0.16 + 0.0001 · 115.
    assert COSTS.service_s(one) == pytest.approx(3.3 + 30 * 0.5215)
    assert COSTS.service_s(one, is_near=False) == pytest.approx(6.0 + 3.3 + 30 * 0.5215)


def test_the_base_model_loads_nothing() -> None:
    one = request("a", context=100, output=40)
    assert COSTS.service_s(one, is_near=False) == COSTS.service_s(one)
