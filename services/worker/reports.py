"""What the scheduler must hear of single requests, between the driver and the attach stream.

Nothing is kept while the stream is down: the hello of the next one lists what runs then.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Final

from services.core.types import Attempt
from services.worker.outputs import Finish

PENDING_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Started:
    """The first step of a request begins."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The first token of this attempt is there."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Finished:
    """A request has left. `output_tokens` counts those of all attempts."""

    attempt: Attempt
    finish: Finish
    output_tokens: int


Report = Started | Prefilled | Finished


class Reports:
    """A queue of reports, and the bell that also rings when the worker's status has changed."""

    def __init__(self) -> None:
        self._pending: deque[Report] = deque()
        self._is_open = False
        self.bell = asyncio.Event()

    @property
    def has_overflowed(self) -> bool:
        """True if the scheduler has not read for so long that only a new hello can help."""
        return len(self._pending) > PENDING_MAX

    def open(self) -> None:
        """A stream begins; its hello says all that is true now."""
        self._pending.clear()
        self._is_open = True

    def close(self) -> None:
        """The stream is down."""
        self._pending.clear()
        self._is_open = False

    def add(self, report: Report) -> None:
        if self._is_open and not self.has_overflowed:
            self._pending.append(report)
            self.bell.set()

    def take(self) -> list[Report]:
        """All that is pending, oldest first."""
        taken = list(self._pending)
        self._pending.clear()
        return taken
