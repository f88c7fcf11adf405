"""How long transfers take, learned from those that have ended."""

from collections.abc import Sequence
from typing import Final

_FADING: Final = 0.99  # of what older transfers count, with each new one


class LineFit:
    """Seconds of a transfer as a line in its bytes: fixed, and per byte.

    Least squares in which old transfers fade, pulled towards the guess by the weight of one.
    """

    def __init__(self, *, fixed_s: float, byte_s: float) -> None:
        self.fixed_s = fixed_s
        self.byte_s = byte_s
        self._guess = (fixed_s, byte_s)
        self._sums: Sequence[float] = (0.0,) * 5

    def learn(self, size_bytes: int, time_s: float) -> None:
        """One transfer took so long."""
        news = (1.0, size_bytes, time_s, float(size_bytes) ** 2, size_bytes * time_s)
        self._sums = tuple(old * _FADING + new for old, new in zip(self._sums, news, strict=True))
        count, bytes_, time, squares, products = self._sums
        fixed_s, byte_s = self._guess
        spread = squares - bytes_**2 / count
        joint = products - bytes_ * time / count
        # The pull keeps the slope where it was while all transfers are of one size.
        pull = (bytes_ / count) ** 2
        slope = max(0.0, (joint + pull * byte_s) / (spread + pull)) if spread + pull else byte_s
        self.byte_s = slope
        level_s = (time - slope * bytes_ + fixed_s) / (count + 1.0)
        self.fixed_s = max(0.0, level_s)
