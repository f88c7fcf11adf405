"""What a request is expected to take, against hand-computed values."""

import pytest

from services.core.costs import StepCosts
from services.core.resource_profile import KvShape, profile_of, uellm_kv_bytes
from tests.unit.core.core_world import adapter, request


@pytest.mark.parametrize(
    ("shape", "hidden", "token_bytes", "factor"),
    [
        (KvShape(layers=32, kv_heads=32, head_dim=128), 4096, 524_288, 1.0),  # Llama-7B
        (KvShape(layers=30, kv_heads=3, head_dim=64), 576, 23_040, 3.0),  # SmolLM2-135M: 9 / 3
        (KvShape(layers=32, kv_heads=8, head_dim=128), 4096, 131_072, 4.0),  # Llama-3-8B: 32 / 8
        (KvShape(layers=28, kv_heads=2, head_dim=128), 4096, 28_672, 16.0),  # ChatGLM2-6B: 32 / 2
        (KvShape(layers=32, kv_heads=32, head_dim=128, element_bytes=4), 4096, 1_048_576, 0.5),
    ],
)
def test_grouped_queries_and_wide_elements_are_what_uellms_formula_gets_wrong(
    shape: KvShape, hidden: int, token_bytes: int, factor: float
) -> None:
    assert shape.token_bytes == token_bytes
    theirs = uellm_kv_bytes(sequences=10, layers=shape.layers, hidden=hidden, tokens=700)
    assert theirs == factor * 10 * 700 * token_bytes


def test_a_profile_counts_kv_adapter_prefill_and_decode() -> None:
    costs = StepCosts(
        step_s=0.04,
        prefill_s=0.01,
        prefill_token_s=1e-3,
        prefill_rank_token_s=1e-5,
        decode_sequence_s=1e-3,
        decode_rank_s=1e-4,
        cached_token_s=1e-6,
        batch=8.0,
    )
    shape = KvShape(layers=30, kv_heads=3, head_dim=64)
    profile = profile_of(
        request("a", context=200, output=100, using=adapter(blocks=3, rank=16)), shape, costs
    )
    assert profile.kv_bytes == 300 * 23_040
    assert profile.adapter_bytes == 3000
    assert profile.prefill_s == pytest.approx(0.05 + 200 * (1e-3 + 16e-5))
    assert profile.decode_s == pytest.approx(100 * (0.04 / 8 + 1e-3 + 16e-4 + 250e-6))


def test_a_request_that_comes_back_needs_its_whole_context_and_what_is_left_of_its_output() -> None:
    shape = KvShape(layers=1, kv_heads=1, head_dim=1)
    back = request("a", number=2, context=250, output=100, prior=50)
    profile = profile_of(back, shape, StepCosts())
    assert profile.kv_bytes == 4 * (250 + 50)
    assert profile.adapter_bytes == 0


@pytest.mark.parametrize("field", ["layers", "kv_heads", "head_dim", "element_bytes"])
def test_a_shape_of_zero_is_refused(field: str) -> None:
    shape = {"layers": 1, "kv_heads": 1, "head_dim": 1, "element_bytes": 2, field: 0}
    with pytest.raises(ValueError, match=f"{field} must be positive"):
        KvShape(**shape)
