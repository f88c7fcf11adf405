"""From logits to tokens on the device. The rules are those of `sampling`, which is the reference.

Rows that are greedy with nothing switched on take one argmax. Others are adjusted, turned into
probabilities and drawn together, a few rows at a time to bound memory: their settings come in one
copy, with a uniform number for each that the host hashed from (seed, position). One copy brings
what was drawn back, which is the only time that the host waits for the device in a step.

Sums that decide are fp64. Draws equal those of the host where exponentials round alike; a number
that falls within a rounding error of the border between two tokens may get the other one.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.worker.engine.cuda_errors import device_errors
from services.worker.engine.randomness import uniform
from services.worker.engine.sampling import Draw, SamplingRow, is_adjusted

_ROWS_MAX: Final = 32  # drawn together: each takes 20 bytes or so for every token of the vocabulary
# Columns of what is copied back, before the alternatives: ids, then their log-probabilities.
_ID, _IS_FINITE, _LOGPROB, _TOP = range(4)

Doubles = NDArray[np.float64]


class DeviceScores:
    """Logits `[rows, vocab]` on the device. See `Scores`."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    @torch.inference_mode()
    def draw(self, rows: Sequence[SamplingRow]) -> list[Draw | None]:
        assert len(rows) == len(self._logits)
        with device_errors():
            return draw_on_device(self._logits, rows)


def draw_on_device(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Draw | None]:
    """One draw per row of `logits [rows, vocab]`; None where they are not finite."""
    best = logits.argmax(dim=1)
    # argmax stops at the first NaN, so the best score is finite only if no score is NaN or +inf.
    is_finite = logits.gather(1, best.unsqueeze(1)).isfinite()
    counts = [_alternatives(row, logits.shape[1]) for row in rows]
    shape = (len(rows), _TOP + 2 * max(counts))
    result = torch.zeros(shape, dtype=torch.float64, device=logits.device)
    result[:, _IS_FINITE] = is_finite[:, 0].double()
    result[:, _ID] = best.double()
    special = [i for i, row in enumerate(rows) if not _is_plain(row)]
    for first in range(0, len(special), _ROWS_MAX):
        indices = special[first : first + _ROWS_MAX]
        _draw_some(logits, [rows[i] for i in indices], indices, result)
    asking = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    for first in range(0, len(asking), _ROWS_MAX):
        _add_logprobs(logits, asking[first : first + _ROWS_MAX], max(counts), result)
    drawn: Doubles = result.cpu().numpy()
    return [_as_draw(one, row, count) for one, row, count in zip(drawn, rows, counts, strict=True)]


def _alternatives(row: SamplingRow, vocab: int) -> int:
    return min(row.sampling.logprobs or 0, vocab)


def _is_plain(row: SamplingRow) -> bool:
    return row.sampling.temperature <= 0.0 and not is_adjusted(row)


def _as_draw(drawn: Doubles, row: SamplingRow, count: int) -> Draw | None:
    if not drawn[_IS_FINITE]:
        return None
    token_id = int(drawn[_ID])
    if row.sampling.logprobs is None:
        return Draw(token_id, None, ())
    most = (len(drawn) - _TOP) // 2
    ids, logprobs = drawn[_TOP : _TOP + count], drawn[_TOP + most : _TOP + most + count]
    top = tuple((int(i), float(p)) for i, p in zip(ids, logprobs, strict=True))
    return Draw(token_id, float(drawn[_LOGPROB]), top)


def _draw_some(
    logits: Tensor, rows: Sequence[SamplingRow], indices: Sequence[int], result: Tensor
) -> None:
    """Put the draws of `rows`, which are those at `indices`, into `result`."""
    device = logits.device
    at = _to(np.array(indices, dtype=np.int64), device)
    scores = logits[at].float()
    _adjust(scores, rows)
    settings = _to(_settings(rows), device)
    temperature = settings[:, 0:1].float()
    # A greedy row is drawn from what its temperature of 1 makes; its argmax is taken below.
    shifted = scores - scores.amax(dim=1, keepdim=True)
    probabilities = torch.softmax(shifted / temperature, dim=1)
    picked = _picked_from_all(probabilities, settings[:, 1:2])
    filtered = [i for i, row in enumerate(rows) if _has_filter(row)]
    if filtered:
        some = _to(np.array(filtered, dtype=np.int64), device)
        picked[some] = _picked_from_kept(probabilities[some], settings[some])
    greedy = _to(np.array([row.sampling.temperature <= 0.0 for row in rows]), device)
    result[at, _ID] = torch.where(greedy, scores.argmax(dim=1), picked).double()


def _has_filter(row: SamplingRow) -> bool:
    sampling = row.sampling
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _settings(rows: Sequence[SamplingRow]) -> Doubles:
    """`[rows, 6]`: temperature, uniform number, min-p, top-k, top-p, whether its mass is 1."""
    return np.array(
        [
            (
                row.sampling.temperature if row.sampling.temperature > 0.0 else 1.0,
                uniform(row.sampling.seed, row.output_tokens),
                row.sampling.min_p,
                row.sampling.top_k or np.inf,
                row.sampling.top_p,
                row.sampling.top_k == 0 and row.sampling.min_p <= 0.0,
            )
            for row in rows
        ],
        dtype=np.float64,
    )


