"""Adapters that are to leave this worker as soon as no request here needs them.

The core takes them out of device memory; this forgets the copy in host memory after that. What is
being loaded stays until it has come, and goes then.
"""

from typing import Final

from services.core.types import AdapterDigest
from services.worker.outputs import Tier
from services.worker.residency import Residency
from services.worker.roster import Roster

DROPS_MAX: Final = 1024


class Drops:
    """What is still to go. Its methods belong to the driver."""

    def __init__(self, residency: Residency, roster: Roster) -> None:
        self._residency = residency
        self._roster = roster
        self._digests: dict[AdapterDigest, None] = {}  # oldest first

    def add(self, digest: AdapterDigest) -> None:
        """It is to go. The oldest is given up when there are too many."""
        self._digests[digest] = None
        if len(self._digests) > DROPS_MAX:
            del self._digests[next(iter(self._digests))]

    def settle(self) -> None:
        """Forget the host copies that nothing here needs any more."""
        if not self._digests:
            return
        needed = {live.work.digest for live in self._roster}
        for digest in tuple(self._digests):
            if digest in needed or self._residency.tier(digest) is Tier.DEVICE:
                continue
            if self._residency.drop_host(digest):
                del self._digests[digest]
