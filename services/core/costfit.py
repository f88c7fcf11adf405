"""What steps and loads cost here, learned from those that have ended.

A step's time is fitted as a linear function of its `StepShape` by least squares with forgetting:
a step counts half after `_HALF_LIFE` more. Each error counts relative to the prior's time for that
shape, so short steps matter as much as long ones. Shapes that a worker sees are often nearly
collinear (more sequences, more cache); a weak pull towards the prior decides what they leave open.
The prior is another machine's, so only its proportions are believed: it is scaled to the level of
the steps seen. A step beyond `_OUTLIER` times its prediction is taken as just that long: a hiccup
then moves little, while a machine that has become slower is followed within some solves.

Coefficients are costs, so none may be negative but that of a step's first prompt chunk, which
corrects where a line is a bad picture. Pure Python, so that every machine fits the same.
"""

import math
from dataclasses import replace
from typing import Final

from services.core.costs import StepCosts, StepShape

_SOLVE_EVERY: Final = 16  # steps
_HALF_LIFE: Final = 1000.0  # steps, and loads
_OUTLIER: Final = 5.0
_PULL: Final = 3e-4  # towards the prior: step times vary by 5 %, its proportions are off by 3x
_TINY_S: Final = 1e-9
_WEIGHT_MAX: Final = 1e6  # of a new step relative to a forgotten one, before all are scaled down
_GROWTH: Final = 2.0 ** (1.0 / _HALF_LIFE)

_NAMES: Final = (
    "step_s",
    "prefill_s",
    "prefill_token_s",
    "prefill_rank_token_s",
    "decode_sequence_s",
    "decode_rank_s",
    "cached_token_s",
)
_PREFILL: Final = 1  # the index of `prefill_s`, which alone may be negative
_Row = tuple[float, ...]
_Matrix = list[list[float]]


