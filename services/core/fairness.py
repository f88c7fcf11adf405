"""Fairness between tenants, for policies whose order is a key that does not change.

A request's key grows with its arrival; `FairClock` says which arrival to use. Tenants compete while
more than one has, or lately had, requests waiting. Each has the share weight / sum of competitors'
weights of the service that all workers give per second. Per tenant runs a clock:

    start = max(now, smallest stamp that waits)
    stamp = max(start, clock - slack)
    clock = max(start, clock) + service_s / (capacity x share)

where the last term is the time that the request would take at its tenant's share alone. So a tenant
within its share keeps its arrival times, and one above it arrives later on paper, in proportion.
This is Virtual Clock (Zhang 1990) with the start of Start-time Fair Queueing (Goyal et al. 1996) in
place of its real-time one, which is also the lift of VTC (Sheng et al. 2024): whoever returns from
idle starts level with the least of those that wait, and has no credit for its absence.

- Idle capacity is free: when nothing waits, all clocks are reset; while a tenant competes with
  nobody its arrivals stand as they are; and what a clock leads by when its tenant's last request
  has gone counts up to `lead_max_s` when the tenant returns. The lead of requests that still wait
  has no such bound, on purpose: it is their own backlog. Stamps that stop growing would turn a
  flood that is older than the bound into first come, first served, in front of everybody.
- Only what waits competes; what runs is in nobody's way any more.
- Capacity is in seconds of service per second. Service is what workers' measured costs say that a
  request takes of a worker, so it is the number of workers, times `headroom` for what costs miss.
  It is not measured again here: a belief that moves would stamp requests of one backlog by
  different measures, and the ratio of shares would be lost. Too low a belief only pushes those
  further who wait behind others anyway; too high a one lets a flood catch up with the present.

Bounds, for service s_max at most per request and competitors that stay the same. Two tenants a, b,
both with requests waiting all the time and served in order of stamps, get (as in SFQ, theorem 1;
slack counts once, at the beginning), whatever capacity is believed,

    |W_a / w_a - W_b / w_b| <= s_max / w_a + s_max / w_b + slack_s x capacity / sum of weights

If the key adds k x service_s to the stamp, the right side grows by k x s_max x capacity / sum of
weights. A noisy tenant puts before a request of a tenant within its share: the work of `slack_s` at
the noisy one's share, once per busy period, and one request; all its others have later stamps, as
long as it is served no slower than its share of the believed capacity (Virtual Clock's argument).
What runs already is not stopped. Not covered: the first request after an absence longer than
`memory_s` may find what one tenant queued while it was alone, in order of arrival; that is for
quotas (`services.core.tenants`) to bound.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from services.core.types import TenantId

_STALE_MAX: Final = 64  # removed heap entries not worth a rebuild


@dataclass(frozen=True, slots=True)
class FairConfig:
    """Options of the clock."""

    slack_s: float = 2.0  # a clock may be ahead by so much before arrivals are pushed
    headroom: float = 0.5  # of what the workers can do is promised as shares
    lead_max_s: float = 30.0  # that a tenant is held to when it returns from idle
    memory_s: float = 60.0  # a tenant competes so long after its last request
    tenants_max: int = 10_000  # that are remembered while idle

    def __post_init__(self) -> None:
        assert self.slack_s >= 0
        assert 0 < self.headroom <= 1
        assert self.lead_max_s >= 0
        assert self.memory_s >= 0
        assert self.tenants_max >= 1


@dataclass(slots=True, eq=False)
class Stamp:
    """A waiting request's fair arrival."""

    at_s: float  # never before it arrived
    tenant: "_Clock"
    charge_s: float = 0.0  # what its tenant's clock was advanced by
    is_pushed: bool = False
    is_waiting: bool = True


@dataclass(slots=True, eq=False)
class _Clock:
    """A tenant that has requests waiting, or lately had."""

    tenant_id: TenantId
    weight: float
    clock_s: float = -math.inf
    last_s: float = -math.inf  # its last stamp
    waiting: int = 0
    busy_period: int = 0  # the one that `clock_s` belongs to
    idle_since_s: float = 0.0


