"""A small memory of what was looked for and not there, so that asking again costs nothing."""

import time
from collections import OrderedDict
from typing import Final

ENTRIES_MAX: Final = 4096


class NegativeCache:
    """Keys that were missing less than `ttl_s` ago; the oldest go first when it is full."""

    def __init__(self, *, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._until_s: OrderedDict[str, float] = OrderedDict()

    def add(self, key: str) -> None:
        """Remember a miss."""
        self._until_s.pop(key, None)
        self._until_s[key] = time.monotonic() + self._ttl_s
        if len(self._until_s) > ENTRIES_MAX:
            self._until_s.popitem(last=False)

    def discard(self, key: str) -> None:
        """Forget a miss."""
        self._until_s.pop(key, None)

    def holds(self, key: str) -> bool:
        """Whether the key was missing just now."""
        until_s = self._until_s.get(key)
        return until_s is not None and time.monotonic() < until_s
