"""`fifo`: order of arrival in one queue. S-LoRA's order (2311.03285), Orca's and vLLM's too.

Higher priority first, then requests that come back (their clients are in the middle of an answer),
then arrival. The head blocks: if it fits no worker, nobody goes, unless `bypasses` says otherwise.

Fits: requests of one kind, or a load far below capacity, where no order matters and this one is the
plainest. Fails: one large request makes all behind it wait, so under mixed lengths the short ones
pay for the long ones (Chameleon measures 28.6 % of a short request's time, 12 % of a long one's).
"""

from dataclasses import dataclass

from services.core.keyed import Key
from services.core.policies.ordered import KeyedPolicy
from services.core.types import Request


@dataclass(frozen=True, slots=True)
class FifoConfig:
    """Who may pass a head that fits no worker."""

    bypasses: int = 0


class Fifo(KeyedPolicy):
    """Order of arrival."""

    def __init__(self, config: FifoConfig | None = None) -> None:
        super().__init__("fifo", bypasses=(config or FifoConfig()).bypasses)

    def key(self, request: Request) -> Key:
        """Priority, then those that come back, then arrival."""
        return (-request.priority, request.attempt.number == 1, request.arrived_s)
