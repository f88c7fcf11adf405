"""Chameleon's eviction score (§4.2), and FairShare, its comparison with equal weights.

    0.45 · frequency + 0.10 · recency + 0.45 · size

Size has a positive sign: small adapters go first, their reload is cheap. The paper gives the three
weights; all else is an option here, the first named being the default:

- frequency: uses within the last `window_s`, over the largest such count among the idle adapters.
- recency: "hyperbolic", 1 / (1 + age / recency_s); "linear", 1 - age over the largest age.
- size: "blocks" or "rank", over those of the largest idle adapter.
- tie: "digest", "oldest" (unused for longest) or "smallest" goes first.
- wanted_order, among adapters that waiting requests want: "urgency", the least urgent goes first;
  "score", the lowest score.
"""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from services.core.eviction_view import Floats, IdleAdapters, Rules, Tie, WantedOrder


@dataclass(frozen=True, slots=True)
class ChameleonWeights:
    """The score's coefficients (paper) and its normalisation (open in the paper)."""

    frequency: float = 0.45
    recency: float = 0.10
    size: float = 0.45
    window_s: float = 300.0  # the paper's refresh period
    recency_s: float = 30.0  # age at which hyperbolic recency has fallen to a half
    recency_by: Literal["hyperbolic", "linear"] = "hyperbolic"
    size_by: Literal["blocks", "rank"] = "blocks"
    tie: Tie = "digest"
    wanted_order: WantedOrder = "urgency"


@dataclass(frozen=True, slots=True)
class Chameleon:
    """Frequent, recent and large adapters stay."""

    weights: ChameleonWeights = ChameleonWeights()

    @property
    def rules(self) -> Rules:
        """As the options say."""
        weights = self.weights
        return Rules(weights.window_s, weights.tie, weights.wanted_order)

    @property
    def clock(self) -> float:
        """It has none."""
        return 0.0

    def scores(self, idle: IdleAdapters) -> Floats:
        """The weighted sum of the three normalised terms."""
        weights = self.weights
        sizes = idle.blocks if weights.size_by == "blocks" else idle.ranks
        return (
            weights.frequency * _normal(idle.recent_uses)
            + weights.recency * self._recency(idle.now_s - idle.last_used_s)
            + weights.size * _normal(sizes)
        )

    def note_evicted(self, score: float) -> None:
        """Nothing to keep."""

    def _recency(self, ages_s: Floats) -> Floats:
        ages_s = np.maximum(0.0, ages_s)
        if self.weights.recency_by == "linear":
            return 1.0 - _normal(ages_s)
        return 1.0 / (1.0 + ages_s / self.weights.recency_s)


FAIRSHARE: Final = ChameleonWeights(frequency=1 / 3, recency=1 / 3, size=1 / 3)


def _normal(values: Floats) -> Floats:
    """In shares of the largest; all 0 if that is 0."""
    largest = values.max(initial=0.0)
    return values / largest if largest > 0 else values
