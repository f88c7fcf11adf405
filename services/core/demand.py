"""How likely the next use is that of a given adapter: rates that outlive the adapter's stay.

Rates are counts that fade with the number of uses, not with time, so that they mean the same under
any load. No one span fits all traffic: favourites that never change ask for a long memory, a set
that shifts every minute for a short one. So three spans are kept, and each use tells how well each
span foresaw it. The mixture of the three that foresees best (expectation maximisation, one step per
use) is the chance of an adapter:

    chance = Σ_k weight_k · (count_k + 1 / known) / (total_k + 1)

`1 / known`, with `known` adapters, is the share of an adapter that was never used. A span's weight
never falls below a floor, or it could not come back.

Counts are kept scaled by what they will have faded by, so a use touches one row, and the chances of
many adapters are one product of a matrix with a vector. At most `limit` adapters are known; beyond
it the less likely half of those that are not held is forgotten.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.core.types import AdapterDigest

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

# Uses after which a count has faded to a third. Found best of several sets by `bench cache`.
_SPANS_USES: Final = (100.0, 1000.0, 10_000.0)
_WEIGHTS_AT_FIRST: Final = (0.1, 0.2, 0.7)  # until learned: most favourites stay for long
_LEARNING: Final = 1.0 / 200.0  # the share of a mixture that one use replaces
_LEARN_AFTER_USES: Final = 100  # before, every span looks good
_FLOOR: Final = 0.01  # of a span's weight
_SCALE_MAX: Final = 1e100
_ROWS_AT_FIRST: Final = 64


class Demand:
    """Fading counts of uses, by adapter."""

    def __init__(self, limit: int = 16_384) -> None:
        assert limit >= 2
        self._limit = limit
        self._row_of: dict[AdapterDigest, int] = {}
        self._free: list[int] = []
        self._counts: Floats = np.zeros((_ROWS_AT_FIRST, len(_SPANS_USES)))  # times `_scales`
        self._holds = np.zeros(_ROWS_AT_FIRST, dtype=np.int64)
        self._rows = 0  # in use or free; those beyond were never used
        self._scales = [1.0] * len(_SPANS_USES)
        self._growths = [math.exp(1.0 / span) for span in _SPANS_USES]
        self._totals = [0.0] * len(_SPANS_USES)  # times `_scales`
        self._learned = list(_WEIGHTS_AT_FIRST)
        self.uses = 0

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, digest: AdapterDigest) -> bool:
        return digest in self._row_of

    @property
    def weights(self) -> list[float]:
        """Of the spans, shortest first; they add up to 1."""
        spread = 1.0 - _FLOOR * len(_SPANS_USES)
        return [_FLOOR + spread * learned for learned in self._learned]

    def use(self, digest: AdapterDigest) -> None:
        """A request uses it."""
        row = self._row(digest)
        counts = self._counts[row].tolist()
        if self.uses >= _LEARN_AFTER_USES:
            self._learn(counts)
        self.uses += 1
        for index, growth in enumerate(self._growths):
            self._scales[index] *= growth
            self._totals[index] += self._scales[index]
            counts[index] += self._scales[index]
        self._counts[row] = counts
        if max(self._scales) > _SCALE_MAX:
            self._rescale()

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
        self._counts[row] = 0.0
        if not self._holds[row]:
            del self._row_of[digest]
            self._free.append(row)

    def chances(self, rows: Rows) -> Floats:
        """Chance of the adapter in each of the rows to be the next that is used."""
        factors, share = self._factors()
        return np.asarray(self._counts[rows] @ factors + share, dtype=np.float64)

    def chances_of(self, digests: Sequence[AdapterDigest]) -> Floats:
        """Chance of each of these; that of a new one for those that are not known."""
        rows = np.array([self._row_of.get(digest, -1) for digest in digests], dtype=np.int64)
        factors, share = self._factors()
        return np.where(rows < 0, share, self._counts[rows] @ factors + share)

    def check_integrity(self) -> None:
        """Assert that every row has one owner and that the mixture is one."""
        used = set(self._row_of.values())
        assert len(used) == len(self._row_of)
        assert used.isdisjoint(self._free)
        assert len(used) + len(self._free) == self._rows
        assert abs(sum(self.weights) - 1.0) < 1e-6
        assert not self._counts[self._free].any()

    def _factors(self) -> tuple[Floats, float]:
        """What a row's counts are multiplied by, and the share of an adapter without counts."""
        factors = [
            weight / (total + scale)
            for weight, total, scale in zip(self.weights, self._totals, self._scales, strict=True)
        ]
        shares = sum(factor * scale for factor, scale in zip(factors, self._scales, strict=True))
        return np.array(factors), shares / max(1, len(self._row_of))

    def _learn(self, counts: list[float]) -> None:
        """Move the mixture to the spans that expected a use of the adapter with these counts."""
        known = len(self._row_of)
        fits = [
            weight * (count + scale / known) / (total + scale)
            for weight, count, total, scale in zip(
                self.weights, counts, self._totals, self._scales, strict=True
            )
        ]
        total_fit = sum(fits)
        for index, fit in enumerate(fits):
            self._learned[index] += _LEARNING * (fit / total_fit - self._learned[index])

    def _rescale(self) -> None:
        for index, scale in enumerate(self._scales):
            if scale > _SCALE_MAX:
                self._counts[:, index] /= scale
                self._totals[index] /= scale
                self._scales[index] = 1.0

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
            if row == len(self._counts):
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
                self._holds = np.concatenate([self._holds, np.zeros_like(self._holds)])
        self._row_of[digest] = row
        return row

    def _prune(self) -> None:
        """Forget the less likely half of those that are not held; grow if all are."""
        spare = [(digest, row) for digest, row in self._row_of.items() if not self._holds[row]]
        if len(spare) * 2 < len(self._row_of):
            self._limit *= 2
            return
        chances = self.chances(np.array([row for _, row in spare]))
        for index in np.argsort(chances, kind="stable")[: len(spare) // 2]:
            self.forget(spare[index][0])
