"""Seeds that make the simulated engine give answers of chosen lengths.

The engine draws a length from a request's sampling seed. Here the draw is inverted by a table, so
that a live request ends after exactly as many tokens as its trace says, while `max_tokens` stays
what its client would have said: nothing but the engine knows how long the answer will be.
"""

from bisect import bisect_left
from typing import Final

from services.worker.engine.simulated import output_tokens, sequence_seed

_SEEDS: Final = 2**17
_ENGINE_SEED: Final = 0  # the worker's default


class LengthSeeds:
    """The first seed for each length. Lengths count the end-of-sequence token."""

    def __init__(self) -> None:
        self._seeds: dict[int, int] = {}
        for seed in range(_SEEDS):
            length = output_tokens(sequence_seed(_ENGINE_SEED, seed)) + 1
            self._seeds.setdefault(length, seed)
        self._lengths = sorted(self._seeds)

    def nearest(self, length: int) -> int:
        """The closest length that a seed is known for; most are."""
        index = bisect_left(self._lengths, length)
        around = self._lengths[max(0, index - 1) : index + 1]
        return min(around, key=lambda known: abs(known - length))

    def seed(self, length: int) -> int:
        """A seed for a length that `nearest` gave."""
        return self._seeds[length]
