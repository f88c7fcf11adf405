"""Weighted request sizes and adapters as tokens, against values computed by hand."""

import pytest

from services.core.sizes import (
    Maxima,
    SizeWeights,
    adapter_tokens,
    maxima_of,
    output_tokens,
    weighted_size,
)
from tests.unit.core.chameleon_world import adapter, request

MAXIMA = Maxima(input_tokens=2000, output_tokens=500, adapter_bytes=256_000)
LLAMA_7B_TOKEN_BYTES = 2 * 32 * 4096 * 2  # keys and values, layers, width, fp16


def test_the_degree_2_size_multiplies_the_lengths_by_the_adapter() -> None:
    # (0.4 * 1000/2000 + 0.6 * 250/500) * 64/256 = (0.2 + 0.3) * 0.25
    sized = request("r", context=1000, output=250, using=adapter("a", 64))
    assert weighted_size(sized, MAXIMA, SizeWeights()) == pytest.approx(0.125)


def test_the_linear_size_adds_the_three_terms() -> None:
    # 0.4 * 1000/2000 + 0.6 * 250/500 + 0.5 * 64/256 = 0.2 + 0.3 + 0.125
    sized = request("r", context=1000, output=250, using=adapter("a", 64))
    assert weighted_size(sized, MAXIMA, SizeWeights(form="linear")) == pytest.approx(0.625)


def test_the_largest_of_all_has_size_1() -> None:
    sized = request("r", context=2000, output=500, using=adapter("a", 256))
    assert weighted_size(sized, MAXIMA, SizeWeights()) == pytest.approx(1.0)


def test_a_request_without_adapter_counts_as_one_with_the_smallest_rank() -> None:
    base = request("r", context=2000, output=500)
    smallest = request("s", context=2000, output=500, using=adapter("a", 16))  # 8 of 128
    assert weighted_size(base, MAXIMA, SizeWeights()) == pytest.approx(1 / 16)
    assert weighted_size(smallest, MAXIMA, SizeWeights()) == pytest.approx(1 / 16)


def test_a_request_that_comes_back_keeps_its_size() -> None:
    first = request("r", context=1000, output=250)
    again = request("r", number=2, context=1100, prior=100, output=250)
    assert weighted_size(first, MAXIMA, SizeWeights()) == weighted_size(
        again, MAXIMA, SizeWeights()
    )


@pytest.mark.parametrize(("predicted", "counted"), [(-5, 1), (0, 1), (250, 250), (10**9, 1000)])
def test_a_senseless_prediction_stays_within_what_may_be_generated(
    predicted: int, counted: int
) -> None:
    assert output_tokens(request("r", output=predicted)) == counted


def test_maxima_leave_out_the_rarest_requests() -> None:
    usual = [request(f"r{n}", context=100 + n % 10, output=20) for n in range(1998)]
    rare = [request("x", context=14_050, output=900, using=adapter("a", 7))] * 2
    assert maxima_of(usual + rare, 0.99) == Maxima(109, 20, 1)  # no adapter: 1 byte, not 0
    assert maxima_of(usual + rare, 1.0) == Maxima(14_050, 900, 7000)


@pytest.mark.parametrize(("rank", "cells"), [(8, 32), (16, 64), (32, 128), (64, 256), (128, 512)])
def test_an_adapter_of_llama_7b_takes_four_cells_per_rank(rank: int, cells: int) -> None:
    size_bytes = 32 * 4 * 2 * 4096 * rank * 2  # layers, q k v o, A and B, width, rank, fp16
    lora = adapter("a", 0, rank)
    lora = type(lora)(lora.digest, rank, size_bytes)
    assert adapter_tokens(lora, LLAMA_7B_TOKEN_BYTES) == cells == 4 * rank


def test_a_part_of_a_token_is_charged_whole_and_no_adapter_nothing() -> None:
    assert adapter_tokens(adapter("a", 3), 1001.0) == 3
    assert adapter_tokens(adapter("a", 3), 999.0) == 4
    assert adapter_tokens(None, 1000.0) == 0