class FairClock:
    """Stamps arrivals. A request costs O(log n) if it is pushed, O(1) otherwise."""

    def __init__(
        self, weight: Callable[[TenantId], float], config: FairConfig | None = None
    ) -> None:
        self._weight = weight
        self._config = config or FairConfig()
        self._capacity = self._config.headroom  # seconds of service per second
        self._clocks: dict[TenantId, _Clock] = {}
        self._idle: OrderedDict[TenantId, None] = OrderedDict()  # longest idle first
        self._weights = 0.0  # of all clocks
        self._waiting = 0
        self._unpushed = 0  # waiting with a stamp that was not in the future
        self._pushed: list[tuple[float, int, Stamp]] = []  # heap, with those that have left
        self._sequence = 0
        self._busy_period = 0

    def resize(self, workers: int) -> None:
        """So many workers take requests."""
        self._capacity = self._config.headroom * max(1, workers)

    def arrive(self, tenant_id: TenantId, service_s: float, *, now: float) -> Stamp:
        """A request begins to wait; its `at_s` is the arrival to order it by."""
        assert 0 <= service_s < math.inf
        self._forget(now)
        tenant = self._find(tenant_id)
        start_s = self._start_s(now)
        self._reset(tenant, start_s)
        stamp = Stamp(start_s, tenant)
        if len(self._clocks) > 1:
            share = tenant.weight / self._weights
            stamp.charge_s = service_s / (self._capacity * share)
            stamp.at_s = max(start_s, tenant.clock_s - self._config.slack_s)
        else:
            stamp.at_s = now
            tenant.clock_s = now
        if tenant.waiting:  # its own requests keep their order
            stamp.at_s = max(stamp.at_s, tenant.last_s)
        tenant.clock_s = max(start_s, tenant.clock_s) + stamp.charge_s
        tenant.last_s = stamp.at_s
        self._add(stamp, now=now)
        return stamp

    def leave(self, stamp: Stamp, *, now: float, is_served: bool = True) -> None:
        """A request waits no more: it goes to a worker, or is not served at all."""
        assert stamp.is_waiting
        stamp.is_waiting = False
        tenant = stamp.tenant
        tenant.waiting -= 1
        self._waiting -= 1
        self._unpushed -= not stamp.is_pushed
        if not is_served:
            tenant.clock_s = max(tenant.last_s, tenant.clock_s - stamp.charge_s)
        if not tenant.waiting:
            tenant.idle_since_s = now
            self._idle[tenant.tenant_id] = None
            self._forget(now)
        if not self._waiting:
            self._busy_period += 1
            self._pushed.clear()

    def check_integrity(self) -> None:
        """Assert that counts and weights are those of the clocks."""
        waiting = sum(tenant.waiting for tenant in self._clocks.values())
        live = sum(stamp.is_waiting for _, _, stamp in self._pushed)
        assert waiting == self._waiting == self._unpushed + live
        assert len(self._pushed) <= 2 * live + _STALE_MAX
        weights = sum(tenant.weight for tenant in self._clocks.values())
        assert math.isclose(weights, self._weights, abs_tol=1e-6)
        assert len(self._idle) <= self._config.tenants_max
        idle = {i for i, tenant in self._clocks.items() if not tenant.waiting}
        assert idle == set(self._idle)

    # --- stamps -----------------------------------------------------------------------------

    def _start_s(self, now: float) -> float:
        """Now, or the smallest stamp that waits if all are later."""
        if self._unpushed:
            return now
        while self._pushed and not self._pushed[0][2].is_waiting:
            heapq.heappop(self._pushed)
        return max(now, self._pushed[0][0]) if self._pushed else now

    def _reset(self, tenant: _Clock, start_s: float) -> None:
        """Drop a lead that counts no more."""
        if tenant.busy_period != self._busy_period:
            tenant.busy_period = self._busy_period
            tenant.clock_s = start_s
        elif not tenant.waiting:
            tenant.clock_s = min(tenant.clock_s, start_s + self._config.lead_max_s)

    def _add(self, stamp: Stamp, *, now: float) -> None:
        self._waiting += 1
        stamp.tenant.waiting += 1
        stamp.is_pushed = stamp.at_s > now
        if not stamp.is_pushed:
            self._unpushed += 1
            return
        self._sequence += 1
        heapq.heappush(self._pushed, (stamp.at_s, self._sequence, stamp))
        if len(self._pushed) > 2 * (self._waiting - self._unpushed) + _STALE_MAX:
            self._pushed = [entry for entry in self._pushed if entry[2].is_waiting]
            heapq.heapify(self._pushed)

    # --- tenants ----------------------------------------------------------------------------

    def _find(self, tenant_id: TenantId) -> _Clock:
        tenant = self._clocks.get(tenant_id)
        if tenant is None:
            tenant = self._clocks[tenant_id] = _Clock(tenant_id, self._weight(tenant_id))
            self._weights += tenant.weight
        elif not tenant.waiting:
            del self._idle[tenant_id]
        return tenant

    def _forget(self, now: float) -> None:
        """Drop tenants that compete no more."""
        while self._idle:
            oldest = self._clocks[next(iter(self._idle))]
            is_recent = now < oldest.idle_since_s + self._config.memory_s
            if is_recent and len(self._idle) <= self._config.tenants_max:
                return
            del self._idle[oldest.tenant_id], self._clocks[oldest.tenant_id]
            self._weights = self._weights - oldest.weight if self._clocks else 0.0
