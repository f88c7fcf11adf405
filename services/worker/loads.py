"""Loads of adapters as the core hears of them: progress, their end, and what host memory has now.

A load that fails after a prompt has begun with its first layers leaves something behind: the engine
has those layers, and the core ends that prompt only when the step that it is in has ended. So they
are cleared when no open sequence has the adapter any more, and until then its error is known.
"""

import time
from collections.abc import Callable, Iterable

from services.common.errors import RpcError
from services.core.events import (
    AdapterLoaded,
    AdapterLoadFailed,
    AdapterProgressed,
    HostCacheChanged,
    ReplicaEvent,
)
from services.core.types import Adapter, AdapterDigest
from services.worker.failures import load_failure
from services.worker.requests import LiveRequest
from services.worker.residency import Residency
from services.worker.roster import Roster


class Loads:
    """Performs `LoadAdapter`. `post` hands an event to the core. All belongs to the driver."""

    def __init__(
        self, residency: Residency, roster: Roster, *, post: Callable[[ReplicaEvent], None]
    ) -> None:
        self._residency = residency
        self._roster = roster
        self._post = post
        self._errors: dict[AdapterDigest, RpcError] = {}
        self._told: set[AdapterDigest] = set()  # of those, the core knows
        self._near: frozenset[AdapterDigest] = frozenset()  # as the core was told

    def begin(self, adapter: Adapter, blocks: tuple[int, ...]) -> None:
        """The download happens inside the span of the first request that waits for it."""
        first = next(iter(self._roster.awaiting(adapter.digest)), None)
        offset_ns = time.time_ns() - time.monotonic_ns()
        context = first.open_load_span(offset_ns=offset_ns) if first is not None else None
        self._residency.load(
            adapter,
            blocks=blocks,
            context=context,
            on_progress=self._on_progress,
            on_ended=self._on_ended,
        )

    def error_of(self, digest: AdapterDigest | None) -> RpcError | None:
        """Why the adapter's last load failed, while the core is told."""
        return self._errors.get(digest) if digest is not None else None

    def note_told(self, failed: AdapterLoadFailed) -> None:
        """The core has taken this in."""
        self._told.add(failed.digest)

    def settle(self, open_requests: Iterable[LiveRequest]) -> None:
        """Do what has become possible and tell what has changed. `open_requests`: in the engine."""
        if self._told:
            used = {live.work.digest for live in open_requests}
            for digest in self._told - used:
                self._told.remove(digest)
                del self._errors[digest]
                self._residency.clear(digest)
        self._tell_near()

    def _on_progress(self, digest: AdapterDigest, layers: int) -> None:
        self._post(AdapterProgressed(digest, layers))

    def _on_ended(self, digest: AdapterDigest, error: RpcError | None) -> None:
        now = time.monotonic()
        for live in self._roster.awaiting(digest):
            live.end_load(now=now, error=error.reason if error is not None else None)
        self._tell_near()
        if error is None:
            self._post(AdapterLoaded(digest))
        else:
            self._errors[digest] = error
            self._post(AdapterLoadFailed(digest, load_failure(error.reason), error.message))

    def _tell_near(self) -> None:
        near = self._residency.near()
        if near is not self._near:
            self._near = near
            self._post(HostCacheChanged(near))
