"""The multi-level queue: small requests pass large ones, which do not starve.

First version of Chameleon's idea (§4.3, Algorithm 1). Requests fall into levels by size

    size = a · prompt + b · predicted output + cells per rank · rank        [tokens]

by fixed cut-offs. The paper multiplies by the rank and finds cut-offs by clustering; a product lets
the rank outweigh its true cost (ranks 8 and 128 differ 16x in it, 1.95x in measured time), so the
sum is chosen, which the paper has too as its simpler form.

Quotas. Each level may have a share of the workers' KV tokens out at requests that run. Beyond its
quota it may borrow what levels with an empty queue have unused (the paper's phase 2). A level whose
head waits for memory lends nothing: what it leaves unused is what it waits for. When nobody else
can go, levels that are stopped by their quotas lend to each other, smallest first, so that no
memory idles for a quota's sake (the paper leaves it idle). The paper does not say who is debited:
here nobody is; what others have out beyond their quotas is subtracted from what can be lent, so
nothing drifts. A level that has nothing out may always run one request, however large.

Within a level: priority, then arrival. When the head fits no worker now, younger ones may pass it,
a bounded number of times; then its level waits for it. The paper bounds this by predicted times
instead, and squashes those that passed when it predicted wrongly.

Ageing. The oldest request of all, once it has waited `starvation_s`, goes first, regardless of
level, priority and quota; when it has been passed too often, everything waits for it.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from services.core.config import MultilevelConfig
from services.core.queues import Place, PriorityFifo, Queued
from services.core.snapshots import QueueSnapshot
from services.core.types import Attempt, Request, RequestId


@dataclass(slots=True, eq=False)
class _Level:
    """A queue and its quota, in KV tokens."""

    name: str
    queue: PriorityFifo = field(default_factory=PriorityFifo)
    quota_tokens: float = 0.0
    used_tokens: int = 0

    @property
    def unused_tokens(self) -> float:
        """What it could lend; negative when it borrows."""
        return self.quota_tokens - self.used_tokens


class Multilevel:
    """Levels by size with quotas, lending, bounded bypass and ageing."""

    name = "multilevel"

    def __init__(self, config: MultilevelConfig) -> None:
        self._config = config
        self._levels = [_Level(f"level-{index}") for index in range(len(config.shares))]
        self._arrivals: OrderedDict[RequestId, Queued] = OrderedDict()
        self._out: dict[Attempt, tuple[_Level, int]] = {}  # dispatched, with tokens charged

    def __len__(self) -> int:
        return len(self._arrivals)

    def push(self, request: Request, *, now: float) -> None:
        """Queue a request at the level of its size."""
        queued = Queued(request, now)
        assert queued.request_id not in self._arrivals
        self._arrivals[queued.request_id] = queued
        self._level_of(request).queue.push(queued)

    def remove(self, request_id: RequestId) -> None:
        """A queued request leaves without being dispatched."""
        queued = self._arrivals.pop(request_id)
        self._level_of(queued.request).queue.remove(queued)

    def take(self, place: Place, *, now: float) -> Request | None:
        """The starving request, else the first of the smallest level that may go and fits."""
        starving = self._starving(now)
        if starving is not None:
            if place(starving.request):
                return self._dispatch(starving)
            if starving.bypassed >= self._config.bypasses:
                return None
        empty = [level for level in self._levels if not len(level.queue)]
        queued = self._first_fitting(self._levels, place, lenders=empty)
        if queued is None:
            stopped = [level for level in self._levels if self._is_stopped(level, lenders=empty)]
            queued = self._first_fitting(stopped, place, lenders=[*empty, *stopped])
        if queued is None:
            return None
        head = self._level_of(queued.request).queue.head()
        for passed in (head, starving if starving is not head else None):
            if passed is not None and passed is not queued:
                passed.bypassed += 1
        return self._dispatch(queued)

    def release(self, attempt: Attempt) -> None:
        """Its level has its tokens back."""
        level, tokens = self._out.pop(attempt, (None, 0))
        if level is not None:
            level.used_tokens -= tokens

    def resize(self, pool_tokens: int) -> None:
        """Divide so many tokens among the levels."""
        whole = sum(self._config.shares)
        for level, share in zip(self._levels, self._config.shares, strict=True):
            level.quota_tokens = pool_tokens * share / whole

    def next_deadline(self, *, now: float) -> float | None:
        """When the oldest request will have waited too long."""
        oldest = next(iter(self._arrivals.values()), None)
        if oldest is None or self._is_starving(oldest, now):
            return None
        return oldest.since_s + self._config.starvation_s

    def upcoming(self) -> Iterator[Request]:
        """Heads of all levels, then the second ones, and so on."""
        queues = [iter(level.queue) for level in self._levels]
        while queues:
            heads = [(queue, next(queue, None)) for queue in queues]
            yield from (queued.request for _, queued in heads if queued is not None)
            queues = [queue for queue, queued in heads if queued is not None]

    def queue_of(self, request_id: RequestId) -> str:
        """Name of the level that a request waits at."""
        return self._level_of(self._arrivals[request_id].request).name

    def queues(self, *, now: float) -> tuple[QueueSnapshot, ...]:
        """All levels, smallest requests first."""
        return tuple(level.queue.snapshot(level.name, now=now) for level in self._levels)

    def check_integrity(self) -> None:
        """Assert that queues and quotas add up."""
        for level in self._levels:
            level.queue.check_integrity()
            out = sum(tokens for owner, tokens in self._out.values() if owner is level)
            assert level.used_tokens == out
        queued = {entry.request_id for level in self._levels for entry in level.queue}
        assert queued == set(self._arrivals)
        assert len(self._arrivals) == sum(len(level.queue) for level in self._levels)

    def _level_of(self, request: Request) -> _Level:
        size = size_of(request, self._config)
        return self._levels[sum(size >= cutoff for cutoff in self._config.cutoffs)]

    def _starving(self, now: float) -> Queued | None:
        oldest = next(iter(self._arrivals.values()), None)
        return oldest if oldest is not None and self._is_starving(oldest, now) else None

    def _is_starving(self, queued: Queued, now: float) -> bool:
        return queued.since_s + self._config.starvation_s <= now

    def _first_fitting(
        self, levels: list[_Level], place: Place, *, lenders: list[_Level]
    ) -> Queued | None:
        for level in levels:
            head = level.queue.head()
            may_pass = max(0, self._config.bypasses - head.bypassed) if head is not None else 0
            for queued in islice(level.queue, 1 + may_pass):
                if not self._has_quota(level, queued, lenders):
                    break
                if place(queued.request):
                    return queued
        return None

    def _is_stopped(self, level: _Level, *, lenders: list[_Level]) -> bool:
        """True if its quota alone keeps the level's head from being offered."""
        head = level.queue.head()
        return head is not None and not self._has_quota(level, head, lenders)

    def _has_quota(self, level: _Level, queued: Queued, lenders: list[_Level]) -> bool:
        missing_tokens = _kv_tokens(queued.request) - level.unused_tokens
        if level.used_tokens == 0 or missing_tokens <= 0:
            return True
        others = [other for other in self._levels if other is not level]
        spare = sum(max(0.0, other.unused_tokens) for other in lenders if other is not level)
        lent = sum(max(0.0, -other.unused_tokens) for other in others)
        return missing_tokens <= spare - lent

    def _dispatch(self, queued: Queued) -> Request:
        request = queued.request
        self.remove(queued.request_id)
        level, tokens = self._level_of(request), _kv_tokens(request)
        level.used_tokens += tokens
        self._out[request.attempt] = (level, tokens)
        return request


def size_of(request: Request, config: MultilevelConfig) -> float:
    """The size that levels are cut by, in tokens; a base-model request has no adapter term."""
    rank = request.adapter.rank if request.adapter is not None else 0
    return (
        config.prompt_weight * request.context_tokens
        + config.output_weight * request.remaining_output_tokens
        + config.cells_per_rank * rank
    )


def _kv_tokens(request: Request) -> int:
    return request.context_tokens + request.remaining_output_tokens
