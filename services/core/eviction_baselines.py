"""Eviction policies that others are compared with: recency, frequency, and GDSF."""

from services.core.eviction_view import Floats, IdleAdapters, Rules


class Lru:
    """Least recently used goes first."""

    def __init__(self) -> None:
        self.rules = Rules(exchange="age")
        self.clock = 0.0

    def scores(self, idle: IdleAdapters) -> Floats:
        """The time of the last use."""
        return idle.last_used_s

    def note_evicted(self, score: float) -> None:
        """Nothing to keep."""


class Lfu:
    """Least often used since it was loaded goes first; of those, the one unused for longest."""

    def __init__(self) -> None:
        self.rules = Rules(tie="oldest")
        self.clock = 0.0

    def scores(self, idle: IdleAdapters) -> Floats:
        """Uses since the load."""
        return idle.uses

    def note_evicted(self, score: float) -> None:
        """Nothing to keep."""


class Gdsf:
    """Greedy dual size frequency (Cherkasova, HP Labs 1998; Chameleon's comparison in §5).

    Score = clock + uses · cost / size. The clock is the highest score that was evicted so far, and
    an adapter's is that of its last use, so that old favourites go in the end. Cost is 1, so that
    the hit rate counts and not the bytes: with the load's time, which grows with the size, size
    would cancel out.
    """

    def __init__(self) -> None:
        self.rules = Rules()
        self.clock = 0.0

    def scores(self, idle: IdleAdapters) -> Floats:
        """The clock at the last use, and uses per block."""
        return idle.clock + idle.uses / idle.blocks

    def note_evicted(self, score: float) -> None:
        """Time goes on to its score."""
        self.clock = max(self.clock, score)
