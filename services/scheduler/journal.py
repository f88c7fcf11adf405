"""The record of what the core was told: one JSON line per event, so that decisions can be replayed.

A run begins with a line that says how its core was built; a core built the same way and fed the
same events decides the same. Off unless a file is named. The file is written by a thread of its
own, so that a slow disk never delays a dispatch, and ends at a size limit.
"""

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import structlog
from pydantic import TypeAdapter

from services.core.cluster import ClusterScheduler
from services.core.config import ClusterConfig
from services.core.decisions import ClusterDecision
from services.core.events import ClusterEvent
from services.core.policies import build_policy

_log = structlog.get_logger("journal")
_ADAPTERS: Final[dict[str, TypeAdapter[ClusterEvent]]] = {
    kind.__name__: TypeAdapter(kind) for kind in get_args(ClusterEvent)
}


@dataclass(frozen=True, slots=True)
class CoreRecipe:
    """How a core is built: its policy's name and its limits."""

    policy: str
    cluster: ClusterConfig

    def build(self) -> ClusterScheduler:
        """A fresh core."""
        return ClusterScheduler(self.cluster, build_policy(self.policy))


class Journal:
    """Appends runs to a file. `size_bytes_max` ends the recording, not the service."""

    def __init__(self, path: Path, *, size_bytes_max: int) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._left_bytes = size_bytes_max - self._file.tell()
        self._lines: list[str] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")

    def begin(self, recipe: CoreRecipe) -> None:
        """Start a run with a fresh core."""
        self._append({"run": dataclasses.asdict(recipe)})

    def append(self, now: float, event: ClusterEvent | None) -> None:
        """Note an event, or with None a tick, that the core is given at `now`."""
        if event is None:
            self._append({"now": now})
            return
        fields = dataclasses.asdict(event)
        self._append({"now": now, "type": type(event).__name__, "event": fields})

    def flush(self) -> None:
        """Hand what was noted to the writing thread."""
        if self._lines:
            self._writer.submit(self._file.write, "".join(self._lines))
            self._lines.clear()

    def close(self) -> None:
        """Write everything and end. Blocks until it is on disk."""
        self.flush()
        self._writer.shutdown()
        self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        if self._left_bytes <= 0:
            return
        line = json.dumps(record, separators=(",", ":")) + "\n"
        self._left_bytes -= len(line)
        self._lines.append(line)
        if self._left_bytes <= 0:
            _log.warning("journal_full", path=self._file.name)


def replay(path: Path) -> Iterator[tuple[float, ClusterEvent | None, list[ClusterDecision]]]:
    """Feed a recorded file to fresh cores: each event (None: a tick) and what it decides."""
    core: ClusterScheduler | None = None
    with path.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            if "run" in record:
                core = TypeAdapter(CoreRecipe).validate_python(record["run"]).build()
                continue
            if core is None:
                raise ValueError(f"{path} does not begin with a run")
            now = record["now"]
            event = read_event(record)
            yield now, event, core.tick(now=now) if event is None else core.handle(event, now=now)


def read_event(record: dict[str, Any]) -> ClusterEvent | None:
    """The event of a line. None: a tick."""
    if "type" not in record:
        return None
    return _ADAPTERS[record["type"]].validate_python(record["event"])
