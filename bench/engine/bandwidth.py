"""How fast this machine reads memory right now.

On a shared host that changes within minutes, by a factor of two, so it is measured beside whatever
depends on it.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

_SWEEP_BYTES: Final = 2**30  # far more than any cache
_SWEEPS: Final = 3


class ReadBandwidth:
    """One thread per core, each reading its part of one GiB. Equal to a loop in C here."""

    def __init__(self, threads: int = os.cpu_count() or 1) -> None:
        words = np.ones(_SWEEP_BYTES // 8, dtype=np.int64)
        self._parts = np.array_split(words, threads)
        self._pool = ThreadPoolExecutor(threads)

    def measure(self) -> float:
        """Bytes per second, the best of a few sweeps (some 20 ms each)."""
        return max(self._sweep() for _ in range(_SWEEPS))

    def close(self) -> None:
        self._pool.shutdown()
        self._parts = []

    def _sweep(self) -> float:
        began_s = time.perf_counter()
        list(self._pool.map(np.bitwise_or.reduce, self._parts))
        return _SWEEP_BYTES / (time.perf_counter() - began_s)
