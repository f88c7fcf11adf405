"""How likely the next use is that of a given adapter: rates that outlive the adapter's stay.

Time is counted in uses of any adapter, so that rates mean the same under any load. An adapter's
rate is one of a few, and stays what it is until it changes to any other; how often that happens
nobody knows, so three paces are followed: rates that change about every 300 uses, every 3,000, and
hardly ever. Of each pace every adapter has a share of belief per rate, by Bayes' rule:

- a use multiplies the belief in each rate by that rate;
- n uses of others multiply it by e^(-(rate + pace) n), and what the pace takes away comes back as
  `common`, the mean belief of all adapters. So one use out of many adapters that are seldom used
  makes no favourite, and a favourite that is not asked for any more is soon doubted.

Each pace is trusted by how well it foresaw the uses so far (fixed-share: Herbster and Warmuth,
Machine Learning 1998), which follows a load whose kind changes.

A part of the uses may be repeats of adapters that were used a moment ago, which no rate tells. How
large it is, is learned in the same way, and what a repeat explains moves an adapter's rate less:

    chance = (1 - repeats) · Σ_pace trust · expected rate / sum of them + repeats · share in the
             last uses

With each use the beliefs of the adapter that is used and of some others, in turn, are brought up to
date, so a use costs the same however many adapters there are, and chances are read, not computed.
At most `limit` adapters are known; beyond it the less likely half of those that are not held is
forgotten.
"""

import math
from collections.abc import Sequence
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from services.core.types import AdapterDigest

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
S = TypeVar("S", bound=np.generic)

# Numbers without another origin were found best, or as good as others, by `bench cache`.
_RATES: Final[Floats] = np.geomspace(1e-4, 0.9, 14)  # chances to be the next that is used
_PACES: Final[Floats] = 1.0 / np.array([300.0, 3000.0, 100_000.0])  # changes per use
_COMMON_AT_FIRST: Final[Floats] = _RATES**-0.5 / np.sum(_RATES**-0.5)  # most are seldom used
_COMMON_WEIGHT: Final = 10.0  # of that, in adapters
_RETURNS: Final[Floats] = _PACES[:, None] / (_RATES + _PACES[:, None])  # [paces, rates]
_REPEATS: Final[Floats] = np.array([0.0, 0.5])  # shares of uses that may be repeats
_REPEAT_SPAN_USES: Final = 30.0  # after which a use counts a third
_PACE_SHARED: Final = 1e-3  # of the trust, per use: who was wrong can come back
_REPEAT_SHARED: Final = 3e-5
_LEARN_AFTER_USES: Final = 100  # before, everything looks good
_REFRESHED: Final = 64  # adapters per use
_SCALE_MAX: Final = 1e100
_ROWS_AT_FIRST: Final = 64


