"""`static`: queues by size with cut-offs and quotas that never change; Chameleon's comparison (§5).

Requests queue by size at one of n queues with fixed cut-offs, and each queue may have an equal
share of the workers' KV tokens out at requests that run (prompt and predicted output; adapters are
left to the workers' ledgers). Small queues are asked first; within a queue it is priority, then
arrival, and the head blocks its queue only. Of what the paper leaves open is chosen here:

- Size is prompt plus predicted output unless another measure is given, such as the paper's
  `services.core.sizes.weighted_size`. The cut-offs are the quartiles of the Azure conversation
  trace of 2023 in tokens, so four equal streams.
- A queue with nothing out may always run one request, however large: no quota stops it for ever.
- Lending (off as an option): a queue may also use what queues that are *empty* have left. Nobody
  is debited: what others have out beyond their quotas is subtracted from what can be lent, so
  quotas do not drift.

Fits: a workload whose sizes are known and stay. Fails when they shift: nearly all requests then
fall into one queue, and the others' quotas lie idle while they hold a single request each. And a
request that needs more than its queue's quota starves while smaller ones keep the rest in use.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from services.core.bounds import require_positive
from services.core.keyed import KeyedQueue
from services.core.policies.ordered import OrderedPolicy, Waiter
from services.core.queues import Placer, PoolSize
from services.core.snapshots import QueueSnapshot, WaitCause
from services.core.types import Attempt, Request, RequestId


def kv_tokens(request: Request) -> int:
    """Tokens of KV cache that it is expected to need."""
    return request.context_tokens + request.remaining_output_tokens


@dataclass(frozen=True, slots=True)
class StaticConfig:
    """The measure of size, where it is cut, and whether quotas are lent."""

    cutoffs: tuple[float, ...] = (491.0, 1412.0, 1558.0)  # queue i takes sizes below cutoffs[i]
    size: Callable[[Request], float] = kv_tokens
    lends: bool = True

    def __post_init__(self) -> None:
        if list(self.cutoffs) != sorted(set(self.cutoffs)):
            raise ValueError(f"cutoffs must rise, not {self.cutoffs}")
        require_positive(**{f"cutoffs[{i}]": cutoff for i, cutoff in enumerate(self.cutoffs)})


@dataclass(slots=True, eq=False)
class _Level:
    """A queue and its accounts, in KV tokens."""

    name: str
    size_limit: float | None
    queue: KeyedQueue[Waiter] = field(default_factory=KeyedQueue[Waiter])
    quota_tokens: float = 0.0
    used_tokens: int = 0

    @property
    def unused_tokens(self) -> float:
        """What it could lend; negative when it borrows."""
        return self.quota_tokens - self.used_tokens


class StaticQueues(OrderedPolicy):
    """Fixed cut-offs, equal quotas."""

    def __init__(self, config: StaticConfig | None = None) -> None:
        super().__init__("static")
        self._config = config or StaticConfig()
        limits = (*self._config.cutoffs, None)
        self._levels = [_Level(f"size-{index}", limit) for index, limit in enumerate(limits)]
        self._level_of: dict[RequestId, _Level] = {}
        self._out: dict[Attempt, tuple[_Level, int]] = {}  # dispatched, with tokens charged

    def release(self, attempt: Attempt, *, now: float) -> None:  # noqa: ARG002 - time is nothing to it
        """Its queue has its tokens back."""
        self._settled = None
        level, tokens = self._out.pop(attempt, (None, 0))
        if level is not None:
            level.used_tokens -= tokens

    def resize(self, pool: PoolSize) -> None:
        """Divide the workers' tokens equally."""
        self._settled = None
        for level in self._levels:
            level.quota_tokens = pool.kv_tokens / len(self._levels)

    def queue_of(self, request_id: RequestId) -> str:
        """Name of the queue of its size."""
        return self._level_of[request_id].name

    def held_by(self, request_id: RequestId, *, now: float) -> WaitCause | None:  # noqa: ARG002
        """The order within its queue, or the queue's quota."""
        level, waiter = self._level_of[request_id], self._waiters[request_id]
        if level.queue.first() is not waiter:
            return "order"
        return None if self._has_quota(level, waiter) else "quota"

    def queues(self, *, now: float) -> tuple[QueueSnapshot, ...]:
        """All queues, smallest requests first."""
        oldest: dict[str, float] = {}
        for request_id, waiter in self._waiters.items():
            oldest.setdefault(self._level_of[request_id].name, max(0.0, now - waiter.since_s))
        return tuple(
            QueueSnapshot(
                level.name,
                len(level.queue),
                oldest.get(level.name, 0.0),
                quota_tokens=level.quota_tokens,
                used_tokens=level.used_tokens,
                size_limit=level.size_limit,
            )
            for level in self._levels
        )

    def check_integrity(self) -> None:
        """Assert as an order does, and that the accounts add up."""
        super().check_integrity()
        assert set(self._level_of) == set(self._waiters)
        for level in self._levels:
            level.queue.check_integrity()
            out = sum(tokens for owner, tokens in self._out.values() if owner is level)
            assert level.used_tokens == out

    def _enter(self, waiter: Waiter) -> bool:
        request = waiter.request
        size = self._config.size(request)
        level = self._levels[sum(size >= cutoff for cutoff in self._config.cutoffs)]
        self._level_of[waiter.request_id] = level
        return level.queue.push((-request.priority, request.arrived_s), waiter)

    def _leave(self, waiter: Waiter) -> None:
        self._level_of.pop(waiter.request_id).queue.remove(waiter)

    def _front(self, count: int) -> list[Waiter]:
        heads = (level.queue.first() for level in self._levels)
        return [head for head in heads if head is not None][:count]

    def _in_order(self) -> Iterator[Waiter]:
        return chain.from_iterable(level.queue for level in self._levels)

    def _charge(self, waiter: Waiter) -> None:
        level, tokens = self._level_of[waiter.request_id], kv_tokens(waiter.request)
        level.used_tokens += tokens
        self._out[waiter.request.attempt] = (level, tokens)

    def _first_fitting(self, place: Placer) -> Waiter | None:
        """The first of the smallest queue that has quota for it and fits."""
        for level in self._levels:
            head = level.queue.first()
            if head is None:
                continue
            if not self._has_quota(level, head):
                head.lacked = "quota"
            elif head.fits(place):
                return head
            elif head.is_stopped_with_all:
                return None
        return None

    def _has_quota(self, level: _Level, waiter: Waiter) -> bool:
        missing_tokens = kv_tokens(waiter.request) - level.unused_tokens
        if level.used_tokens == 0 or missing_tokens <= 0:
            return True
        return self._config.lends and missing_tokens <= self._lendable_tokens(level)

    def _lendable_tokens(self, borrower: _Level) -> float:
        """What empty queues have left, less what others than the borrower have borrowed."""
        others = [level for level in self._levels if level is not borrower]
        spare = sum(max(0.0, level.unused_tokens) for level in others if not len(level.queue))
        lent = sum(max(0.0, -level.unused_tokens) for level in others)
        return spare - lent
