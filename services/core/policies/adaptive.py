"""The default order: due times that grow with a request's own size, and nobody passed for long.

Every request is due at

    due = arrival + patience x expected seconds of service - priority x boost       (patience = 4)

and whoever is due first goes first. A small request may be late by little, a large one by much, so
small ones pass large ones that came a little earlier, and a large one is passed only by those that
came within `patience` times its own service after it: slowdowns are alike and nobody starves. It is
ageing by wait / expected service with a key that never changes, which a queue can be sorted by.
Against Chameleon's queues: the size is seconds by costs that workers measured instead of
rank x length; there is one work-conserving order instead of levels with quotas that can idle.

- A deadline pulls the due time forward to the last moment at which the request can start and is
  expected to end in time. When it is no longer likely to, it goes behind all that are: past
  capacity, who is due first is who is lost already, and serving them in that order serves nobody.
  Likely is by the 90th percentile of its length and by how much longer than alone requests have
  lately run. Who cannot even bring out its surest output is refused at once rather than run in
  vain; where lengths are uncertain that is the prompt and one token.
- Service is that of the prompt: predictions of the output order nobody unless `decode_share` says
  so. They gained a few per cent where they were right and lost more where they were wrong.
- Tenants: the arrival is a fair one (`services.core.fairness`): who takes more than a weighted
  share while others wait arrives later on paper.
- A first request that lacks memory may be passed by those behind it that fit, for `drain_s` after
  it first lacked it; then the workers drain until it fits. Passing keeps memory busy, the drain
  keeps small requests and popular adapters from starving large or rare ones.
- Names of queues are for people: sizes are split into thirds by the service that was expected of
  recent requests, learned as they come.
"""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from services.core.bounds import require_not_negative
from services.core.costs import StepCosts
from services.core.decisions import RejectReason
from services.core.fairness import FairClock, Stamp
from services.core.keyed import KeyedQueue
from services.core.ledger import Fit
from services.core.queues import Outcome, Placer, PoolSize, Refused, Taken, wait_cause
from services.core.snapshots import QueueSnapshot, WaitCause
from services.core.tenants import Tenants
from services.core.timers import Timers
from services.core.types import Attempt, Request, RequestId, Reserve

_SIZES: Final = ("small", "medium", "large")
_SIZES_KEPT: Final = 512  # recent requests that the thirds are learned from,
_SIZES_AGED: Final = 32  # found again after so many
_STRETCH_WEIGHT: Final = 0.05  # of the last request in the mean
_STRETCH_MAX: Final = 20.0
_END_S: Final = 1e9  # later than anybody is due


@dataclass(frozen=True, slots=True)
class AdaptiveConfig:
    """Shape of the order."""

    patience: float = 4.0  # how many times its own service a request may be late
    decode_share: float = 0.0  # of the seconds that its output takes, counted as its service
    priority_s: float = 10.0  # how much earlier one step of priority makes a request due
    drain_s: float = 0.3  # how long a request that lacks memory may be passed
    passers: int = 4  # requests behind it that are asked
    refuses_late: bool = True  # refuse who cannot end before its deadline any more

    def __post_init__(self) -> None:
        require_not_negative(
            patience=self.patience,
            decode_share=self.decode_share,
            priority_s=self.priority_s,
            drain_s=self.drain_s,
        )
        assert 0 <= self.passers <= 48


@dataclass(slots=True, eq=False)
class _Entry:
    request: Request
    since_s: float
    size: str
    least_tokens: int  # of KV cache; more than that if more than the prediction is reserved
    adapter_tokens: float  # of memory that its adapter takes where it is not in use
    stamp: Stamp | None  # of the tenants' clock; only first attempts have one
    cause: WaitCause = "nothing"
    lacking_since_s: float | None = None
    alone_s: float = 0.0  # from start to end, if it were alone
    likely_until_s: float = math.inf  # started by then it is likely to end before its deadline


