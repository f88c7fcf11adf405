"""Which adapters there are, and which one a request asks for.

The paper's set-up: as many adapters of each rank, ranks drawn uniformly, the adapters of a rank
by a power law. `numpy.random.power(1)`, the exponent in S-LoRA's code, is the uniform distribution;
here the k-th adapter of a rank weighs k^-exponent.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from services.core.types import Adapter, AdapterDigest

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class AdapterPool:
    """So many adapters, ranks in turn. 2 MiB per rank is Llama-7B's q, k, v and o in fp16."""

    count: int = 100
    ranks: tuple[int, ...] = (8, 16, 32, 64, 128)
    rank_bytes: int = 2 * 2**20

    def adapters(self) -> tuple[Adapter, ...]:
        """Adapter i has rank `ranks[i % len(ranks)]`."""
        assert self.count >= len(self.ranks)
        return tuple(
            Adapter(AdapterDigest(f"sha256:{i:064x}"), rank, rank * self.rank_bytes)
            for i in range(self.count)
            for rank in (self.ranks[i % len(self.ranks)],)
        )


@dataclass(frozen=True, slots=True)
class Popularity:
    """How adapters are chosen.

    `shift_s`: so often the favourites change, by moving every rank's order on. `scan_share`: of the
    requests go through all adapters in turn instead, which defeats recency. `base_share`: ask for
    the base model. With "clients" the lengths' own traffic shares decide, adapter i being client i.
    """

    ranks: Literal["uniform", "power"] = "uniform"
    adapters: Literal["uniform", "power", "clients"] = "power"
    exponent: float = 1.0
    shift_s: float | None = None
    scan_share: float = 0.0
    base_share: float = 0.0

    def draw(
        self,
        times_s: Floats,
        pool: AdapterPool,
        rng: np.random.Generator,
        *,
        shares: Floats | None = None,
    ) -> Ints:
        """Adapter index per arrival; -1, the index of no adapter, for the base model."""
        rank_u, adapter_u, scan_u, base_u = rng.random((len(times_s), 4)).T
        if self.adapters == "clients":
            assert shares is not None, "these lengths know no clients"
            weights = np.resize(shares, pool.count)
            drawn = _pick(weights, adapter_u)
        else:
            drawn = self._by_rank(times_s, pool, rank_u, adapter_u)
        scanned = scan_u < self.scan_share
        drawn[scanned] = np.arange(scanned.sum()) % pool.count
        drawn[base_u < self.base_share] = -1
        return drawn

    def _by_rank(self, times_s: Floats, pool: AdapterPool, rank_u: Floats, u: Floats) -> Ints:
        groups = len(pool.ranks)
        rank = _pick(_weights(groups, self.exponent if self.ranks == "power" else 0.0), rank_u)
        drawn = np.empty(len(u), dtype=np.int64)
        for group in range(groups):
            mine = rank == group
            size = len(range(group, pool.count, groups))
            exponent = self.exponent if self.adapters == "power" else 0.0
            place = _pick(_weights(size, exponent), u[mine])
            if self.shift_s is not None:
                # A third of the rank further each time: no favourite stays one.
                epoch = (times_s[mine] // self.shift_s).astype(np.int64)
                place = (place + epoch * max(1, size // 3)) % size
            drawn[mine] = group + place * groups
        return drawn


def _weights(count: int, exponent: float) -> Floats:
    return np.asarray(np.arange(1.0, count + 1.0) ** -exponent, dtype=np.float64)


def _pick(weights: Floats, u: Floats) -> Ints:
    cumulative = np.cumsum(weights / weights.sum())
    picked = np.searchsorted(cumulative, u, side="right")
    return np.minimum(picked, len(weights) - 1).astype(np.int64)
