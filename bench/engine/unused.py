"""What LoRA costs a batch that uses none: our engine with all adapters in memory, and with none.

Both in one process, in short turns by ABBA, so that neither a drift of the machine nor how memory
lies in a process falls on one of the two.
"""

from dataclasses import dataclass
from typing import Final

from bench.engine.measures import Measure, median
from bench.engine.models import Subject
from bench.peers.lines import Child

_ANSWER_S_MAX: Final = 60.0
_MEASURE: Final = Measure("base", 32)


@dataclass(frozen=True, slots=True)
class Unused:
    """Median time of a decode step in each turn, seconds."""

    with_adapters_s: list[float]
    without_s: list[float]

    @property
    def kept(self) -> float:
        """Throughput with adapters over that without; median over pairs of turns."""
        pairs = zip(self.with_adapters_s, self.without_s, strict=True)
        return median(without_s / with_s for with_s, without_s in pairs)


def adapters_unused(child: Child, subject: Subject, *, pairs: int, output_tokens: int) -> Unused:
    """`child`: our engine with all its adapters; it has them at the end, too. Raises PeerError."""
    command = _MEASURE.command(subject, output_tokens=output_tokens)
    found = Unused([], [])

    def turn(times: list[float]) -> None:
        times.append(float(child.ask(command, timeout_s=_ANSWER_S_MAX)["decode_step_s"]))

    for _ in range((pairs + 1) // 2):  # with, without, without, with
        turn(found.with_adapters_s)
        child.ask({"kind": "unload"}, timeout_s=_ANSWER_S_MAX)
        turn(found.without_s)
        turn(found.without_s)
        child.ask({"kind": "load"}, timeout_s=_ANSWER_S_MAX)
        turn(found.with_adapters_s)
    return found
