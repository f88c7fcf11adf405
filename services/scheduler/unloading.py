"""Takes an adapter out of the workers' memory, and believes it when their reports say so.

Every worker that holds the adapter is told once to drop it; it does when no request there uses it.
The others are told, too, because it may be on its way to one, which no report says: there it goes
when it has come and nobody uses it. Nobody waits for these.
A worker whose report lacks it afterwards is done, even if somebody asks for the adapter again and
it is loaded again. A worker that comes, or comes back, with the adapter meanwhile is told, too. A
worker that leaves for good has confirmed nothing, and is in neither list of the answer.
"""

import asyncio
import re
import time
from typing import Final

from calumma.scheduler.v1 import scheduler_pb2
from services.common.errors import Reason, RpcError
from services.scheduler.links import Links
from services.scheduler.residency import Residency

GRACE_S_DEFAULT: Final = 30.0
GRACE_S_MAX: Final = 3600.0
UNLOADS_MAX: Final = 64  # under way at one time
_LOOK_S: Final = 0.05  # between two looks at what the workers hold
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

AttachResponse = scheduler_pb2.AttachResponse


class Unloading:
    """Serves UnloadAdapter."""

    def __init__(
        self, residency: Residency, links: Links[AttachResponse], *, unloads_max: int = UNLOADS_MAX
    ) -> None:
        self._residency = residency
        self._links = links
        self._unloads_max = unloads_max
        self._unloads = 0

    async def unload(
        self, request: scheduler_pb2.UnloadAdapterRequest
    ) -> scheduler_pb2.UnloadAdapterResponse:
        """Raises INVALID_FIELD and TOO_MANY_REQUESTS."""
        if _DIGEST.fullmatch(request.digest) is None:
            message = f"digest: must match {_DIGEST.pattern}"
            raise RpcError(Reason.INVALID_FIELD, message, field="digest")
        grace_s = GRACE_S_DEFAULT
        if request.HasField("grace"):
            grace_s = request.grace.ToNanoseconds() / 1e9
        if not 0 <= grace_s <= GRACE_S_MAX:
            message = f"grace: must be 0 to {GRACE_S_MAX:.0f} seconds"
            raise RpcError(Reason.INVALID_FIELD, message, field="grace")
        if self._unloads >= self._unloads_max:
            message = f"{self._unloads_max} adapters are being unloaded already"
            raise RpcError(Reason.TOO_MANY_REQUESTS, message, retry_after_s=1.0)
        self._unloads += 1
        try:
            return await self._unload(request.digest, grace_s)
        finally:
            self._unloads -= 1

    async def _unload(self, digest: str, grace_s: float) -> scheduler_pb2.UnloadAdapterResponse:
        end_s = time.monotonic() + grace_s
        told: dict[str, int] = {}  # by worker: its hellos when it was told
        freed_bytes: dict[str, int] = {}  # by worker that has confirmed
        most_bytes: dict[str, int] = {}
        for worker_id in self._residency.workers - self._residency.holders(digest).keys():
            self._send(worker_id, digest)
        while True:
            holders = self._residency.holders(digest)
            for worker_id in told.keys() - holders.keys() - freed_bytes.keys():
                if worker_id in self._residency:
                    freed_bytes[worker_id] = most_bytes[worker_id]
            holding = holders.keys() - freed_bytes.keys()
            for worker_id in holding:
                known_bytes = most_bytes.get(worker_id, 0)
                most_bytes[worker_id] = max(holders[worker_id], known_bytes)
                self._tell(worker_id, digest, told)
            left_s = end_s - time.monotonic()
            if not holding or left_s <= 0:
                break
            await self._residency.changed(left_s)
            await asyncio.sleep(min(_LOOK_S, max(0.0, end_s - time.monotonic())))
        return scheduler_pb2.UnloadAdapterResponse(
            freed_bytes=sum(freed_bytes.values()),
            unloaded_workers=sorted(freed_bytes),
            holding_workers=sorted(holding),
        )

    def _tell(self, worker_id: str, digest: str, told: dict[str, int]) -> None:
        """Once per stream: what was sent on one that broke may be lost."""
        hellos = self._residency.hellos(worker_id)
        if worker_id in self._links and told.get(worker_id) != hellos:
            told[worker_id] = hellos
            self._send(worker_id, digest)

    def _send(self, worker_id: str, digest: str) -> None:
        if worker_id in self._links:
            drop = scheduler_pb2.DropAdapter(digest=digest)
            self._links.send(worker_id, AttachResponse(drop=drop))
