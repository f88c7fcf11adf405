"""`vtc`: fair queueing over tenants by virtual token counters (2401.00588, Algorithm 2).

Each tenant has a counter of the service it got, `input_weight` per prompt token and
`output_weight` per output token (1 and 2 in the paper), divided by the tenant's weight. The tenant
with the smallest counter goes next; within a tenant it is order of arrival. A tenant that had
nothing queued is lifted to the smallest counter of those that have, or to that of the last one to
go if nobody has: idle time is not credit. Only tenants with queued requests are compared, so no
capacity is left unused.

The paper charges output tokens as they come. The scheduler never sees a token, so the *predicted*
output is charged at dispatch and not corrected: a tenant whose answers run longer than predicted is
served more than its share by that error. In charged tokens the paper's bound holds: between two
tenants that both have requests queued, counters differ by at most the largest single charge.

Priorities come before counters, as everywhere: a tenant stands where its most urgent request does.

Fits: tenants that share a cluster and must not hurt each other. Fails: it looks at no size and no
deadline, so within a tenant a long request still blocks the short ones; it gains no throughput.

Costs O(log tenants). The counters of the `idle_tenants` that went idle last are kept; one that is
forgotten is lifted when it returns as a new tenant is.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from services.core.bounds import require_not_negative, require_positive
from services.core.keyed import KeyedQueue
from services.core.policies.ordered import OrderedPolicy, Waiter
from services.core.types import Request, TenantId


@dataclass(frozen=True, slots=True)
class VtcConfig:
    """What tokens count, and what tenants do."""

    input_weight: float = 1.0
    output_weight: float = 2.0
    weights: Mapping[TenantId, float] = field(default_factory=dict[TenantId, float])
    default_weight: float = 1.0
    bypasses: int = 0  # the paper stops at the first that does not fit
    idle_tenants: int = 10_000

    def __post_init__(self) -> None:
        require_not_negative(input_weight=self.input_weight, output_weight=self.output_weight)
        require_positive(
            input_plus_output_weight=self.input_weight + self.output_weight,
            default_weight=self.default_weight,
            idle_tenants=self.idle_tenants,
            **{f"weight of {tenant}": weight for tenant, weight in self.weights.items()},
        )


@dataclass(slots=True, eq=False)
class _Tenant:
    """A tenant's service so far and its queued requests."""

    tenant_id: TenantId
    counter: float = 0.0
    queue: KeyedQueue[Waiter] = field(default_factory=KeyedQueue[Waiter])
    key: tuple[int, float] | None = None  # where it stands; None: it has nothing queued


class Vtc(OrderedPolicy):
    """The tenant that got least goes next."""

    def __init__(self, config: VtcConfig | None = None) -> None:
        self._config = config or VtcConfig()
        super().__init__("vtc", bypasses=self._config.bypasses)
        self._order: KeyedQueue[_Tenant] = KeyedQueue()  # those with queued requests
        self._least: KeyedQueue[_Tenant] = KeyedQueue()  # the same, by counter alone
        self._active: dict[TenantId, _Tenant] = {}
        self._idle: OrderedDict[TenantId, _Tenant] = OrderedDict()
        self._last_counter = 0.0  # of the tenant that went last

    def counter(self, tenant_id: TenantId) -> float:
        """Weighted tokens that a tenant was charged, lifts included; 0 if it is not known."""
        tenant = self._active.get(tenant_id) or self._idle.get(tenant_id)
        return tenant.counter if tenant is not None else 0.0

    def charge_of(self, request: Request) -> float:
        """What a dispatch adds to its tenant's counter."""
        config = self._config
        weight = config.weights.get(request.tenant_id, config.default_weight)
        tokens = config.input_weight * request.context_tokens
        tokens += config.output_weight * request.remaining_output_tokens
        return tokens / weight

    def check_integrity(self) -> None:
        """Assert as an order does, and that both orders hold the active tenants."""
        super().check_integrity()
        self._order.check_integrity()
        self._least.check_integrity()
        assert set(self._order) == set(self._least) == set(self._active.values())
        assert not self._active.keys() & self._idle.keys()
        assert all(len(tenant.queue) for tenant in self._active.values())
        assert not any(len(tenant.queue) for tenant in self._idle.values())
        assert len(self._idle) <= self._config.idle_tenants

    def _enter(self, waiter: Waiter) -> bool:
        request = waiter.request
        tenant = self._active.get(request.tenant_id) or self._activate(request.tenant_id)
        tenant.queue.push((-request.priority, request.arrived_s), waiter)
        self._settle(tenant)
        return tenant.queue.first() is waiter

    def _leave(self, waiter: Waiter) -> None:
        tenant = self._active[waiter.request.tenant_id]
        tenant.queue.remove(waiter)
        self._settle(tenant)
        if tenant.key is None:
            del self._active[tenant.tenant_id]
            self._idle[tenant.tenant_id] = tenant
            if len(self._idle) > self._config.idle_tenants:
                self._idle.popitem(last=False)

    def _front(self, count: int) -> list[Waiter]:
        heads = (tenant.queue.first() for tenant in self._order.front(count))
        return [head for head in heads if head is not None]

    def _in_order(self) -> Iterator[Waiter]:
        return chain.from_iterable(tenant.queue for tenant in self._order)

    def _charge(self, waiter: Waiter) -> None:
        tenant = self._active[waiter.request.tenant_id]
        tenant.counter += self.charge_of(waiter.request)
        self._last_counter = tenant.counter

    def _activate(self, tenant_id: TenantId) -> _Tenant:
        tenant = self._idle.pop(tenant_id, None) or _Tenant(tenant_id)
        least = self._least.first()
        floor = least.counter if least is not None else self._last_counter
        tenant.counter = max(tenant.counter, floor)
        self._active[tenant_id] = tenant
        return tenant

    def _settle(self, tenant: _Tenant) -> None:
        """Put it where its counter and its first request belong."""
        head = tenant.queue.first()
        key = None if head is None else (-head.request.priority, tenant.counter)
        if key == tenant.key:
            return
        if tenant.key is not None:
            self._order.remove(tenant)
            self._least.remove(tenant)
        if key is not None:
            self._order.push(key, tenant)
            self._least.push(tenant.counter, tenant)
        tenant.key = key
