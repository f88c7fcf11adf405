"""Deleting what nobody needs: superseded revision documents, and blobs that no version names.

Storage has no transactions, so safety is time. A superseded document is deleted when it is older
than any change can take; a blob when it is old, has been without a name for as long, and still is
after everything has been read again. A publisher writes its blob anew, which makes it young, and
looks for it once more after naming it (`publishing`), so even a collector that was held up between
its last look and the deletion costs a second upload and not an adapter.
"""

import time
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog

from services.adapter_store.blobs import FOLDER as BLOBS_FOLDER
from services.adapter_store.registry import CHANGE_S_MAX, Document, Registry
from services.adapter_store.storage import ObjectInfo, Storage

REVISIONS_KEPT: Final = 3
_log = structlog.get_logger("collect")


class Collector:
    """Call `collect` now and then."""

    def __init__(self, storage: Storage, registry: Registry, *, safety_age_s: float) -> None:
        self._storage = storage
        self._registry = registry
        self._safety_age_s = safety_age_s
        self._orphan_since_s: dict[str, float] = {}  # path of a blob, monotonic clock

    async def collect(self) -> int:
        """One pass. Returns how many objects it deleted."""
        blobs = await self._storage.list(BLOBS_FOLDER)
        documents = await self._registry.sync()
        paths = [*self._superseded(documents), *self._orphans(blobs)]
        for path in paths:
            await self._storage.delete(path)
            self._orphan_since_s.pop(path, None)
        if paths:
            _log.info("collected", objects=len(paths))
        return len(paths)

    def _superseded(self, documents: list[Document]) -> list[str]:
        """All but the newest few documents of each adapter, of those that are old enough."""
        age_s = max(self._safety_age_s, 2 * CHANGE_S_MAX)
        kept: dict[str, int] = {}
        paths: list[str] = []
        for document in sorted(documents, key=lambda item: item.revision, reverse=True):
            kept[document.name] = kept.get(document.name, 0) + 1
            if kept[document.name] > REVISIONS_KEPT and _is_older(document.info, age_s):
                paths.append(document.info.path)
        return paths

    def _orphans(self, blobs: list[ObjectInfo]) -> list[str]:
        """Blobs that have been without a version for long enough."""
        referenced = self._registry.referenced()
        if referenced is None:  # an adapter that can't be read may need any of them
            return []
        named = {f"{BLOBS_FOLDER}/{digest.removeprefix('sha256:')}" for digest in referenced}
        orphans = [blob for blob in blobs if blob.path not in named]
        now_s = time.monotonic()
        since_s = {blob.path: self._orphan_since_s.get(blob.path, now_s) for blob in orphans}
        self._orphan_since_s = since_s
        return [
            blob.path
            for blob in orphans
            if now_s - since_s[blob.path] >= self._safety_age_s
            and _is_older(blob, self._safety_age_s)
        ]


def _is_older(info: ObjectInfo, age_s: float) -> bool:
    return datetime.now(UTC) - info.modified >= timedelta(seconds=age_s)
