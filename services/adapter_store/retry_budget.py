"""How much may be tried again: a share of what is asked, so that an outage is not made worse.

When object storage fails, every reader would like to try again, and storage that is short of
capacity gets a multiple of its load. As Envoy and Finagle do, retries are paid for by reads: each
read brings a fifth of a retry, and a small floor lets a service that is nearly idle try again too.
"""

import time
from collections.abc import Callable
from typing import Final

READS_PER_RETRY: Final = 5
RETRIES_PER_S: Final = 1  # the floor
SAVED_RETRIES_MAX: Final = 20


class RetryBudget:
    """One for all reads of a process."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._saved = float(SAVED_RETRIES_MAX * READS_PER_RETRY)  # counted in reads
        self._filled_s = clock()

    def note_read(self) -> None:
        """A read begins that is not itself a retry."""
        self._save(1)

    def take(self) -> bool:
        """Whether something may be tried again now."""
        now_s = self._clock()
        self._save((now_s - self._filled_s) * RETRIES_PER_S * READS_PER_RETRY)
        self._filled_s = now_s
        if self._saved < READS_PER_RETRY:
            return False
        self._saved -= READS_PER_RETRY
        return True

    def _save(self, reads: float) -> None:
        self._saved = min(SAVED_RETRIES_MAX * READS_PER_RETRY, self._saved + reads)
