"""Tenants' quotas: who may pass to the queues, who waits for a quota of its own, who is refused.

A request that its tenant's quotas do not allow waits here, before every queue, so that no policy
ever sees it and nobody else's request stands behind it.

- Rate: a token bucket. It fills at `tokens_per_s` up to `burst_tokens`; a request may pass while
  it is not in debt, and takes prompt + expected output out of it. When the request ends, the
  difference to what it really took is put back or taken too: the rate is one of true tokens,
  whatever was predicted. A bucket goes into debt by one request that passes, and by what requests
  under way turn out to take beyond the expectation; nobody passes before that is paid.
- Expected output: the prediction times the tenant's recent ratio of true to predicted tokens, so
  that constantly wrong predictions do not make a tenant stop and go.
- Concurrency: requests that have passed and not left yet, in a policy's queue or at a worker.
- Later attempts pass at once and pay only for output still to come: their first attempt has passed,
  and their clients are in the middle of an answer. While they are more than the tenant may run,
  no other of its requests passes. Output that a lost worker made is not charged.
- Order within a tenant: higher priority first, then arrival. Who has waited here arrives, for the
  policies, when it passes: a wait for one's own quota earns no precedence over others.
- Memory: tenants with nothing here are remembered, for their buckets' sake, up to a number. The one
  idle for longest is forgotten first; its bucket has had the most time to fill.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from services.core.queues import Queued
from services.core.snapshots import TenantSnapshot
from services.core.tenant_account import Account, Ticket
from services.core.tenants import Tenants
from services.core.timers import Timers
from services.core.types import Attempt, Request, RequestId, TenantId

_IDLE_MAX: Final = 10_000  # tenants remembered that have nothing here


@dataclass(frozen=True, slots=True)
class Held:
    """The request waits for its tenant's quota; `due` will return it, if it is not removed."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Its tenant has as many requests waiting as it may."""

    retry_after_s: float | None  # when one of them can pass; None: when a running one ends


_HELD: Final = Held()


