"""Cut-offs between the sizes of recent requests: K-means on a line, and which K.

On a line the clusters of an optimal K-means are intervals of the sorted values, so dynamic
programming finds the optimum exactly, without a random start:

    D[k][j] = min over i of D[k-1][i] + WCSS(values[i:j])

Chameleon (§4.3.2) takes the K with the least WCSS (within-cluster sum of squares). That never grows
with K, so the rule always gives the largest K allowed; it is kept as "paper". Of the sound rules,
"elbow" takes the smallest K after which one more cluster explains too little more of the variance,
and "silhouette" the K whose values are closest to their own cluster compared with the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, assert_never

import numpy as np
from numpy.typing import NDArray

Selection = Literal["paper", "elbow", "silhouette"]

_Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Clusters:
    """An optimal division. `starts` are the clusters' first positions in the sorted values."""

    starts: tuple[int, ...]
    centroids: tuple[float, ...]
    wcss: float

    @property
    def cutoffs(self) -> tuple[float, ...]:
        """The mean of each two neighbours' centroids: cluster i takes sizes below cutoffs[i]."""
        return tuple((low + high) / 2 for low, high in pairwise(self.centroids))


def find_cutoffs(
    sizes: Sequence[float], *, k_max: int, selection: Selection, elbow: float, sample: int
) -> tuple[float, ...]:
    """The cut-offs of the chosen K, ascending, by at most `sample` evenly spaced order statistics.

    `elbow` is the least share of the variance that one more cluster must explain.
    """
    values = np.sort(np.array(sizes, dtype=float))
    if len(values) > sample:
        values = values[((np.arange(sample) + 0.5) * len(values) / sample).astype(int)]
    return choose(values, cluster(values, k_max), selection=selection, elbow=elbow).cutoffs


def cluster(values: _Values, k_max: int) -> list[Clusters]:
    """Optimal clusters of sorted values for K = 1 up to `k_max`, or to the number of distinct ones.

    O(K · n²) in vector operations: some milliseconds for 512 values.
    """
    spread = _spreads(values)
    best = spread[0]  # best[j]: least WCSS of values[:j] in k clusters
    splits: list[NDArray[np.intp]] = []  # per k > 1, where the last cluster of values[:j] starts
    found = [_clusters(values, (0,), float(best[-1]))]
    for _ in range(1, min(k_max, len(np.unique(values)))):
        totals = best[:-1, None] + spread
        splits.append(np.argmin(totals, axis=0))
        best = np.min(totals, axis=0)
        found.append(_clusters(values, _starts(splits), float(best[-1])))
    return found


def choose(
    values: _Values, found: Sequence[Clusters], *, selection: Selection, elbow: float
) -> Clusters:
    """One of the divisions of the values into 1, 2, … clusters."""
    match selection:
        case "paper":
            return found[-1]
        case "elbow":
            for fewer, more in pairwise(found):
                if fewer.wcss - more.wcss < elbow * found[0].wcss:
                    return fewer
            return found[-1]
        case "silhouette":
            return max(found[1:], key=lambda one: silhouette(values, one), default=found[0])
        case _:
            assert_never(selection)


def silhouette(values: _Values, clusters: Clusters) -> float:
    """Mean over values of (b - a) / max(a, b), for at least two clusters; the larger the better.

    a is a value's mean distance to the others of its cluster, b that to the next cluster's; a value
    alone in its cluster counts 0 (Rousseeuw 1987).
    """
    distances = np.abs(values[:, None] - values[None, :])
    sums = np.add.reduceat(distances, clusters.starts, axis=1)  # [values, clusters]
    counts = np.diff([*clusters.starts, len(values)])
    own = np.repeat(np.arange(len(counts)), counts)
    rows = np.arange(len(values))
    a = sums[rows, own] / np.maximum(counts[own] - 1, 1)
    means = sums / counts
    means[rows, own] = np.inf
    b = means.min(axis=1)
    return float(np.mean(np.where(counts[own] > 1, (b - a) / np.maximum(a, b), 0.0)))


def _spreads(values: _Values) -> _Values:
    """[n, n + 1]: the WCSS of values[i:j]; infinite for empty ones. Centred, to lose no digits."""
    centred = values - values.mean()
    sums = np.concatenate(([0.0], np.cumsum(centred)))
    squares = np.concatenate(([0.0], np.cumsum(centred**2)))
    counts = np.arange(len(sums))[None, :] - np.arange(len(values))[:, None]
    within = (
        squares[None, :]
        - squares[:-1, None]
        - (sums[None, :] - sums[:-1, None]) ** 2 / np.maximum(counts, 1)
    )
    return np.where(counts > 0, np.maximum(within, 0.0), np.inf)


def _starts(splits: Sequence[NDArray[np.intp]]) -> tuple[int, ...]:
    """Where the clusters start, walking back from the last."""
    starts = [len(splits[0]) - 1]
    for split in reversed(splits):
        starts.append(int(split[starts[-1]]))
    return (0, *reversed(starts[1:]))


def _clusters(values: _Values, starts: tuple[int, ...], wcss: float) -> Clusters:
    parts = np.split(values, starts[1:])
    return Clusters(starts, tuple(float(part.mean()) for part in parts), wcss)