class Adaptive:
    """One queue by due time."""

    name = "adaptive"

    def __init__(
        self, config: AdaptiveConfig | None = None, *, tenants: Tenants | None = None
    ) -> None:
        self._config = config or AdaptiveConfig()
        self._clock = FairClock((tenants or Tenants()).weight)
        self._now = float("-inf")
        self._token_bytes = math.inf  # of KV cache; adapters weigh nothing while it is not known
        self._costs = StepCosts()
        self._entries: dict[RequestId, _Entry] = {}
        self._by_size: dict[str, dict[RequestId, _Entry]] = {size: {} for size in _SIZES}
        self._queue: KeyedQueue[_Entry] = KeyedQueue()
        self._last_starts: Timers[RequestId] = Timers()
        self._sizes = _Thirds()
        self._running: dict[Attempt, tuple[float, float]] = {}  # started, and `alone_s`
        self._stretch = 1.0  # how many times as long as alone requests run
        self._settled: int | None = None  # the placer's version at which nobody could go

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, request: Request, *, now: float) -> None:
        """Queue a request by its due time."""
        self._now = now
        request_id = request.attempt.request_id
        adapter, adapter_tokens, rank = request.adapter, 0.0, 0
        if adapter is not None:
            adapter_tokens, rank = adapter.size_bytes / self._token_bytes, adapter.rank
        prompt_s = self._costs.prompt_s(request.context_tokens, rank)
        service_s = prompt_s
        if self._config.decode_share:
            service_s += self._config.decode_share * self._costs.decode_s(request)
        arrived_s, stamp = request.arrived_s, None
        if request.attempt.number == 1:
            stamp = self._clock.arrive(request.tenant_id, service_s, now=now)
            arrived_s += stamp.at_s - now
        due_s = arrived_s + self._config.patience * service_s
        output_tokens = request.remaining_output_tokens
        least_tokens, size = request.context_tokens + output_tokens, self._sizes.place(service_s)
        entry = _Entry(request, now, size, least_tokens, adapter_tokens, stamp)
        entry.alone_s = prompt_s + self._costs.step_s * (output_tokens - 1)
        if request.deadline_s is not None:
            due_s = min(due_s, self._watch_deadline(entry, request.deadline_s))
        self._entries[request_id] = self._by_size[entry.size][request_id] = entry
        if self._queue.push(due_s - self._config.priority_s * request.priority, entry):
            self._settled = None

    def remove(self, request_id: RequestId) -> None:
        """A queued request leaves without being dispatched."""
        self._drop(self._entries[request_id], is_served=False)

    def take(self, place: Placer, *, now: float) -> Outcome:
        """Who is too late, else who is due first, else who may pass it."""
        self._now = now
        late_id = self._last_starts.pop_first_due(now)
        if late_id is not None:
            self._drop(self._entries[late_id], is_served=False)
            return Refused(late_id, RejectReason.DEADLINE_UNREACHABLE)
        first = self._first_likely(now)
        if first is None or self._settled == place.version:
            return None
        taken = self._take_first(first, place, now=now)
        self._settled = place.version if taken is None else None
        return taken

    def _take_first(self, first: _Entry, place: Placer, *, now: float) -> Taken | None:
        """The first; while it lacks memory, one that may pass it."""
        fit = place(first.request)
        if fit is Fit.FITS:
            return self._go(first, now=now)
        first.cause = wait_cause(fit)
        if fit is Fit.BATCH_SLOTS or fit is Fit.PREFILL:
            return None
        if first.lacking_since_s is None:
            first.lacking_since_s = now
        return None if self._is_drained_for(first, now) else self._pass(place, now=now)

    def _pass(self, place: Placer, *, now: float) -> Taken | None:
        free_tokens = place.free_tokens
        for entry in self._queue.front(1 + self._config.passers)[1:]:
            if not self._lacks(entry, place, free_tokens):
                fit = place(entry.request)
                if fit is Fit.FITS:
                    return self._go(entry, now=now)
                entry.cause = wait_cause(fit)
                if fit is Fit.BATCH_SLOTS or fit is Fit.PREFILL:
                    return None
            if self._is_drained_for(entry, now):
                return None
        return None

    def release(self, attempt: Attempt, *, now: float) -> None:
        """Learn how much longer than alone requests run."""
        started_s, alone_s = self._running.pop(attempt, (now, 0.0))
        if alone_s > 0.0:
            stretch = min(_STRETCH_MAX, max(1.0, (now - started_s) / alone_s))
            self._stretch += _STRETCH_WEIGHT * (stretch - self._stretch)

    def resize(self, pool: PoolSize) -> None:
        """So many workers serve the tenants."""
        self._clock.resize(pool.workers)
        self._token_bytes = pool.token_bytes

    def learn(self, costs: StepCosts) -> None:
        """Sizes of requests to come are taken by these."""
        self._costs = costs

    def next_deadline(self, *, now: float) -> float | None:  # noqa: ARG002 - timers know
        """When a queued request can no longer end in time."""
        return self._last_starts.next_s()

    def upcoming(self) -> Iterator[Request]:
        """Queued requests, the first ones in order."""
        return (entry.request for entry in self._queue)

    def queue_of(self, request_id: RequestId) -> str:
        """Its size among recent ones."""
        return self._entries[request_id].size

    def held_by(self, request_id: RequestId, *, now: float) -> WaitCause | None:  # noqa: ARG002
        """Others that are due earlier, unless it is the first."""
        return None if self._queue.first() is self._entries[request_id] else "order"

    def queues(self, *, now: float) -> tuple[QueueSnapshot, ...]:
        """The thirds."""
        return tuple(
            self._snapshot(size, limit, now=now)
            for size, limit in zip(_SIZES, (*self._sizes.cutoffs, None), strict=True)
        )

    def check_integrity(self) -> None:
        """Assert that the indexes agree."""
        self._queue.check_integrity()
        self._last_starts.check_integrity()
        self._clock.check_integrity()
        assert len(self._queue) == len(self._entries)
        assert all(entry in self._queue for entry in self._entries.values())
        assert len(self._last_starts) <= len(self._entries)
        assert sum(len(entries) for entries in self._by_size.values()) == len(self._entries)

    def _alone_s(self, request: Request, output_tokens: int) -> float:
        """Seconds from start to end alone: its prompt, then a step of its own per token."""
        rank = request.adapter.rank if request.adapter is not None else 0
        prompt_s = self._costs.prompt_s(request.context_tokens, rank)
        return prompt_s + self._costs.step_s * (output_tokens - 1)

    def _watch_deadline(self, entry: _Entry, deadline_s: float) -> float:
        """When the request must start, as is expected; it is not likely to be in time later on."""
        request = entry.request
        if self._config.refuses_late:
            surely_s = self._alone_s(request, request.sure_output_tokens)
            self._last_starts.set(request.attempt.request_id, at_s=deadline_s - surely_s)
        likely_tokens = request.reserved_output_tokens(Reserve.QUANTILE)
        entry.likely_until_s = deadline_s - self._stretch * self._alone_s(request, likely_tokens)
        return deadline_s - self._stretch * entry.alone_s

    def _first_likely(self, now: float) -> _Entry | None:
        """Who is first, after those that are not likely to end in time have gone to the end."""
        first = self._queue.first()
        while first is not None and first.likely_until_s < now:
            first.likely_until_s = math.inf
            self._queue.remove(first)
            self._queue.push(_END_S + now, first)
            self._settled = None
            first = self._queue.first()
        return first

    def _lacks(self, entry: _Entry, place: Placer, free_tokens: int) -> bool:
        """True if it is likely to need more than any worker has free.

        A guess that spares most questions (workers may differ): it may cost a passer its turn, so
        it is not for the first, who must never wait for a guess.
        """
        spare_tokens = free_tokens - entry.least_tokens
        if spare_tokens < 0:
            entry.cause = "memory"
            return True
        if entry.adapter_tokens > spare_tokens and not place.is_near(entry.request):
            entry.cause = "adapter"
            return True
        return False

    def _is_drained_for(self, entry: _Entry, now: float) -> bool:
        """True if it may be passed no more: it has been first, and lacks memory for long."""
        since_s = entry.lacking_since_s
        return since_s is not None and now >= since_s + self._config.drain_s

    def _go(self, entry: _Entry, *, now: float) -> Taken:
        self._drop(entry, is_served=True)
        self._running[entry.request.attempt] = now, entry.alone_s
        is_unasked = entry.cause == "nothing" and now > entry.since_s
        return Taken(entry.request, entry.size, "order" if is_unasked else entry.cause)

    def _drop(self, entry: _Entry, *, is_served: bool) -> None:
        request = entry.request
        request_id = request.attempt.request_id
        self._settled = None
        self._queue.remove(entry)
        del self._entries[request_id]
        del self._by_size[entry.size][request_id]
        if request.deadline_s is not None:
            self._last_starts.cancel(request_id)
        if entry.stamp is not None:
            self._clock.leave(entry.stamp, now=self._now, is_served=is_served)

    def _snapshot(self, size: str, limit: float | None, *, now: float) -> QueueSnapshot:
        entries = self._by_size[size]
        oldest = next(iter(entries.values()), None)
        oldest_s = max(0.0, now - oldest.since_s) if oldest is not None else 0.0
        return QueueSnapshot(size, len(entries), oldest_s, size_limit=limit)


class _Thirds:
    """Splits recent sizes into thirds. They are found again now and then, not for every request."""

    def __init__(self) -> None:
        self.cutoffs: tuple[float, float] | tuple[None, None] = (None, None)
        self._recent: deque[float] = deque(maxlen=_SIZES_KEPT)
        self._due = 1  # requests until then

    def place(self, size: float) -> str:
        """Which third a size belongs to; it counts from now on."""
        self._recent.append(size)
        self._due -= 1
        cutoffs = self.cutoffs
        if cutoffs[0] is None or not self._due:
            ordered = sorted(self._recent)
            count = len(ordered)
            self.cutoffs = cutoffs = (ordered[count // 3], ordered[2 * count // 3])
            self._due = max(1, min(count // 8, _SIZES_AGED))
        return _SIZES[bisect_right(cutoffs, size)]
