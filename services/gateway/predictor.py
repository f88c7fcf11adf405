"""How long will this answer be? A first honest guess, learned from what was finished.

Per adapter an exponentially decayed mean of true output lengths, and of how far they were from it;
the fewer the observations, the more both are pulled towards those over all adapters, and these
towards what holds without any history: a quarter of the request's own limit, 256 at most, and
anything up to the limit within the 90th percentile.
An adapter does one job, so its lengths are alike; the prompt's length says almost nothing
(correlation about 0 on public traces). Pure and O(1) per call, so never late; the least recently
used adapters are forgotten.

`LengthPredictor` is the one place through which guesses leave, whoever made them: one that is not a
finite number of tokens, or that could not be made, becomes the request's own limit.
"""

import contextlib
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Protocol

ADAPTERS_MAX: Final = 10_000
_UNKNOWN_TOKENS_MAX: Final = 256.0  # about the mean answer of public conversation traces
_DECAY: Final = 0.98  # half of the weight lies on the last 34 requests
_PULL: Final = 4.0  # what the group says weighs as much as this many observations, and fades
# Mean absolute deviations from the mean to the 90th percentile: 1.61 for normal lengths, 1.59 for
# log-normal ones as wide as the Azure conversation trace, 1.77 for exponential ones.
_DEVIATIONS_TO_Q90: Final = 1.7


@dataclass(frozen=True, slots=True)
class Prediction:
    """Output tokens to expect, and what nine of ten such answers stay within: 1 to the limit."""

    tokens: int
    q90_tokens: int


class Estimator(Protocol):
    """Who guesses. Its numbers may be anything."""

    def estimate(
        self, adapter_digest: str | None, prompt_tokens: int, max_tokens: int
    ) -> tuple[float, float]:
        """Output tokens: expected, and their 90th percentile."""
        ...

    def learn(self, adapter_digest: str | None, prompt_tokens: int, output_tokens: int) -> None:
        """How long an answer was that ended by itself or at its limit."""
        ...


class LengthPredictor:
    """Predicts output tokens, whatever its estimator says."""

    def __init__(self, estimator: Estimator | None = None) -> None:
        self._estimator = estimator or DecayedLengths()

    def predict(
        self, adapter_digest: str | None, prompt_tokens: int, max_tokens: int
    ) -> Prediction:
        """What to expect of this request."""
        try:
            expected, q90 = self._estimator.estimate(adapter_digest, prompt_tokens, max_tokens)
            tokens = _sane(expected, max_tokens)
            return Prediction(tokens, max(tokens, _sane(q90, max_tokens)))
        except Exception:  # noqa: BLE001 - no request fails for want of a guess
            return Prediction(max_tokens, max_tokens)

    def learn(self, adapter_digest: str | None, prompt_tokens: int, output_tokens: int) -> None:
        """Remember how long an answer was that ended by itself or at its limit."""
        with contextlib.suppress(Exception):  # the answer is complete, whatever becomes of guesses
            self._estimator.learn(adapter_digest, prompt_tokens, output_tokens)


@dataclass(slots=True)
class _History:
    """Decayed sums of lengths and of their distances from the mean before them."""

    weight: float = 0.0
    total: float = 0.0
    deviation: float = 0.0
    pull: float = _PULL

    def add(self, value: float, expected: float) -> None:
        self.pull *= _DECAY
        self.weight = self.weight * _DECAY + 1.0
        self.total = self.total * _DECAY + value
        self.deviation = self.deviation * _DECAY + abs(value - expected)

    def towards(self, mean: float, deviation: float) -> tuple[float, float]:
        weight = self.weight + self.pull
        total = self.total + self.pull * mean
        return total / weight, (self.deviation + self.pull * deviation) / weight


class DecayedLengths:
    """The usual estimator. Knows at most `adapters_max` adapters; the base model is one."""

    def __init__(self, *, adapters_max: int = ADAPTERS_MAX) -> None:
        self._adapters_max = adapters_max
        self._everything = _History()
        self._adapters: OrderedDict[str | None, _History] = OrderedDict()

    def __len__(self) -> int:
        return len(self._adapters)

    def estimate(
        self, adapter_digest: str | None, prompt_tokens: int, max_tokens: int
    ) -> tuple[float, float]:
        """Output tokens: expected, and their 90th percentile."""
        del prompt_tokens
        mean, deviation = self._look(adapter_digest, _unknown(max_tokens), max_tokens)
        return mean, mean + _DEVIATIONS_TO_Q90 * deviation

    def learn(self, adapter_digest: str | None, prompt_tokens: int, output_tokens: int) -> None:
        """One more answer."""
        del prompt_tokens
        expected, _ = self._look(adapter_digest, output_tokens, output_tokens)
        expected_of_all, _ = self._everything.towards(output_tokens, 0.0)
        self._everything.add(output_tokens, expected_of_all)
        self._adapters.setdefault(adapter_digest, _History()).add(output_tokens, expected)
        self._adapters.move_to_end(adapter_digest)
        if len(self._adapters) > self._adapters_max:
            self._adapters.popitem(last=False)

    def _look(
        self, adapter_digest: str | None, mean: float, deviation: float
    ) -> tuple[float, float]:
        """Mean and deviation; the given ones where nothing is known."""
        found = self._everything.towards(mean, deviation)
        history = self._adapters.get(adapter_digest)
        return found if history is None else history.towards(*found)


def _unknown(max_tokens: int) -> float:
    """What to expect of an answer when none has been seen: limits are set well above lengths."""
    return min(_UNKNOWN_TOKENS_MAX, max_tokens / 4)


def _sane(tokens: float, max_tokens: int) -> int:
    """A number of tokens that can be; the limit in place of one that can't."""
    if not math.isfinite(tokens) or tokens < 0:
        return max_tokens
    return min(max_tokens, max(1, round(tokens)))