class Demand:
    """Beliefs about rates, by adapter."""

    def __init__(self, limit: int = 16_384) -> None:
        assert limit >= 2
        self._limit = limit
        self._row_of: dict[AdapterDigest, int] = {}
        self._free: list[int] = []
        self._rows = 0  # in use or free; those beyond were never used
        self._next_refreshed = 0
        self._is_known = np.zeros(_ROWS_AT_FIRST, dtype=np.bool_)
        self._holds = np.zeros(_ROWS_AT_FIRST, dtype=np.int64)
        self._beliefs: Floats = np.zeros((_ROWS_AT_FIRST, len(_PACES), len(_RATES)))
        self._expected: Floats = np.zeros((_ROWS_AT_FIRST, len(_PACES)))  # rates, by the beliefs
        self._at_use: Floats = np.zeros(_ROWS_AT_FIRST)  # of the beliefs
        self._recent: Floats = np.zeros(_ROWS_AT_FIRST)  # fading counts, times `_scale`
        self._believed: Floats = np.zeros((len(_PACES), len(_RATES)))  # sum over the known
        self._scale, self._recent_total = 1.0, 0.0
        self._trust: Floats = np.full(len(_PACES), 1.0 / len(_PACES))
        self._repeat_trust: Floats = np.full(len(_REPEATS), 1.0 / len(_REPEATS))
        self.uses = 0

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, digest: AdapterDigest) -> bool:
        return digest in self._row_of

    @property
    def weights(self) -> list[float]:
        """Of the paces, the fastest first; they add up to 1."""
        return [float(trust) for trust in self._trust]

    @property
    def repeats(self) -> float:
        """The share of the uses that are taken for repeats."""
        return float(self._repeat_trust @ _REPEATS)

    def use(self, digest: AdapterDigest) -> None:
        """A request uses it."""
        row = self._row(digest)
        self._refresh(row)
        expected, recent = self._foreseen(np.array([row]))
        by_rate = 1.0
        if self.uses >= _LEARN_AFTER_USES:
            by_rate = self._learn(expected[0], float(recent[0]))
        belief = self._beliefs[row] * _RATES**by_rate
        self._believe(np.array([row]), (belief / belief.sum(axis=1, keepdims=True))[None])
        self.uses += 1
        self._at_use[row] = self.uses
        self._scale *= math.exp(1.0 / _REPEAT_SPAN_USES)
        self._recent_total += self._scale
        self._recent[row] += self._scale
        if self._scale > _SCALE_MAX:
            self._recent /= self._scale
            self._recent_total /= self._scale
            self._scale = 1.0

    def hold(self, digest: AdapterDigest) -> int:
        """Its row, which stays its own until as many `release`."""
        row = self._row(digest)
        self._holds[row] += 1
        return row

    def release(self, row: int) -> None:
        """One who held the row does so no more."""
        assert self._holds[row] > 0
        self._holds[row] -= 1

    def forget(self, digest: AdapterDigest) -> None:
        """It will not be used again."""
        row = self._row_of.get(digest)
        if row is None:
            return
        if self._holds[row]:
            self._begin(row)
            return
        self._believe(np.array([row]), np.zeros((1, *self._believed.shape)))
        self._recent[row] = 0.0
        self._is_known[row] = False
        del self._row_of[digest]
        self._free.append(row)

    def chances(self, rows: Rows) -> Floats:
        """Chance of the adapter in each of the rows to be the next that is used."""
        expected, recent = self._foreseen(rows)
        return np.asarray((1.0 - self.repeats) * (expected @ self._trust) + self.repeats * recent)

    def chances_of(self, digests: Sequence[AdapterDigest]) -> Floats:
        """Chance of each of these; that of a new one for those that are not known."""
        rows = np.array([self._row_of.get(digest, -1) for digest in digests], dtype=np.int64)
        known = rows >= 0
        chances = np.full(len(rows), self._new_chance() if not known.all() else 0.0)
        chances[known] = self.chances(rows[known])
        return chances

    def check_integrity(self) -> None:
        """Assert that every row has one owner and that beliefs and trust are shares."""
        used = set(self._row_of.values())
        assert len(used) == len(self._row_of)
        assert used.isdisjoint(self._free)
        assert len(used) + len(self._free) == self._rows
        assert used == set(np.flatnonzero(self._is_known).tolist())
        assert abs(sum(self.weights) - 1.0) < 1e-6
        assert abs(self._repeat_trust.sum() - 1.0) < 1e-6
        assert np.allclose(self._beliefs[self._is_known].sum(axis=2), 1.0)
        assert not self._beliefs[self._free].any()
        assert not self._recent[self._free].any()
        assert np.allclose(self._believed, self._beliefs.sum(axis=0), atol=1e-6)

    @property
    def _common(self) -> Floats:
        """What is believed of an adapter of which nothing is known. [paces, rates]"""
        weight = _COMMON_WEIGHT + len(self._row_of)
        return np.asarray((self._believed + _COMMON_WEIGHT * _COMMON_AT_FIRST) / weight)

    @property
    def _sums(self) -> Floats:
        """The sum of the expected rates of all. [paces]"""
        return np.asarray(np.maximum(self._believed @ _RATES, _RATES[0]))

    def _later(self, beliefs: Floats, uses: Floats) -> Floats:
        """These beliefs after so many uses of others."""
        stays = np.exp(-np.multiply.outer(uses, _PACES))[:, :, None]
        stays = stays * np.exp(-np.multiply.outer(uses, _RATES))[:, None, :]
        later = stays * beliefs + (1.0 - stays) * (self._common * _RETURNS)
        return np.asarray(later / later.sum(axis=2, keepdims=True))

    def _foreseen(self, rows: Rows) -> tuple[Floats, Floats]:
        """Chances by pace, [rows, paces], and by the last uses, [rows]."""
        # One use more, spread over all: nobody's chance is nothing.
        new = self._scale / max(1, len(self._row_of))
        recent = (self._recent[rows] + new) / (self._recent_total + self._scale)
        return self._expected[rows] / self._sums, recent

    def _new_chance(self) -> float:
        beliefs = self._later(self._common[None], np.array([float(self.uses)]))
        new = self._scale / (self._recent_total + self._scale) / max(1, len(self._row_of))
        expected = float((beliefs @ _RATES / self._sums)[0] @ self._trust)
        return (1.0 - self.repeats) * expected + self.repeats * new

    def _learn(self, expected: Floats, recent: float) -> float:
        """Trust what expected this use. Returns the chance that it was not a repeat."""
        by_rates = float(expected @ self._trust)
        fits = self._repeat_trust * ((1.0 - _REPEATS) * by_rates + _REPEATS * recent)
        not_repeat = (1.0 - self.repeats) * by_rates
        by_rate = not_repeat / (not_repeat + self.repeats * recent)
        self._repeat_trust = _shared(fits, _REPEAT_SHARED)
        self._trust = _shared(self._trust * expected**by_rate, _PACE_SHARED)
        return by_rate

    def _refresh(self, row: int) -> None:
        """Bring the row up to date, and a few others in turn."""
        begin = self._next_refreshed if self._next_refreshed < self._rows else 0
        self._next_refreshed = begin + _REFRESHED
        others = np.arange(begin, min(self._rows, begin + _REFRESHED))
        rows = np.append(others[self._is_known[others] & (others != row)], row)
        self._believe(rows, self._later(self._beliefs[rows], self.uses - self._at_use[rows]))
        self._at_use[rows] = self.uses

    def _believe(self, rows: Rows, beliefs: Floats) -> None:
        """These rows, each named once, now have these beliefs."""
        self._believed += beliefs.sum(axis=0) - self._beliefs[rows].sum(axis=0)
        self._beliefs[rows] = beliefs
        self._expected[rows] = beliefs @ _RATES

    def _begin(self, row: int) -> None:
        """Nothing is known of the row's adapter but that it has not been used so far."""
        self._believe(np.array([row]), self._common[None])
        self._at_use[row] = self._recent[row] = 0.0
        self._is_known[row] = True

    def _row(self, digest: AdapterDigest) -> int:
        row = self._row_of.get(digest)
        if row is not None:
            return row
        if len(self._row_of) >= self._limit:
            self._prune()
        if self._free:
            row = self._free.pop()
        else:
            row = self._rows
            self._rows += 1
            if row == len(self._holds):
                self._grow()
        self._begin(row)
        self._row_of[digest] = row
        return row

    def _grow(self) -> None:
        self._is_known = _doubled(self._is_known)
        self._holds = _doubled(self._holds)
        self._beliefs = _doubled(self._beliefs)
        self._expected = _doubled(self._expected)
        self._at_use = _doubled(self._at_use)
        self._recent = _doubled(self._recent)

    def _prune(self) -> None:
        """Forget the less likely half of those that are not held; grow if all are."""
        spare = [(digest, row) for digest, row in self._row_of.items() if not self._holds[row]]
        if len(spare) * 2 < len(self._row_of):
            self._limit *= 2
            return
        chances = self.chances(np.array([row for _, row in spare]))
        for index in np.argsort(chances, kind="stable")[: len(spare) // 2]:
            self.forget(spare[index][0])


def _shared(trust: Floats, shared: float) -> Floats:
    """In shares, of which a part is the same for all."""
    return np.asarray((1.0 - shared) * trust / trust.sum() + shared / len(trust))


def _doubled(array: NDArray[S]) -> NDArray[S]:
    return np.concatenate([array, np.zeros_like(array)])
