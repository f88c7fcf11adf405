"""One tenant's requests at the gate, its bucket of tokens, and its record.

The rules are those of `services.core.tenant_gate`.
"""

import math
from dataclasses import dataclass
from typing import Final

from services.core.queues import PriorityFifo
from services.core.snapshots import TenantSnapshot
from services.core.tenants import TenantLimits
from services.core.types import Request, Reserve, TenantId

_LEARN_KEEP: Final = 0.98  # of what was learned, per request: about the last fifty count
_LEARN_PRIOR_TOKENS: Final = 256.0  # for which predictions are believed before any has ended


@dataclass(slots=True)
class Ticket:
    """What an attempt that has passed was charged."""

    account: "Account"
    prompt_tokens: int
    prior_tokens: int
    predicted_tokens: int
    charged_tokens: float


class Account:
    """A tenant's requests, bucket and record."""

    def __init__(self, tenant_id: TenantId, limits: TenantLimits) -> None:
        self.tenant_id = tenant_id
        self.limits = limits
        self.held = PriorityFifo()
        self.running = 0  # passed and not left: in a queue or at a worker
        self._rate = limits.tokens_per_s
        self._burst = limits.burst
        self._tokens = self._burst  # in the bucket, as of `_as_of_s`
        self._as_of_s = -math.inf
        self._predicted = self._generated = _LEARN_PRIOR_TOKENS
        self._minute = _Minute()

    @property
    def has_slot(self) -> bool:
        """True if one more may run."""
        return self.limits.max_running is None or self.running < self.limits.max_running

    @property
    def paid_s(self) -> float:
        """When its bucket is, or was, out of debt."""
        if self._rate is None or self._tokens >= 0:
            return self._as_of_s
        return self._as_of_s - self._tokens / self._rate

    def can_pass(self, now: float) -> bool:
        """True if its quotas let one more request pass."""
        return self.has_slot and now >= self.paid_s

    def next_pass_in_s(self, now: float) -> float | None:
        """Seconds until its bucket lets one pass; None if it would now."""
        return self.paid_s - now if now < self.paid_s else None

    def admit(self, request: Request, *, now: float) -> Ticket:
        """Charge a request that passes."""
        is_first = request.attempt.number == 1
        prompt_tokens = request.context_tokens if is_first else 0
        predicted = request.remaining_output_tokens
        longest = request.reserved_output_tokens(Reserve.MAX)
        expected = min(longest, predicted * self._generated / self._predicted)
        self.running += 1
        charged = prompt_tokens + expected
        self._fill(now)
        self._tokens -= charged
        return Ticket(self, prompt_tokens, request.prior_output_tokens, predicted, charged)

    def settle(self, ticket: Ticket, output_tokens: int | None, *, now: float) -> None:
        """Correct what a request was charged to what it took."""
        self.running -= 1
        used = 0
        if output_tokens is not None:
            generated = max(0, output_tokens - ticket.prior_tokens)
            used = ticket.prompt_tokens + generated
            self._generated = _LEARN_KEEP * self._generated + generated
            self._predicted = _LEARN_KEEP * self._predicted + ticket.predicted_tokens
            self._minute.add(used, now)
        self._fill(now)
        # In debt everything counts, or the rate would be missed; else a bucket is not overfilled.
        cap = math.inf if self._tokens < 0 else max(self._burst, self._tokens)
        self._tokens = min(cap, self._tokens + ticket.charged_tokens - used)

    def snapshot(self, now: float) -> TenantSnapshot:
        """For reports."""
        return TenantSnapshot(
            self.tenant_id,
            held=len(self.held),
            running=self.running,
            tokens_per_s=self._minute.per_s(now),
            available_tokens=self._available_tokens(now),
        )

    def _available_tokens(self, now: float) -> float:
        if self._rate is None or self._tokens >= self._burst:
            return self._tokens
        return min(self._burst, self._tokens + self._rate * (now - self._as_of_s))

    def _fill(self, now: float) -> None:
        self._tokens = self._available_tokens(now)
        self._as_of_s = now


_SLOT_S: Final = 5
_SLOTS: Final = 60 // _SLOT_S


class _Minute:
    """A sum over the last minute, in slots of five seconds."""

    def __init__(self) -> None:
        self._sums = [0] * _SLOTS
        self._slot = 0

    def add(self, tokens: int, now: float) -> None:
        """Count tokens as of now."""
        self._turn(now)
        self._sums[self._slot % _SLOTS] += tokens

    def per_s(self, now: float) -> float:
        """The mean over the last minute."""
        self._turn(now)
        return sum(self._sums) / 60

    def _turn(self, now: float) -> None:
        slot = int(now // _SLOT_S)
        for passed in range(min(slot - self._slot, _SLOTS)):
            self._sums[(slot - passed) % _SLOTS] = 0
        self._slot = max(slot, self._slot)
