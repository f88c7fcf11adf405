"""Tenants: what each may have. `services.core.tenant_gate` holds them to it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from services.core.types import TenantId

_BURST_S: Final = 10.0  # of its rate, if a tenant's burst is not set
_WEIGHT_MIN, _WEIGHT_MAX = 1e-3, 1e3
_RATE_MIN, _RATE_MAX = 1e-3, 1e9
_COUNT_MAX: Final = 10_000_000
_PRIORITY_MAX: Final = 1000  # above a request's own, 100, so that classes can be kept apart


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may have. Raises ValueError that names the field."""

    weight: float = 1.0  # of its share while tenants compete, see `services.core.fairness`
    tokens_per_s: float | None = None  # prompt and output; None: no limit
    burst_tokens: float | None = None  # taken at once after a rest; None: ten seconds of its rate
    max_running: int | None = None  # requests queued at a policy or at workers; None: no limit
    max_queued: int = 1000  # requests that wait for the limits above
    priority: int = 0  # its class: added to each of its requests' own

    def __post_init__(self) -> None:
        _check("weight", self.weight, _WEIGHT_MIN, _WEIGHT_MAX)
        if self.tokens_per_s is not None:
            _check("tokens_per_s", self.tokens_per_s, _RATE_MIN, _RATE_MAX)
        if self.burst_tokens is not None:
            _check("burst_tokens", self.burst_tokens, 1, _RATE_MAX)
            if self.tokens_per_s is None:
                raise ValueError("burst_tokens: needs tokens_per_s")
        if self.max_running is not None:
            _check("max_running", self.max_running, 1, _COUNT_MAX)
        _check("max_queued", self.max_queued, 0, _COUNT_MAX)
        _check("priority", self.priority, -_PRIORITY_MAX, _PRIORITY_MAX)

    @property
    def burst(self) -> float:
        """Tokens that its full bucket holds; inf without a rate."""
        if self.tokens_per_s is None:
            return math.inf
        if self.burst_tokens is None:
            return max(1.0, _BURST_S * self.tokens_per_s)
        return self.burst_tokens

    @property
    def needs_gate(self) -> bool:
        """True unless its requests simply pass."""
        return not (self.tokens_per_s is None and self.max_running is None and self.priority == 0)


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # false for NaN too
        raise ValueError(f"{name}: must be {least:g} to {most:g}, not {value:g}")


@dataclass(frozen=True, slots=True)
class Tenants:
    """The limits of everybody."""

    default: TenantLimits = field(default_factory=TenantLimits)  # of each tenant not named
    named: Mapping[TenantId, TenantLimits] = field(default_factory=dict[TenantId, TenantLimits])

    def limits(self, tenant_id: TenantId) -> TenantLimits:
        """What this tenant may have."""
        return self.named.get(tenant_id, self.default)

    def weight(self, tenant_id: TenantId) -> float:
        """This tenant's weight."""
        return self.limits(tenant_id).weight

    @property
    def needs_gate(self) -> bool:
        """True unless all requests simply pass."""
        return any(limits.needs_gate for limits in (self.default, *self.named.values()))
