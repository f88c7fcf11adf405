"""The record of what the core was told and decided: JSON lines, so that decisions can be replayed.

A run begins with a line that says how its core was built; a core built the same way and fed the
same events decides the same. An event's line is written before the core gets it, so that one that
breaks the core is there; its decisions follow in a line of their own. Off unless a file is named.
The file is written by a thread of its own, so that a slow disk never delays a dispatch, and ends at
a size limit.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

import structlog
from pydantic import TypeAdapter

from services.core.cluster import ClusterScheduler
from services.core.config import ClusterConfig
from services.core.decisions import ClusterDecision
from services.core.events import ClusterEvent
from services.core.policies import POLICIES, build_policy
from services.scheduler.options import read_options

_log = structlog.get_logger("journal")
_ADAPTERS: Final[dict[str, TypeAdapter[ClusterEvent]]] = {
    kind.__name__: TypeAdapter(kind) for kind in get_args(ClusterEvent)
}


@dataclass(frozen=True, slots=True)
class CoreRecipe:
    """How a core is built: its policy's name and options, and its limits."""

    policy: str
    cluster: ClusterConfig
    options: Mapping[str, str] = field(default_factory=dict)  # the policy's own

    def build(self) -> ClusterScheduler:
        """A fresh core. Raises ValueError for a bad option."""
        config = read_options(POLICIES[self.policy].config, self.options)
        return ClusterScheduler(self.cluster, build_policy(self.policy, config))


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

    def decided(self, decisions: Sequence[ClusterDecision]) -> None:
        """Note what the core decided at what was noted last."""
        self._append({"decided": _describe(decisions)})

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


@dataclass(frozen=True, slots=True)
class Replayed:
    """An event (None: a tick), what a fresh core decides, and what was decided then."""

    now: float
    event: ClusterEvent | None
    decisions: list[ClusterDecision]
    recorded: list[Any] | None  # None: the file does not say

    @property
    def is_same(self) -> bool:
        """False if the core decides otherwise than it did."""
        now = json.loads(json.dumps(_describe(self.decisions)))
        return self.recorded is None or bool(now == self.recorded)


def replay(path: Path) -> Iterator[Replayed]:
    """Feed a recorded file to fresh cores."""
    core: ClusterScheduler | None = None
    with path.open(encoding="utf-8") as file:
        records = map(json.loads, file)
        record = next(records, None)
        while record is not None:
            following = next(records, None)
            if "run" in record:
                core = TypeAdapter(CoreRecipe).validate_python(record["run"]).build()
            elif core is None:
                raise ValueError(f"{path} does not begin with a run")
            elif "now" in record:
                recorded = None if following is None else following.get("decided")
                yield _decide_again(core, record, recorded)
            record = following


def _decide_again(
    core: ClusterScheduler, record: dict[str, Any], recorded: list[Any] | None
) -> Replayed:
    now, event = record["now"], read_event(record)
    decisions = core.tick(now=now) if event is None else core.handle(event, now=now)
    return Replayed(now, event, decisions, recorded)


def _describe(decisions: Sequence[ClusterDecision]) -> list[list[Any]]:
    return [[type(decision).__name__, dataclasses.asdict(decision)] for decision in decisions]


def read_event(record: dict[str, Any]) -> ClusterEvent | None:
    """The event of a line. None: a tick."""
    if "type" not in record:
        return None
    return _ADAPTERS[record["type"]].validate_python(record["event"])
