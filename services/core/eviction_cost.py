"""The time that keeping an adapter saves, per block that it holds.

    score = chance to be used next · seconds that its absence would cost / blocks

The chance is that of `services.core.demand`: it outlives the adapter's stay, so one that comes back
is known, and one scan through many adapters makes none of them a favourite. The seconds are those
of a load as they were measured here, from host memory or, for one that is not there, from the
store, and `miss_s`: a request that misses also waits for the step that runs, whatever its adapter's
size. Without it size would cancel out, and a small adapter, which is worth its few blocks, would
go as soon as a large one. It sets hits against bytes: the larger, the more hits and the more bytes.

Adapters that a request here or a hint wants are not ranked by chance but by urgency, as with every
policy: their next use is known.
"""

from dataclasses import dataclass
from typing import Final

from services.core.eviction_view import Floats, IdleAdapters, Rules

_RULES: Final = Rules(tie="oldest")


@dataclass(frozen=True, slots=True)
class Cost:
    """Adapters whose absence would cost little for their size go first."""

    miss_s: float = 0.016  # best of several by `bench cache` on Chameleon's card

    @property
    def rules(self) -> Rules:
        """Of equal scores the one unused for longest goes first."""
        return _RULES

    @property
    def clock(self) -> float:
        """It has none."""
        return 0.0

    def scores(self, idle: IdleAdapters) -> Floats:
        """Expected seconds saved per block and use of any adapter."""
        return idle.chances * (self.miss_s + idle.reload_s) / idle.blocks

    def note_evicted(self, score: float) -> None:
        """Nothing to keep."""
