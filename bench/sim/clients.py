"""A request as its gateway keeps it, from its arrival to its last token."""

from dataclasses import dataclass
from typing import Literal

from bench.workload.trace import Arrival
from services.core.types import Attempt, GatewayId, Request, RequestId, TenantId
from services.gateway.predictor import Prediction

GATEWAY: GatewayId = GatewayId("gateway-0")

# "failed": its adapter did not come. "unfinished": it was still here when time was over.
Outcome = Literal["done", "rejected", "failed", "deadline", "cancelled", "unfinished"]


@dataclass(slots=True, eq=False)
class Client:
    """What the gateway knows of one request, and the times that it saw."""

    index: int
    arrival: Arrival
    prediction: Prediction
    output_tokens: int
    number: int = 1  # of the attempt that counts
    emitted: int = 0  # tokens its client has
    first_s: float | None = None
    last_s: float = 0.0
    gap_max_s: float = 0.0  # longest time between two tokens
    end_s: float | None = None
    outcome: Outcome | None = None
    reason: str = ""  # of a rejection or a failure
    dispatched_s: float | None = None  # first time
    started_s: float | None = None  # first step
    queue: str = ""  # these two of the last dispatch
    waited_for: str = ""
    preemptions: int = 0

    @property
    def attempt(self) -> Attempt:
        """The submission that counts now."""
        return Attempt(RequestId(f"r{self.index}"), self.number)

    def request(self) -> Request:
        """What this attempt submits."""
        arrival = self.arrival
        deadline_s = arrival.deadline_s
        return Request(
            attempt=self.attempt,
            gateway_id=GATEWAY,
            tenant_id=TenantId(arrival.tenant),
            adapter=arrival.adapter,
            context_tokens=arrival.prompt_tokens + self.emitted,
            prior_output_tokens=self.emitted,
            max_output_tokens=arrival.max_output_tokens,
            predicted_output_tokens=self.prediction.tokens,
            output_tokens_q90=self.prediction.q90_tokens,
            priority=arrival.priority,
            arrived_s=arrival.arrival_s,
            deadline_s=None if deadline_s is None else arrival.arrival_s + deadline_s,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """A submission with what the core does not see: who asks, and how long the answer will be."""

    request: Request
    client: Client
