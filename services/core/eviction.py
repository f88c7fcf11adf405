"""Which idle adapter goes first: eviction policies, by name.

A policy scores the idle adapters, lowest goes first, ties by digest. `lru` is the baseline.
`chameleon` is the paper's score (§4.2)

    0.45 · frequency + 0.10 · recency + 0.45 · size

Size has a positive sign: small adapters go first, their reload is cheap. The paper leaves open how
the terms are normalised, so that is `ChameleonWeights`; chosen here:

- frequency: uses within the last `window_s`, over the largest such count among the candidates. The
  count is kept as that of this window plus the fading share of the window before, which needs two
  numbers per adapter. It starts anew when an adapter is loaded again.
- recency: 1 / (1 + age / recency_s).
- size: blocks over those of the largest candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.core.types import AdapterDigest


@dataclass(frozen=True, slots=True)
class Usage:
    """What a policy may know of an idle adapter."""

    digest: AdapterDigest
    blocks: int
    last_used_s: float
    window: int  # index of the window that `uses` counts
    uses: int
    uses_before: int  # in the window before that


class EvictionPolicy(Protocol):
    """Scores idle adapters."""

    @property
    def window_s(self) -> float:
        """Length of the windows in which uses are counted."""
        ...

    def scores(self, idle: Sequence[Usage], *, now: float) -> list[float]:
        """One score per adapter, in order; the lowest is evicted first."""
        ...


@dataclass(frozen=True, slots=True)
class Lru:
    """Least recently used goes first."""

    window_s: float = 300.0

    def scores(self, idle: Sequence[Usage], *, now: float) -> list[float]:
        """The time of the last use."""
        return [min(usage.last_used_s, now) for usage in idle]


@dataclass(frozen=True, slots=True)
class ChameleonWeights:
    """The score's coefficients (paper) and its normalisation (open in the paper)."""

    frequency: float = 0.45
    recency: float = 0.10
    size: float = 0.45
    window_s: float = 300.0  # the paper's refresh period
    recency_s: float = 30.0  # age at which recency has fallen to a half


@dataclass(frozen=True, slots=True)
class Chameleon:
    """Frequent, recent and large adapters stay."""

    weights: ChameleonWeights = ChameleonWeights()

    @property
    def window_s(self) -> float:
        """Length of the windows in which uses are counted."""
        return self.weights.window_s

    def scores(self, idle: Sequence[Usage], *, now: float) -> list[float]:
        """The weighted sum of the three normalised terms."""
        if not idle:
            return []
        weights = self.weights
        uses = [self._recent_uses(usage, now) for usage in idle]
        uses_max = max(uses) or 1.0
        blocks_max = max(usage.blocks for usage in idle) or 1
        return [
            weights.frequency * used / uses_max
            + weights.recency / (1.0 + max(0.0, now - usage.last_used_s) / weights.recency_s)
            + weights.size * usage.blocks / blocks_max
            for usage, used in zip(idle, uses, strict=True)
        ]

    def _recent_uses(self, usage: Usage, now: float) -> float:
        window, elapsed_s = divmod(now, self.window_s)
        fading = 1.0 - elapsed_s / self.window_s
        windows_ago = int(window) - usage.window
        if windows_ago <= 0:
            return usage.uses + fading * usage.uses_before
        return fading * usage.uses if windows_ago == 1 else 0.0


def build_eviction(name: str) -> EvictionPolicy:
    """The policy of that name, with its default parameters."""
    policies: dict[str, EvictionPolicy] = {"lru": Lru(), "chameleon": Chameleon()}
    if name not in policies:
        raise ValueError(f"unknown eviction policy {name!r}, have {', '.join(policies)}")
    return policies[name]
