"""Draws on the device are those of the host's sampler, from the same logits."""

import itertools
from dataclasses import replace

import pytest
import torch

from services.worker.engine.api import Sampling
from services.worker.engine.cuda_sampler import draw_on_device
from services.worker.engine.sampling import SamplingRow, sample

VOCAB = 1000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.3, top_k=40),
    Sampling(temperature=0.9, min_p=0.05),
    Sampling(temperature=1.1, top_k=20, top_p=0.8, min_p=0.01),
    Sampling(temperature=1e-4, top_p=0.5),
    Sampling(presence_penalty=2.0, frequency_penalty=0.3),
    Sampling(temperature=0.8, repetition_penalty=1.7, presence_penalty=-0.5),
    Sampling(repetition_penalty=0.6),
    Sampling(temperature=2.0, min_tokens=50, suppressed_ids=tuple(range(0, VOCAB, 2))),
    Sampling(min_tokens=50, suppressed_ids=tuple(range(500))),
]


def _logits(rows: int, *, seed: int = 0, sharpness: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCAB, generator=generator) * sharpness


def _row(sampling: Sampling, index: int) -> SamplingRow:
    tokens = [(index * 37 + 11 * i * i) % VOCAB for i in range(30)]
    return SamplingRow(sampling, tokens, prompt_tokens=10)


def _rows(count: int) -> list[SamplingRow]:
    choices = itertools.cycle(SAMPLINGS)
    return [_row(replace(next(choices), seed=100 + i), i) for i in range(count)]


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_settings_draw_what_the_host_draws(dtype: torch.dtype, sharpness: float) -> None:
    rows = _rows(7 * len(SAMPLINGS))
    logits = _logits(len(rows), sharpness=sharpness).to(dtype)
    assert draw_on_device(logits.to(DEVICE), rows) == sample(logits, rows)


def test_log_probabilities_are_those_of_the_host() -> None:
    asked = [Sampling(logprobs=0), Sampling(logprobs=7), Sampling(), Sampling(logprobs=VOCAB + 5)]
    rows = [_row(sampling, i) for i, sampling in enumerate(asked)]
    logits = _logits(len(rows))
    for got, expected in zip(
        draw_on_device(logits.to(DEVICE), rows), sample(logits, rows), strict=True
    ):
        assert got is not None
        assert expected is not None
        assert got.token_id == expected.token_id
        assert got.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [token_id for token_id, _ in got.top] == [token_id for token_id, _ in expected.top]
        assert [p for _, p in got.top] == pytest.approx([p for _, p in expected.top], abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_row_that_is_not_finite_draws_nothing(sampling: Sampling, value: float) -> None:
    rows = [_row(sampling, 0), _row(sampling, 1)]
    logits = _logits(2)
    logits[1, 500] = value
    drawn = draw_on_device(logits.to(DEVICE), rows)
    assert drawn == [*sample(logits[:1], rows[:1]), None]


def test_a_draw_does_not_depend_on_its_mates() -> None:
    rows = _rows(50)
    logits = _logits(len(rows))
    together = draw_on_device(logits.to(DEVICE), rows)
    alone = [
        draw_on_device(logits[i : i + 1].to(DEVICE), rows[i : i + 1])[0] for i in range(len(rows))
    ]
    assert together == alone


def test_of_equal_scores_the_lowest_id_is_taken() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [400, 700]] = 5.0
    drawn = draw_on_device(logits.to(DEVICE), [_row(Sampling(), 0)])[0]
    assert drawn is not None
    assert drawn.token_id == 400
