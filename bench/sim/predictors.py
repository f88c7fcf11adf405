"""Output-length predictors of chosen quality, behind the gateway's own guard.

Each is an `Estimator` of the live gateway that may know more than an estimator can: it is told
whose turn it is. What it says passes through `services.gateway.predictor.LengthPredictor`, which
makes nonsense the request's own limit, as it does live.
"""

import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Final, assert_never

from bench.workload.trace import Arrival
from services.gateway.predictor import DecayedLengths, Estimator, LengthPredictor, Prediction


@dataclass(frozen=True, slots=True)
class Oracle:
    """Knows."""


@dataclass(frozen=True, slots=True)
class Accurate:
    """Knows with this probability; otherwise draws an independent length of the same trace."""

    probability: float


@dataclass(frozen=True, slots=True)
class Adversarial:
    """Takes the shortest for the longest: the p-quantile for the (1 - p)-quantile."""


@dataclass(frozen=True, slots=True)
class Constant:
    """Says always the same."""

    tokens: float


@dataclass(frozen=True, slots=True)
class Broken:
    """Says NaN, negative, infinite, zero and absurd numbers in turn."""


@dataclass(frozen=True, slots=True)
class Learned:
    """The live gateway's own, which learns from what has ended."""


PredictorKind = Oracle | Accurate | Adversarial | Constant | Broken | Learned

_NONSENSE: Final = (math.nan, -5.0, math.inf, 0.0, 1e12, -math.inf)


class Predictor:
    """The gateway's predictor for one run."""

    def __init__(self, kind: PredictorKind, arrivals: Sequence[Arrival], *, seed: int) -> None:
        self._kind = kind
        self._lengths = sorted(arrival.output_tokens for arrival in arrivals) or [1]
        self._rng = random.Random(f"predictor {seed}")
        self._nonsense = cycle(_NONSENSE)
        self._current: Arrival | None = None
        self._learned: Estimator = DecayedLengths()
        self._guard = LengthPredictor(self)

    def predict(self, arrival: Arrival) -> Prediction:
        """What the gateway submits for this request."""
        self._current = arrival
        return self._guard.predict(
            _digest(arrival), arrival.prompt_tokens, arrival.max_output_tokens
        )

    def end(self, arrival: Arrival) -> None:
        """A request has ended well; the learning one learns."""
        self._guard.learn(_digest(arrival), arrival.prompt_tokens, arrival.output_tokens)

    # --- as an Estimator ----------------------------------------------------------------------

    def estimate(
        self, adapter_digest: str | None, prompt_tokens: int, max_tokens: int
    ) -> tuple[float, float]:
        """Tokens expected, and their 90th percentile."""
        assert self._current is not None
        truth = self._current.output_tokens
        match self._kind:
            case Oracle():
                return truth, truth
            case Accurate(probability):
                return self._often_right(truth, probability)
            case Adversarial():
                share = bisect_left(self._lengths, truth) / len(self._lengths)
                guess = self._quantile(1.0 - share)
                return guess, guess
            case Constant(tokens):
                return tokens, tokens
            case Broken():
                return next(self._nonsense), next(self._nonsense)
            case Learned():
                return self._learned.estimate(adapter_digest, prompt_tokens, max_tokens)
            case _:
                assert_never(self._kind)

    def learn(self, adapter_digest: str | None, prompt_tokens: int, output_tokens: int) -> None:
        """How long an answer was."""
        self._learned.learn(adapter_digest, prompt_tokens, output_tokens)

    def _often_right(self, truth: int, probability: float) -> tuple[float, float]:
        """Its 90th percentile mixes both cases, because it can't tell them apart."""
        is_right = self._rng.random() < probability
        drawn = self._quantile(self._rng.random())
        guess = truth if is_right else drawn
        if probability >= 0.9:
            return guess, guess
        return guess, max(guess, self._quantile((0.9 - probability) / (1.0 - probability)))

    def _quantile(self, share: float) -> int:
        index = min(len(self._lengths) - 1, int(share * len(self._lengths)))
        return self._lengths[index]


def _digest(arrival: Arrival) -> str | None:
    return arrival.adapter.digest if arrival.adapter is not None else None
