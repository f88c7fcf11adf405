"""Token quotas of queues: what each may have out at requests that run, and who is charged for what.

Division (Chameleon §4.3.3). Each queue is an M/M/1 server: S tokens of its largest request, D
seconds that a request takes, λ arrivals per second. So that a request takes at most SLO seconds

    μ = Tok / (S·D),  1 / (μ - λ) ≤ SLO   =>   Tok_min = S·D·(1/SLO + λ)

What is left of the total is shared in proportion to weights. The paper leaves open:
- the "initial weights": configured, or else the Tok_min themselves;
- a Tok_min below S, which would keep the largest request from ever going: S is the least;
- ΣTok_min above the total: all are scaled down by the same factor, none below its S; `Division`
  says that the queues are overloaded. With S the largest request, not the mean, this is the usual
  case under load. If not even the S fit together, each still has its S: quotas then promise more
  than there is, and the workers' memory decides.

Accounts. A request is charged its tokens; the first user of an adapter is charged for the adapter
too, which is paid back when the last one ends (the paper does not say; S-LoRA counts distinct
adapters).
A loan is debited to the queues that lent, smallest first, and paid back to them: the debits of all
queues always add up to what is out. When quotas are divided anew the loans against the old ones
end: everything out is debited to the queue that its payer's size belongs to now.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.core.sizes import adapter_tokens
from services.core.types import Adapter, AdapterDigest, Attempt, Request


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """S, D and λ of a queue."""

    max_tokens: int = 0
    service_s: float = 0.0
    arrivals_per_s: float = 0.0

    def min_tokens(self, slo_s: float) -> float:
        """Tok_min."""
        return self.max_tokens * self.service_s * (1 / slo_s + self.arrivals_per_s)


@dataclass(frozen=True, slots=True)
class Division:
    """The quotas. `is_overloaded`: not every queue can meet the SLO."""

    quotas: tuple[int, ...]
    is_overloaded: bool


def divide(
    total_tokens: int, loads: Sequence[QueueLoad], *, slo_s: float, weights: Sequence[float] | None
) -> Division:
    """Quotas for the loads, one weight each; they add up to the total unless the S exceed it."""
    asked = [load.min_tokens(slo_s) for load in loads]
    floors = [float(load.max_tokens) for load in loads]
    least = [max(one, floor) for one, floor in zip(asked, floors, strict=True)]
    rest = total_tokens - sum(least)
    if rest >= 0:
        shares = weights or least
        shares = shares if any(shares) else [1.0] * len(loads)
        whole = sum(shares)
        quotas = [one + rest * share / whole for one, share in zip(least, shares, strict=True)]
    else:
        quotas = _scale(total_tokens, asked, floors)
    whole_tokens = [int(quota) for quota in quotas]
    whole_tokens[-1] += max(0, total_tokens - sum(whole_tokens))
    return Division(tuple(whole_tokens), is_overloaded=sum(asked) > total_tokens)


def _scale(total: float, asked: Sequence[float], floors: Sequence[float]) -> list[float]:
    """What was asked, times one factor, but each at least its floor, together the total."""
    quotas = list(floors)
    free = [index for index, one in enumerate(asked) if one > floors[index]]
    while free:
        left = total - sum(floors) + sum(floors[index] for index in free)
        factor = left / sum(asked[index] for index in free)
        held = [index for index in free if asked[index] * factor <= floors[index]]
        if not held:
            for index in free:
                quotas[index] = asked[index] * factor
            break
        free = [index for index in free if index not in held]
    return quotas


@dataclass(slots=True, eq=False)
class _Bill:
    """Tokens out. `queue` has them in use; those in `debits` gave them."""

    payer: Request
    tokens: int
    queue: int
    debits: list[tuple[int, int]]


@dataclass(slots=True, eq=False)
class _Share:
    """An adapter in use."""

    bill: _Bill
    users: int


class TokenAccounts:
    """What each queue may have out and has out. All operations cost O(number of queues)."""

    def __init__(self, quotas: Sequence[int]) -> None:
        self.quotas = tuple(quotas)
        self.token_bytes = 1.0  # of KV cache, to weigh adapters by
        self._debited = [0] * len(quotas)
        self._used = [0] * len(quotas)
        self._bills: dict[Attempt, tuple[_Bill, AdapterDigest | None]] = {}
        self._shares: dict[AdapterDigest, _Share] = {}

    def __len__(self) -> int:
        """Requests that have tokens out."""
        return len(self._bills)

    def need(self, tokens: int, adapter: Adapter | None) -> int:
        """What a request of so many tokens with this adapter would be charged now."""
        if adapter is None or adapter.digest in self._shares:
            return tokens
        return tokens + adapter_tokens(adapter, self.token_bytes)

    def available(self, queue: int) -> int:
        """What is left of a queue's quota; negative after an overdraft or a smaller quota."""
        return self.quotas[queue] - self._debited[queue]

    def lendable(self, lenders: Sequence[int]) -> int:
        """What these queues could lend together."""
        return sum(max(0, self.available(lender)) for lender in lenders)

    def is_untouched(self, queue: int) -> bool:
        """True if all of a queue's tokens are there."""
        return self._debited[queue] == 0

    def used(self, queue: int) -> int:
        """Tokens that a queue's requests have out, borrowed ones included."""
        return self._used[queue]

    def charge(
        self, request: Request, tokens: int, *, queue: int, lenders: Sequence[int] = ()
    ) -> None:
        """Debit a request to its queue, which may overdraw, or to lenders that have enough."""
        assert request.attempt not in self._bills
        adapter = request.adapter
        if adapter is None:
            digest = None
        elif (digest := adapter.digest) in self._shares:
            self._shares[digest].users += 1
        else:
            extra = adapter_tokens(adapter, self.token_bytes)
            self._shares[digest] = _Share(self._debit(request, extra, queue, lenders), 1)
        self._bills[request.attempt] = (self._debit(request, tokens, queue, lenders), digest)

    def release(self, attempt: Attempt) -> None:
        """Pay a request's tokens back, and its adapter's with the last user."""
        bill, adapter = self._bills.pop(attempt)
        self._book(bill, -1)
        if adapter is None:
            return
        share = self._shares[adapter]
        share.users -= 1
        if share.users == 0:
            del self._shares[adapter]
            self._book(share.bill, -1)

    def redivide(self, quotas: Sequence[int], queue_of: Callable[[Request], int]) -> None:
        """New quotas for new queues: all that is out is debited to the payers' new queues."""
        self.quotas = tuple(quotas)
        self._debited = [0] * len(quotas)
        self._used = [0] * len(quotas)
        for bill in self._all_bills():
            bill.queue = queue_of(bill.payer)
            bill.debits = [(bill.queue, bill.tokens)]
            self._book(bill, 1)

    def check_integrity(self) -> None:
        """Assert that nothing was lost or counted twice."""
        debited, used = [0] * len(self.quotas), [0] * len(self.quotas)
        for bill in self._all_bills():
            assert sum(tokens for _, tokens in bill.debits) == bill.tokens
            used[bill.queue] += bill.tokens
            for queue, tokens in bill.debits:
                debited[queue] += tokens
        assert debited == self._debited
        assert used == self._used
        users = [adapter for _, adapter in self._bills.values() if adapter is not None]
        assert len(users) == sum(share.users for share in self._shares.values())
        assert all(share.users == users.count(one) > 0 for one, share in self._shares.items())

    def _debit(self, payer: Request, tokens: int, queue: int, lenders: Sequence[int]) -> _Bill:
        debits, left = ([], tokens) if lenders else ([(queue, tokens)], 0)
        for lender in lenders:
            lent = min(left, max(0, self.available(lender)))
            if lent:
                debits.append((lender, lent))
                left -= lent
        assert left == 0
        bill = _Bill(payer, tokens, queue, debits)
        self._book(bill, 1)
        return bill

    def _book(self, bill: _Bill, sign: int) -> None:
        self._used[bill.queue] += sign * bill.tokens
        for queue, tokens in bill.debits:
            self._debited[queue] += sign * tokens

    def _all_bills(self) -> list[_Bill]:
        bills = [bill for bill, _ in self._bills.values()]
        return bills + [share.bill for share in self._shares.values()]