def _adjust(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Penalties and suppressed ids, in place. Of each row's own tokens only."""
    seen: list[tuple[NDArray[np.int64], int, float]] = []
    generated: list[tuple[NDArray[np.int64], int, NDArray[np.float64]]] = []
    suppressed: list[tuple[NDArray[np.int64], int]] = []
    for index, row in enumerate(rows):
        sampling = row.sampling
        if sampling.repetition_penalty != 1.0:
            ids = np.unique(np.asarray(row.token_ids, dtype=np.int64))
            seen.append((ids, index, sampling.repetition_penalty))
        if sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
            output = np.asarray(row.token_ids[row.prompt_tokens :], dtype=np.int64)
            ids, counts = np.unique(output, return_counts=True)
            added = sampling.presence_penalty + sampling.frequency_penalty * counts.astype(
                np.float64
            )
            generated.append((ids, index, added))
        if sampling.suppressed_ids and row.output_tokens < sampling.min_tokens:
            suppressed.append((np.array(sampling.suppressed_ids, dtype=np.int64), index))
    if seen:
        place = _places([(ids, index) for ids, index, _ in seen], scores.device)
        penalties = [np.full(len(ids), value, np.float32) for ids, _, value in seen]
        penalty = _to(np.concatenate(penalties), scores.device)
        value = scores[place]
        scores[place] = torch.where(value > 0, value / penalty, value * penalty)
    if generated:
        place = _places([(ids, index) for ids, index, _ in generated], scores.device)
        added = np.concatenate([penalty for _, _, penalty in generated])
        scores[place] = (scores[place].double() - _to(added, scores.device)).float()
    if suppressed:
        scores[_places(suppressed, scores.device)] = -torch.inf


def _places(
    rows: Sequence[tuple[NDArray[np.int64], int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row and token id of each, as an index."""
    ids = np.concatenate([ids for ids, _ in rows])
    index = np.concatenate([np.full(len(ids), index) for ids, index in rows])
    both = _to(np.stack([index, ids]).astype(np.int64), device)
    return both[0], both[1]


def _picked_from_all(probabilities: Tensor, number: Tensor) -> Tensor:
    """The token at `number [rows, 1]` of the way through the mass, in the order of ids."""
    mass = probabilities.cumsum(dim=1, dtype=torch.float64)
    place = torch.searchsorted(mass, number * mass[:, -1:], right=True)
    # Rounding may put the target at the very end: then the last token that has any mass.
    last = (mass < mass[:, -1:]).sum(dim=1, keepdim=True)
    return torch.minimum(place, last)[:, 0]


def _picked_from_kept(probabilities: Tensor, settings: Tensor) -> Tensor:
    """The same over what the filters keep, most likely first. See `_settings`."""
    number, min_p, top_k, top_p, is_whole = torch.split(settings[:, 1:6], 1, dim=1)
    ordered, ids = probabilities.sort(dim=1, descending=True, stable=True)
    place = torch.arange(ordered.shape[1], device=ordered.device)
    # The host compares in fp32, too.
    is_kept = (ordered >= min_p.float() * ordered[:, :1]) & (place < top_k)
    mass = torch.where(is_kept, ordered, 0.0).cumsum(dim=1, dtype=torch.float64)
    total = torch.where(is_whole > 0, 1.0, mass[:, -1:])
    behind = torch.searchsorted(mass, top_p * total)
    count = torch.where(top_p < 1.0, behind + 1, ordered.shape[1])
    # Scores that are not finite keep nothing, and their draw is not used.
    count = torch.minimum(count, is_kept.sum(dim=1, keepdim=True)).clamp_(min=1)
    target = number * mass.gather(1, count - 1)
    picked = torch.searchsorted(mass, target, right=True)
    return ids.gather(1, torch.minimum(picked, count - 1))[:, 0]


def _add_logprobs(logits: Tensor, indices: Sequence[int], most: int, result: Tensor) -> None:
    """Put the log-probabilities of what was drawn, and the `most` likeliest, into `result`."""
    at = _to(np.array(indices, dtype=np.int64), logits.device)
    scores = logits[at].float()
    highest = scores.amax(dim=1, keepdim=True)
    mass = (scores - highest).exp().sum(dim=1, keepdim=True, dtype=torch.float64)
    total = highest.double() + mass.log()
    drawn = result[at, _ID].long().unsqueeze(1)
    result[at, _LOGPROB] = (scores.gather(1, drawn).double() - total)[:, 0]
    if most:
        ordered, ids = scores.sort(dim=1, descending=True, stable=True)
        result[at, _TOP : _TOP + most] = ids[:, :most].double()
        result[at, _TOP + most : _TOP + 2 * most] = ordered[:, :most].double() - total


def _to(array: NDArray[Any], device: torch.device) -> Tensor:
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
