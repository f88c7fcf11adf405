"""`sjf` and `aged_sjf`: the shortest expected job first, without and with relative ageing.

`sjf` is the order of SSJF (2404.08509) and μ-Serve, which Chameleon compares with: by predicted
output length. As an option by expected service time, which counts prompt and adapter rank too.
Fits: the lowest mean wait, when a few long requests may wait as long as it takes. Fails: while
capacity is short, a long request is overtaken by all that arrives; nothing bounds its wait.

`aged_sjf` orders by

    key = arrival + k · expected service        [seconds]

Ageing by wait ÷ expected service serves whoever waited longest for its size. That ratio reaches k
for a request exactly at its key, so the one whose ratio reaches k first goes first: the same idea,
but the order of two requests never changes while they wait, so a heap will do and nothing is
sorted again. It is also EDF with a deadline in proportion to the work asked for: slowdowns are made
equal across sizes. Whoever arrives more than k times its service after a request goes behind it, so
none starves: the wait is bounded by the backlog at that time. k → 0 is FIFO, k → ∞ is SJF.

Fits: mixed lengths near and past capacity. Fails where the length prediction is blind: then it is
FIFO with noise, of at most k times the error.
"""

from dataclasses import dataclass
from typing import Literal

from services.core.bounds import require_positive
from services.core.keyed import Key
from services.core.policies.ordered import KeyedPolicy
from services.core.types import Request


@dataclass(frozen=True, slots=True)
class SjfConfig:
    """What is short, and who may pass a head that fits no worker."""

    by: Literal["output_tokens", "service_s"] = "output_tokens"
    bypasses: int = 0  # the published baseline stops at the first that does not fit


class Sjf(KeyedPolicy):
    """Shortest expected job first."""

    def __init__(self, config: SjfConfig | None = None) -> None:
        self._config = config or SjfConfig()
        super().__init__("sjf", bypasses=self._config.bypasses)

    def key(self, request: Request) -> Key:
        """Priority, then what is left to do, then arrival."""
        if self._config.by == "output_tokens":
            size: float = request.remaining_output_tokens
        else:
            size = self._costs.service_s(request)
        return (-request.priority, size, request.arrived_s)


@dataclass(frozen=True, slots=True)
class AgedSjfConfig:
    """How much service counts against arrival, and who may pass a head that fits no worker."""

    services: float = 8.0  # k: a wait of so many times its service makes any request first
    bypasses: int = 8

    def __post_init__(self) -> None:
        require_positive(services=self.services)


class AgedSjf(KeyedPolicy):
    """Shortest first, relative to arrival."""

    def __init__(self, config: AgedSjfConfig | None = None) -> None:
        self._config = config or AgedSjfConfig()
        super().__init__("aged_sjf", bypasses=self._config.bypasses)

    def key(self, request: Request) -> Key:
        """Priority, then the time at which it will have waited k times its service."""
        service_s = self._costs.service_s(request)
        return (-request.priority, request.arrived_s + self._config.services * service_s)
