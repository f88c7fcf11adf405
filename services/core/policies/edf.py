"""`edf`: priority classes, and the earliest deadline first within a class (Liu and Layland, 1973).

A request without a deadline is due `default_slo_s` after its arrival, so that it ages among those
that have one. With equal deadlines it is FIFO.

Fits: clients that state honest deadlines, and a load that can be served: whatever order meets all
deadlines, this one does too. Fails past capacity: then it works on those that are late already and
makes the next ones late in turn. Priorities are strict: a busy upper class starves the lower ones.
"""

from dataclasses import dataclass

from services.core.bounds import require_positive
from services.core.keyed import Key
from services.core.policies.ordered import KeyedPolicy
from services.core.types import Request


@dataclass(frozen=True, slots=True)
class EdfConfig:
    """What a request without a deadline is taken to want."""

    default_slo_s: float = 60.0  # our choice: about a long answer at a slow reader's pace
    bypasses: int = 8

    def __post_init__(self) -> None:
        require_positive(default_slo_s=self.default_slo_s)


class Edf(KeyedPolicy):
    """Earliest deadline first."""

    def __init__(self, config: EdfConfig | None = None) -> None:
        self._config = config or EdfConfig()
        super().__init__("edf", bypasses=self._config.bypasses)

    def key(self, request: Request) -> Key:
        """Priority, then deadline, then arrival."""
        due_s = request.deadline_s
        if due_s is None:
            due_s = request.arrived_s + self._config.default_slo_s
        return (-request.priority, due_s, request.arrived_s)