class CostFit:
    """Fits `StepCosts` to the steps and loads of one worker."""

    def __init__(self, prior: StepCosts) -> None:
        self._prior = prior
        self.costs = prior  # the best belief now
        self.is_measured = False  # False: `costs` is the prior
        self._squares: _Matrix = [[0.0] * (index + 1) for index in range(len(_NAMES))]
        self._products = [0.0] * len(_NAMES)
        self._steps = 0
        self._weight = 1.0  # of the next step; older ones keep the smaller one they had
        self._log_levels = self._levels = 0.0  # of step times over the prior's, weighted
        self._batches = self._decode_steps = 0.0
        self._load_s = self._load_bytes = 0.0
        self._link_free_s = -math.inf

    def learn_step(self, shape: StepShape, time_s: float) -> None:
        """A step of that shape took so long."""
        if not 0.0 < time_s < math.inf:
            return
        if self.is_measured:
            time_s = min(time_s, _OUTLIER * max(self.costs.step_time_s(shape), _TINY_S))
        prior_s = max(self._prior.step_time_s(shape), _TINY_S)
        self._accumulate(_row(shape), time_s, self._weight / prior_s**2)
        self._log_levels += self._weight * math.log(time_s / prior_s)
        self._levels += self._weight
        if shape.decode_sequences:
            self._batches += self._weight * shape.decode_sequences
            self._decode_steps += self._weight
        self._weight *= _GROWTH
        self._steps += 1
        if self._steps % _SOLVE_EVERY == 0:
            self._solve()

    def learn_load(self, size_bytes: int, *, began_s: float, ended_s: float) -> None:
        """A load from host memory took that time, part of which others may have had the link."""
        busy_s = ended_s - max(began_s, self._link_free_s)
        self._link_free_s = ended_s
        if size_bytes <= 0 or busy_s < 0:
            return
        fading = 1.0 - 1.0 / _HALF_LIFE
        self._load_s = self._load_s * fading + busy_s
        self._load_bytes = self._load_bytes * fading + size_bytes
        self.costs = replace(self.costs, load_byte_s=self._load_s / self._load_bytes)

    # --- least squares ----------------------------------------------------------------------

    def _accumulate(self, row: _Row, time_s: float, weight: float) -> None:
        for index, value in enumerate(row):
            if value:
                weighted = weight * value
                self._products[index] += weighted * time_s
                squares = self._squares[index]
                for other in range(index + 1):
                    squares[other] += weighted * row[other]

    def _solve(self) -> None:
        self._limit_weight()
        level = math.exp(self._log_levels / self._levels)
        prior = [getattr(self._prior, name) for name in _NAMES]
        free = list(range(len(_NAMES)))
        while True:
            solution = self._solve_for(free, prior, level)
            negative = [at for at in free if solution[at] < 0.0 and at != _PREFILL]
            if not negative:
                break
            free = [at for at in free if at not in negative]
        if not all(map(math.isfinite, solution)):
            return
        solution[_PREFILL] = max(solution[_PREFILL], -solution[0])
        batch = self.costs.batch
        if self._decode_steps:
            batch = self._batches / self._decode_steps
        found = dict(zip(_NAMES, solution, strict=True))
        self.costs = replace(self.costs, batch=batch, **found)
        self.is_measured = True

    def _solve_for(self, free: list[int], prior: list[float], level: float) -> list[float]:
        """The coefficients, those not `free` being 0."""
        matrix: _Matrix = []
        target: list[float] = []
        for index, at in enumerate(free):
            row = [self._squares[max(at, other)][min(at, other)] for other in free]
            pull = self._weight * _PULL / max(abs(prior[at]), prior[0] * _SMALL[at], _TINY_S) ** 2
            row[index] += pull
            matrix.append(row)
            target.append(self._products[at] + pull * prior[at] * level)
        solution = [0.0] * len(_NAMES)
        for at, value in zip(free, _solve_linear(matrix, target), strict=True):
            solution[at] = value
        return solution

    def _limit_weight(self) -> None:
        if self._weight < _WEIGHT_MAX:
            return
        scale, self._weight = 1.0 / self._weight, 1.0
        self._squares = [[value * scale for value in row] for row in self._squares]
        self._products = [value * scale for value in self._products]
        self._log_levels *= scale
        self._levels *= scale
        self._batches *= scale
        self._decode_steps *= scale


# How far off the prior's coefficients may be at least, in its fixed costs of a step: one may be 0.
_SMALL: Final = (1.0, 0.5, 1e-3, 1e-5, 1e-2, 1e-4, 1e-5)


def _row(shape: StepShape) -> _Row:
    return (
        1.0,
        1.0 if shape.prefill_tokens else 0.0,
        float(shape.prefill_tokens),
        float(shape.prefill_rank_tokens),
        float(shape.decode_sequences),
        float(shape.decode_ranks),
        float(shape.cached_tokens),
    )


def _solve_linear(matrix: _Matrix, target: list[float]) -> list[float]:
    """Solve a symmetric positive definite system by Cholesky's decomposition, scaled to ones."""
    scales = [1.0 / math.sqrt(matrix[index][index]) for index in range(len(target))]
    lower: _Matrix = []
    forward: list[float] = []
    for i, row in enumerate(matrix):
        current: list[float] = []
        for j in range(i):
            dot = sum(a * b for a, b in zip(current, lower[j], strict=False))
            current.append((row[j] * scales[i] * scales[j] - dot) / lower[j][j])
        pivot = 1.0 - sum(value * value for value in current)
        known = sum(a * b for a, b in zip(current, forward, strict=True))
        current.append(math.sqrt(max(pivot, 1e-12)))
        lower.append(current)
        forward.append((target[i] * scales[i] - known) / current[i])
    solution = forward
    for i in reversed(range(len(target))):
        later = sum(lower[k][i] * solution[k] for k in range(i + 1, len(target)))
        solution[i] = (solution[i] - later) / lower[i][i]
    return [value * scale for value, scale in zip(solution, scales, strict=True)]