class TenantGate:
    """Stands before the queues. A call costs O(log tenants); it keeps nothing if nobody is limited.

    The machine offers each request, pushes what passes to its policy, and after every event what is
    due. Whatever has passed leaves once: at a worker's word, with its worker, or out of the queue.
    """

    def __init__(self, tenants: Tenants, *, idle_max: int = _IDLE_MAX) -> None:
        self._tenants = tenants
        self._is_open = not tenants.needs_gate
        self._idle_max = idle_max
        self._accounts: dict[TenantId, Account] = {}
        self._idle: OrderedDict[TenantId, None] = OrderedDict()  # nothing here, not named
        self._held: dict[RequestId, tuple[Account, Queued]] = {}
        self._passed: dict[Attempt, Ticket] = {}
        self._changed: dict[TenantId, None] = {}  # somebody held there may be able to pass
        self._wakes: Timers[TenantId] = Timers()  # when a bucket out of debt lets the next pass

    def __len__(self) -> int:
        """Requests held."""
        return len(self._held)

    def __contains__(self, request_id: RequestId) -> bool:
        """True while a request is held."""
        return request_id in self._held

    def offer(self, request: Request, *, now: float) -> Request | Held | Refusal:
        """A request is here: returns it, as policies shall see it, if it passes."""
        if self._is_open:
            return request
        account = self._account(request.tenant_id)
        if account.limits.priority:
            request = replace(request, priority=request.priority + account.limits.priority)
        if request.attempt.number > 1 or (not account.held and account.can_pass(now)):
            return self._pass(account, request, now=now)
        if len(account.held) >= account.limits.max_queued:
            self._rest(account)
            return Refusal(account.next_pass_in_s(now))
        self._hold(account, request, now=now)
        return _HELD

    def leave(self, attempt: Attempt, output_tokens: int | None, *, now: float) -> None:
        """An attempt that has passed is gone. Unknown ones (adopted by the cluster) are ignored.

        `output_tokens` is what it and the attempts before it generated, as its worker says; 0 if
        the worker is lost; None if it did not run: then it costs nothing.
        """
        ticket = self._passed.pop(attempt, None)
        if ticket is None:
            return
        account = ticket.account
        account.settle(ticket, output_tokens, now=now)
        if account.held:
            self._changed[account.tenant_id] = None
        else:
            self._rest(account)

    def due(self, *, now: float) -> list[Request]:
        """Held requests that pass now. To be called after the events of a moment, and when due."""
        if not self._held:
            return []
        for tenant_id in self._wakes.pop_due(now):
            self._changed[tenant_id] = None
        passed: list[Request] = []
        for tenant_id in self._changed:
            account = self._accounts[tenant_id]
            while (head := account.held.head()) is not None and account.can_pass(now):
                self._unhold(account, head)
                request = replace(head.request, arrived_s=max(head.request.arrived_s, now))
                passed.append(self._pass(account, request, now=now))
            self._watch(account)
        self._changed.clear()
        return passed

    def next_deadline(self) -> float | None:
        """When `due` will have more without another event."""
        return self._wakes.next_s()

    def remove(self, request_id: RequestId) -> Request:
        """A held request leaves without having passed."""
        account, queued = self._held[request_id]
        self._unhold(account, queued)
        if not account.held:
            self._watch(account)
            self._rest(account)
        return queued.request

    def held(self) -> Iterator[Request]:
        """Held requests, oldest first."""
        return (queued.request for _, queued in self._held.values())

    def snapshots(self, *, now: float) -> Iterator[TenantSnapshot]:
        """Tenants with requests here, or with some in the last minute."""
        for account in self._accounts.values():
            shown = account.snapshot(now)
            if account.held or account.running or shown.tokens_per_s:
                yield shown

    def check_integrity(self) -> None:
        """Assert that every request is counted once and that nothing is kept in vain."""
        self._wakes.check_integrity()
        passed = dict.fromkeys(self._accounts, 0)
        for ticket in self._passed.values():
            passed[ticket.account.tenant_id] += 1
        assert sum(len(account.held) for account in self._accounts.values()) == len(self._held)
        assert len(self._idle) <= self._idle_max
        for tenant_id, account in self._accounts.items():
            account.held.check_integrity()
            assert account.running == passed[tenant_id]
            assert len(account.held) <= account.limits.max_queued
            is_idle = not account.held and not account.running
            assert (tenant_id in self._idle) == (is_idle and tenant_id not in self._tenants.named)
            assert tenant_id not in self._wakes or account.held

    # --- moves ------------------------------------------------------------------------------

    def _pass(self, account: Account, request: Request, *, now: float) -> Request:
        assert request.attempt not in self._passed
        self._passed[request.attempt] = account.admit(request, now=now)
        return request

    def _hold(self, account: Account, request: Request, *, now: float) -> None:
        request_id = request.attempt.request_id
        assert request_id not in self._held
        queued = Queued(request, now)
        account.held.push(queued)
        self._held[request_id] = (account, queued)
        if len(account.held) == 1:
            self._watch(account)

    def _unhold(self, account: Account, queued: Queued) -> None:
        account.held.remove(queued)
        del self._held[queued.request_id]

    def _watch(self, account: Account) -> None:
        """Wake when the bucket lets the next one pass; a full house is woken by who leaves."""
        if account.held and account.has_slot:
            self._wakes.set(account.tenant_id, at_s=account.paid_s)
        else:
            self._wakes.cancel(account.tenant_id)

    # --- accounts ---------------------------------------------------------------------------

    def _account(self, tenant_id: TenantId) -> Account:
        account = self._accounts.get(tenant_id)
        if account is None:
            account = Account(tenant_id, self._tenants.limits(tenant_id))
            self._accounts[tenant_id] = account
        self._idle.pop(tenant_id, None)
        return account

    def _rest(self, account: Account) -> None:
        """Forget somebody if this tenant is one more that has nothing here."""
        if account.held or account.running or account.tenant_id in self._tenants.named:
            return
        self._changed.pop(account.tenant_id, None)
        self._idle[account.tenant_id] = None
        if len(self._idle) > self._idle_max:
            oldest, _ = self._idle.popitem(last=False)
            del self._accounts[oldest]
