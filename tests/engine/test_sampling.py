"""What is drawn, from given logits."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from services.worker.engine import Sampling
from services.worker.engine.randomness import uniform
from services.worker.engine.sampling import Draw, SamplingRow, sample

_VOCAB = 1000
_LOGITS = torch.randn(_VOCAB, generator=torch.Generator().manual_seed(1)) * 3
_ORDER = _LOGITS.argsort(descending=True).tolist()
_PROBABILITIES = torch.softmax(_LOGITS, -1)
_HOT = Sampling(temperature=1.0)


def _draw_one(
    sampling: Sampling,
    *,
    output: Sequence[int] = (),
    prompt: Sequence[int] = (0,),
    logits: Tensor = _LOGITS,
) -> Draw:
    row = SamplingRow(sampling, [*prompt, *output], len(prompt))
    (draw,) = sample(logits.unsqueeze(0), [row])
    assert draw is not None
    return draw


def _draws(sampling: Sampling, count: int) -> list[int]:
    """The same distribution drawn from under many seeds."""
    rows = [SamplingRow(dataclasses.replace(sampling, seed=i), [0], 1) for i in range(count)]
    return [draw.token_id for draw in sample(_LOGITS.expand(count, _VOCAB), rows) if draw]


def test_uniform_numbers_are_uniform_and_differ_by_seed_and_counter() -> None:
    numbers = np.array([[uniform(seed, n) for n in range(100)] for seed in range(100)])
    assert 0.0 <= numbers.min() < numbers.max() < 1.0
    assert len(np.unique(numbers)) == numbers.size
    assert abs(numbers.mean() - 0.5) < 0.01
    assert np.abs(numbers.mean(axis=0) - 0.5).max() < 0.13
    assert np.abs(np.corrcoef(numbers)[~np.eye(100, dtype=bool)]).max() < 0.5


def test_greedy_takes_the_most_likely() -> None:
    assert _draw_one(Sampling()).token_id == _ORDER[0]
    assert _draw_one(Sampling(), logits=_LOGITS.bfloat16()).logprob is None


def test_draws_follow_the_distribution() -> None:
    counts = np.bincount(_draws(_HOT, 20_000), minlength=_VOCAB)
    for token in _ORDER[:10]:
        p = float(_PROBABILITIES[token])
        assert abs(counts[token] / 20_000 - p) < 5 * math.sqrt(p * (1 - p) / 20_000)


def test_a_low_temperature_draws_the_most_likely() -> None:
    assert set(_draws(Sampling(temperature=1e-5), 50)) == {_ORDER[0]}


@pytest.mark.parametrize("top_k", [1, 2, 7])
def test_top_k_keeps_the_k_most_likely(top_k: int) -> None:
    assert set(_draws(Sampling(temperature=2.0, top_k=top_k), 400)) == set(_ORDER[:top_k])


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(top_p: float) -> None:
    mass = _PROBABILITIES[_ORDER].double().cumsum(0)
    nucleus = _ORDER[: int((mass < top_p).sum()) + 1]
    counts = np.bincount(_draws(Sampling(temperature=1.0, top_p=top_p), 4000), minlength=_VOCAB)
    assert set(np.flatnonzero(counts)) <= set(nucleus)
    share = float(_PROBABILITIES[_ORDER[0]] / mass[len(nucleus) - 1])
    assert abs(counts[_ORDER[0]] / 4000 - share) < 0.05


def test_top_p_works_on_what_top_k_leaves() -> None:
    first, second = _PROBABILITIES[_ORDER[:2]].tolist()
    only_first = first / (first + second) - 0.01
    assert set(_draws(Sampling(temperature=1.0, top_k=2, top_p=only_first), 50)) == {_ORDER[0]}
    both = first / (first + second) + 0.01
    drawn = _draws(Sampling(temperature=1.0, top_k=2, top_p=both), 300)
    assert set(drawn) == set(_ORDER[:2])


def test_min_p_keeps_what_is_likely_enough() -> None:
    allowed = {i for i in range(_VOCAB) if _PROBABILITIES[i] >= 0.2 * _PROBABILITIES.max()}
    assert set(_draws(Sampling(temperature=1.0, min_p=0.2), 2000)) == allowed


def test_a_draw_does_not_depend_on_batch_mates() -> None:
    settings = [
        _HOT,
        Sampling(),
        Sampling(temperature=0.7, top_p=0.9),
        Sampling(temperature=1.3, top_k=20, repetition_penalty=1.2),
    ]
    rows = [
        SamplingRow(dataclasses.replace(settings[i % 4], seed=i), [5, 6, 7 + i], 1)
        for i in range(24)
    ]
    logits = torch.randn(24, _VOCAB, generator=torch.Generator().manual_seed(2))
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(24)]
    assert together == sample(logits.flip(0), rows[::-1])[::-1]


def test_seed_and_position_both_count() -> None:
    assert len(set(_draws(_HOT, 40))) > 5
    positions = {_draw_one(_HOT, output=range(n)).token_id for n in range(40)}
    assert len(positions) > 5


def test_presence_penalty_counts_once_and_frequency_penalty_each_time() -> None:
    best, second = _ORDER[:2]
    gap = float(_LOGITS[best] - _LOGITS[second])
    presence = Sampling(presence_penalty=gap * 0.6)
    assert _draw_one(presence, output=[best, best]).token_id == best
    frequency = Sampling(frequency_penalty=gap * 0.6)
    assert _draw_one(frequency, output=[best]).token_id == best
    assert _draw_one(frequency, output=[best, best]).token_id == second
    assert _draw_one(frequency, prompt=[best, best]).token_id == best  # the prompt is not output


def test_repetition_penalty_counts_the_prompt_and_shrinks_either_sign() -> None:
    best, second = _ORDER[:2]
    ratio = float(_LOGITS[best] / _LOGITS[second])
    sampling = Sampling(repetition_penalty=ratio * 1.01)
    assert _draw_one(sampling, prompt=[best]).token_id == second
    assert _draw_one(sampling, prompt=[_ORDER[5]]).token_id == best
    negative = -_LOGITS.abs() - 1.0
    best = int(negative.argmax())
    strong = Sampling(repetition_penalty=2.0)
    assert _draw_one(strong, prompt=[best], logits=negative).token_id != best


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_suppressed_ids_wait_for_min_tokens(temperature: float) -> None:
    eos = _ORDER[0]
    sampling = Sampling(
        temperature=temperature, top_k=1, min_tokens=3, suppressed_ids=(eos, _ORDER[1])
    )
    assert _draw_one(sampling, output=[9, 9]).token_id == _ORDER[2]
    assert _draw_one(sampling, output=[9, 9, 9]).token_id == eos


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    sampling = Sampling(
        temperature=2.0, top_k=5, presence_penalty=1.0, repetition_penalty=1.5, logprobs=3
    )
    draw = _draw_one(sampling, output=[_ORDER[0], 4])
    expected = torch.log_softmax(_LOGITS.double(), -1)
    assert draw.logprob == pytest.approx(float(expected[draw.token_id]), abs=1e-5)
    assert [token for token, _ in draw.top] == _ORDER[:3]
    for token, logprob in draw.top:
        assert logprob == pytest.approx(float(expected[token]), abs=1e-5)


def test_logprobs_of_the_chosen_token_alone() -> None:
    draw = _draw_one(Sampling(logprobs=0))
    assert draw.logprob is not None
    assert draw.top == ()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_spoil_their_own_row_only(bad: float) -> None:
    logits = torch.stack([_LOGITS] * 4)
    logits[1, 77] = bad
    rows = [SamplingRow(sampling, [0], 1) for sampling in (Sampling(), _HOT, _HOT, Sampling())]
    draws = sample(logits, rows)
    assert draws[1] is None
    assert [draws[i] for i in (0, 2, 3)] == [
        sample(logits[i : i + 1], rows[i : i + 1])[0] for i in (0, 2, 3)
    ]
