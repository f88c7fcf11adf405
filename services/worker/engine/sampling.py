"""From logits to tokens.

A draw is a function of the logits, the sequence's settings, its own tokens and one uniform number
that is hashed from (seed, position): neither batch mates nor a restart change it. Greedy rows with
nothing switched on take one argmax over the batch. Everything is fp32 from the logits on.

The nucleus is found without sorting the vocabulary: a floor is lowered until the tokens above it
hold enough mass, and only those are sorted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.worker.engine.api import Sampling
from services.worker.engine.randomness import uniform

_BLOCK = 256  # tokens whose probabilities are summed before the search for a draw

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """A sequence that wants a token: its settings and all its tokens so far."""

    sampling: Sampling
    token_ids: Sequence[int]
    prompt_tokens: int

    @property
    def output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Draw:
    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class HostScores:
    """Logits `[rows, vocab]` of which all are at hand. See `Scores`."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def draw(self, rows: Sequence[SamplingRow]) -> list[Draw | None]:
        assert len(rows) == len(self._logits)
        return sample(self._logits, rows)


def needs_all_scores(row: SamplingRow) -> bool:
    """Whether a draw looks at more than the likeliest token."""
    sampling = row.sampling
    return sampling.temperature > 0.0 or sampling.logprobs is not None or is_adjusted(row)


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Draw | None]:
    """One draw per row of `logits [rows, vocab]`; None where they are not finite."""
    scores: Floats = logits.float().cpu().numpy()
    # argmax stops at the first NaN, so the best score is finite only if no score is NaN or +inf.
    best = scores.argmax(axis=1)
    is_finite = np.isfinite(scores[np.arange(len(rows)), best])
    token_ids = best.tolist()
    sampled: list[int] = []
    for index, row in enumerate(rows):
        if not is_finite[index]:
            continue
        if row.sampling.temperature > 0.0:
            sampled.append(index)
        elif is_adjusted(row):
            token_ids[index] = int(_adjusted(scores[index], row).argmax())
    for index, token_id in zip(sampled, _draw(scores, rows, sampled), strict=True):
        token_ids[index] = token_id
    return [
        _with_logprobs(token_ids[index], scores[index], row.sampling) if is_finite[index] else None
        for index, row in enumerate(rows)
    ]


def is_adjusted(row: SamplingRow) -> bool:
    """Whether penalties or suppressed ids change the scores of its next token."""
    sampling = row.sampling
    return (
        sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or sampling.repetition_penalty != 1.0
        or (bool(sampling.suppressed_ids) and row.output_tokens < sampling.min_tokens)
    )


def _adjusted(scores: Floats, row: SamplingRow) -> Floats:
    """Scores with penalties and suppressed ids: a copy."""
    sampling = row.sampling
    adjusted = scores.copy()
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(row.token_ids))
        penalty = np.float32(sampling.repetition_penalty)
        at_seen = adjusted[seen]
        adjusted[seen] = np.where(at_seen > 0, at_seen / penalty, at_seen * penalty)
    output = np.asarray(row.token_ids[row.prompt_tokens :], dtype=np.int64)
    generated, counts = np.unique(output, return_counts=True)
    adjusted[generated] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if row.output_tokens < sampling.min_tokens:
        adjusted[list(sampling.suppressed_ids)] = -np.inf
    return adjusted


def _draw(scores: Floats, rows: Sequence[SamplingRow], sampled: Sequence[int]) -> list[int]:
    if not sampled:
        return []
    adjusted = np.stack(
        [
            _adjusted(scores[index], rows[index]) if is_adjusted(rows[index]) else scores[index]
            for index in sampled
        ]
    )
    temperatures = torch.tensor([[rows[index].sampling.temperature] for index in sampled])
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    shifted = torch.from_numpy(adjusted - adjusted.max(axis=1, keepdims=True))
    probabilities: Floats = torch.softmax(shifted.div_(temperatures), dim=-1).numpy()
    return [
        _pick(
            probabilities[place],
            rows[index].sampling,
            uniform(rows[index].sampling.seed, rows[index].output_tokens),
        )
        for place, index in enumerate(sampled)
    ]


def _pick(probabilities: Floats, sampling: Sampling, number: float) -> int:
    """The token at `number` of the way through the mass that the filters leave."""
    if sampling.top_k == 0 and sampling.top_p >= 1.0 and sampling.min_p <= 0.0:
        return _pick_from_all(probabilities, number)
    ids = _kept(probabilities, sampling)
    mass = np.cumsum(probabilities[ids], dtype=np.float64)
    place = int(np.searchsorted(mass, number * mass[-1], side="right"))
    return int(ids[min(place, len(ids) - 1)])


def _pick_from_all(probabilities: Floats, number: float) -> int:
    """Search in blocks: no running sum over the whole vocabulary."""
    starts = np.arange(0, len(probabilities), _BLOCK)
    blocks = np.cumsum(np.add.reduceat(probabilities, starts, dtype=np.float64))
    target = number * blocks[-1]
    block = min(int(np.searchsorted(blocks, target, side="right")), len(blocks) - 1)
    before = float(blocks[block - 1]) if block else 0.0
    first = block * _BLOCK
    within = np.cumsum(probabilities[first : first + _BLOCK], dtype=np.float64)
    place = int(np.searchsorted(within, target - before, side="right"))
    if place == len(within):  # rounding put the target past the block's own sum
        place = int(np.flatnonzero(within == within[-1])[0])
    return first + place


def _kept(probabilities: Floats, sampling: Sampling) -> Ids:
    """Token ids that the filters keep, most likely first; never none."""
    if sampling.top_k == 0 and sampling.min_p <= 0.0:
        ids, total = _likeliest(probabilities, sampling.top_p), 1.0
    else:
        ids = np.flatnonzero(probabilities >= sampling.min_p * probabilities.max())
        if 0 < sampling.top_k < len(ids):
            ids = ids[np.argpartition(-probabilities[ids], sampling.top_k - 1)[: sampling.top_k]]
            ids.sort()
        total = float(probabilities[ids].sum(dtype=np.float64))
    ids = ids[np.argsort(-probabilities[ids], kind="stable")]
    if sampling.top_p >= 1.0:
        return ids
    mass = np.cumsum(probabilities[ids], dtype=np.float64)
    return ids[: int(np.searchsorted(mass, sampling.top_p * total)) + 1]


def _likeliest(probabilities: Floats, mass: float) -> Ids:
    """Few ids, in order, among which are the likeliest that hold `mass`.

    The floor is lowered until enough mass is above it. All that is less likely than its least value
    weighs less than 1 - mass, so rounding of the sums can't keep it going.
    """
    least = (1.0 - mass) / len(probabilities)
    floor = float(probabilities.max())
    while True:
        ids = np.flatnonzero(probabilities >= floor)
        if floor <= least or probabilities[ids].sum(dtype=np.float64) >= mass:
            return ids
        floor = max(floor / 4, least)


def _with_logprobs(token_id: int, scores: Floats, sampling: Sampling) -> Draw:
    if sampling.logprobs is None:
        return Draw(token_id, None, ())
    highest = float(scores.max())
    total = highest + math.log(float(np.exp(scores - highest).sum(dtype=np.float64)))
    count = min(sampling.logprobs, len(scores))
    likeliest = np.argpartition(-scores, count - 1)[:count] if count else np.arange(0)
    likeliest = likeliest[np.lexsort((likeliest, -scores[likeliest]))]
    top = tuple((int(i), float(scores[i]) - total) for i in likeliest)
    return Draw(token_id, float(scores[token_id]) - total, top)
