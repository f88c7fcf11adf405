"""Chameleon's scheduler (MICRO 2025, arXiv 2411.17741, §4.3), as the paper has it.

1. Requests have a weighted size (`services.core.sizes`). Every `refresh_s`, K-means over recent
   sizes gives the number of queues and their cut-offs (`services.core.clustering`), and M/M/1
   quotas divide the workers' KV tokens among them (`services.core.quotas`).
2. Algorithm 1 forms batches: (phase 1) each queue, small to large, sends from its front what its
   quota allows; (phase 2) what the quotas of EMPTY queues have left is lent, to the smallest queue
   first. A queue whose front does not fit gets no more, and keeps what is left of its own quota.
3. Opportunistic bypass: the front R1 is within quota but fits no worker. A younger R2 of its queue
   that fits may pass if it is expected to end before R1's memory is free. If memory comes earlier
   and R2's would complete what R1 needs, R2 is squashed: stopped, and queued again behind R1.

Algorithm 1 runs once per iteration. Here each `take` is one step of it and starts over from phase
1, which comes to the same: until the next event memory and quotas only shrink, so who was refused
stays refused. Two steps come an iteration earlier than in the paper: a queue that borrowed goes
back to its own quota as soon as its front fits that, and a queue that phase 2 ran empty lends.

What the paper leaves open, besides what those modules name, and what is chosen here:
- before the first refresh: one queue with all tokens, until `first_refresh_requests` have come.
- queued requests when cut-offs move: each goes to the queue of its size, in order of arrival.
- who is debited for lent tokens: the lenders, who get them back.
- a request above its queue's whole quota: it goes when all of that quota is there. If nothing runs
  at all, whoever is first goes.
- the times that bypass compares: the placer's prediction of when R1's memory is free, and R2's
  load, prompt and predicted output at the usual step time.
- the quota that R2 has out counts as R1's when R1 is looked at again: else R1 would no longer be
  within quota, and passing could starve it.
- which R2 to squash: the last one that passed and suffices; each request a bounded number of times.
- starvation: the paper bounds no wait. Here a front that has waited `starvation_s` goes before all
  else, whatever its quota, and everybody waits until it fits. The limit is far above the SLO, so it
  changes nothing while SLOs are met; beyond that the order approaches first come, first served.
- priority: a level of priority counts as having come `priority_lead_s` earlier.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from services.core.costs import StepCosts
from services.core.keyed import KeyedQueue
from services.core.policies.chameleon_sizing import ChameleonConfig, Sizing, kv_tokens
from services.core.policies.ordered import Waiter
from services.core.queues import Outcome, Placer, PoolSize, Squashed, Taken
from services.core.quotas import TokenAccounts
from services.core.snapshots import QueueSnapshot, WaitCause
from services.core.types import Attempt, Request, RequestId


@dataclass(slots=True, eq=False, kw_only=True)
class _Waiter(Waiter):
    """A queued request, ordered by `key`. `passed_by` are those that passed it and still run."""

    key: float
    queue: int
    tokens: int
    passed_by: list["_Running"] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Running:
    """A dispatched request. `free_tokens` is what a worker had free when it was taken."""

    request: Request
    since_s: float
    tokens: int
    free_tokens: int
    passed: _Waiter | None
    is_squashed: bool = False


class Chameleon:
    """Queues by weighted size, with quotas, lending, bypass and squash."""

    name = "chameleon"

    def __init__(self, config: ChameleonConfig) -> None:
        self._config = config
        self._sizing = Sizing(config)
        self._queues: list[KeyedQueue[_Waiter]] = [KeyedQueue()]  # small to large
        self._waiters: dict[RequestId, _Waiter] = {}  # as they were queued
        self._running: dict[Attempt, _Running] = {}
        self._accounts = TokenAccounts((0,))
        self._pool_tokens = 0
        self._is_overloaded = False
        self._taken = 0
        self._squashed = 0
        self._settled: int | None = None  # the placer's version at which nobody could go,
        self._settled_until_s = 0.0  # and when time alone changes that

    def __len__(self) -> int:
        return len(self._waiters)

    @property
    def is_overloaded(self) -> bool:
        """True if by the last division of quotas not every queue can meet the SLO."""
        return self._is_overloaded

    # --- requests come and go ------------------------------------------------------------------

    def push(self, request: Request, *, now: float) -> None:
        """Queue a request by its size."""
        is_first = request.attempt.number == 1
        waiter = _Waiter(
            request,
            now if is_first else min(now, request.arrived_s),
            key=request.arrived_s - self._config.priority_lead_s * request.priority,
            queue=self._sizing.queue_of(request),
            tokens=kv_tokens(request),
        )
        assert waiter.request_id not in self._waiters
        self._waiters[waiter.request_id] = waiter
        self._queues[waiter.queue].push(waiter.key, waiter)
        self._sizing.arrive(request, now=now)
        self._settled = None

    def remove(self, request_id: RequestId) -> None:
        """A queued request leaves without being dispatched."""
        waiter = self._waiters.pop(request_id)
        self._settled = None
        self._queues[waiter.queue].remove(waiter)

    def release(self, attempt: Attempt, *, now: float) -> None:
        """Its queue, or those that lent, have its tokens back."""
        running = self._running.pop(attempt, None)
        if running is None:
            return
        self._accounts.release(attempt)
        self._settled = None
        if running.passed is not None:
            running.passed.passed_by.remove(running)
        if not running.is_squashed:
            self._sizing.end(running.request, time_s=now - running.since_s)

    # --- Algorithm 1 ---------------------------------------------------------------------------

    def take(self, place: Placer, *, now: float) -> Outcome:
        """One step of batch formation; none while nothing has changed since none was possible."""
        if self._settled == place.version and now < self._settled_until_s:
            return None
        if now >= self._sizing.refresh_due_s:
            self._refresh(now)
        outcome = self._form_batch(place, now=now)
        if outcome is None:
            deadline_s = self.next_deadline(now=now)
            self._settled = place.version
            self._settled_until_s = float("inf") if deadline_s is None else deadline_s
        return outcome

    def _form_batch(self, place: Placer, *, now: float) -> Outcome:
        fronts = self._fronts()
        overdue = self._overdue(fronts, now)
        if overdue is not None:
            return self._start(overdue, place, now=now) if overdue.fits(place) else None
        for front in fronts:  # phase 1
            if not self._is_within_quota(front):
                front.lacked = "quota"
                continue
            if front.fits(place):
                return self._start(front, place, now=now)
            if front.is_stopped_with_all:
                return None
            outcome = self._squash_for(front, place) or self._pass(front, place, now=now)
            if outcome is not None:
                return outcome
        return self._lend(fronts, place, now=now)

    def _lend(self, fronts: Sequence[_Waiter], place: Placer, *, now: float) -> Outcome:
        """Phase 2: to the fronts that their quotas hold, smallest queue first."""
        lenders = self._lenders()
        lendable = self._accounts.lendable(lenders)
        for front in fronts if lendable else ():
            if front.lacked != "quota" or self._need(front) > lendable:
                continue
            if front.fits(place):
                return self._start(front, place, now=now, lenders=lenders)
            if front.is_stopped_with_all:
                return None
        return None

    def _fronts(self) -> list[_Waiter]:
        return [front for queue in self._queues if (front := queue.first()) is not None]

    def _lenders(self) -> list[int]:
        return [index for index, queue in enumerate(self._queues) if not queue]

    def _need(self, waiter: _Waiter) -> int:
        return self._accounts.need(waiter.tokens, waiter.request.adapter)

    def _is_within_quota(self, front: _Waiter) -> bool:
        """What those have out that passed it is its own: letting them pass costs it no quota."""
        accounts, need = self._accounts, self._need(front)
        lacking = need - accounts.available(front.queue)
        if lacking <= 0 or lacking <= sum(passer.tokens for passer in front.passed_by):
            return True
        is_too_large = need > accounts.quotas[front.queue] and accounts.is_untouched(front.queue)
        return is_too_large or not len(accounts)

    def _overdue(self, fronts: Sequence[_Waiter], now: float) -> _Waiter | None:
        """The first of the fronts that have waited too long."""
        due_s = now - self._config.starvation_s
        overdue = (front for front in fronts if front.since_s <= due_s)
        return min(overdue, key=lambda front: front.key, default=None)

    def _start(
        self,
        waiter: _Waiter,
        place: Placer,
        *,
        now: float,
        lenders: Sequence[int] = (),
        passed: _Waiter | None = None,
    ) -> Taken:
        request = waiter.request
        running = _Running(request, now, self._need(waiter), place.free_tokens, passed)
        self.remove(waiter.request_id)
        self._accounts.charge(request, waiter.tokens, queue=waiter.queue, lenders=lenders)
        self._running[request.attempt] = running
        self._taken += 1
        if passed is not None:
            passed.passed_by.append(running)
        return Taken(request, _name(waiter.queue), waiter.waited_for(now=now))

    # --- opportunistic bypass ------------------------------------------------------------------

    def _pass(self, front: _Waiter, place: Placer, *, now: float) -> Outcome:
        """The first younger one that fits and is expected to end before the front could start."""
        if not self._config.bypass or any(passer.is_squashed for passer in front.passed_by):
            return None
        free_tokens, available = place.free_tokens, self._accounts.available(front.queue)
        younger = self._queues[front.queue].front(1 + self._config.bypass_scan)[1:]
        wait_s: float | None = None
        for waiter in younger:
            if waiter.tokens > free_tokens or self._need(waiter) > available:
                continue
            wait_s = place.free_in_s(front.request) if wait_s is None else wait_s
            is_near = place.is_near(waiter.request)
            if wait_s > self._sizing.time_s(waiter.request, is_near=is_near) and waiter.fits(place):
                return self._start(waiter, place, now=now, passed=front)
        return None

    def _squash_for(self, front: _Waiter, place: Placer) -> Squashed | None:
        """Stop the last one that passed the front, if its memory completes what the front needs.

        There must be more than before it passed, or stopping it would only undo the bypass.
        """
        if any(passer.is_squashed for passer in front.passed_by):
            return None
        if self._squashed + 1 > self._config.squash_fraction * self._taken:
            return None
        free_tokens, need = place.free_tokens, self._need(front)
        for passer in reversed(front.passed_by):
            then_free = free_tokens + passer.tokens
            if (
                then_free >= need > free_tokens
                and then_free > passer.free_tokens
                and passer.request.attempt.number <= self._config.squashes_per_request
            ):
                passer.is_squashed = True
                self._squashed += 1
                return Squashed(passer.request.attempt)
        return None

    # --- queues and quotas ---------------------------------------------------------------------

    def resize(self, pool: PoolSize) -> None:
        """Divide so many tokens. What is out stays out."""
        self._pool_tokens = pool.kv_tokens
        if pool.token_bytes > 0:
            self._accounts.token_bytes = pool.token_bytes
        self._accounts.quotas = self._divide()
        self._settled = None

    def learn(self, costs: StepCosts) -> None:
        """What work costs now."""
        self._sizing.learn(costs)
        self._settled = None

    def _refresh(self, now: float) -> None:
        """New queues: the queued and what is out move to them."""
        sizing = self._sizing
        sizing.refresh(token_bytes=self._accounts.token_bytes, now=now)
        self._queues = [KeyedQueue() for _ in range(sizing.queues)]
        for waiter in self._waiters.values():
            waiter.queue = sizing.queue_of(waiter.request)
            self._queues[waiter.queue].push(waiter.key, waiter)
        self._accounts.redivide(self._divide(), sizing.queue_of)

    def _divide(self) -> tuple[int, ...]:
        division = self._sizing.divide(self._pool_tokens)
        self._is_overloaded = division.is_overloaded
        return division.quotas

    # --- reports -------------------------------------------------------------------------------

    def next_deadline(self, *, now: float) -> float | None:
        """When a front will have waited too long, or the next refresh."""
        fronts = self._fronts()
        times_s = [front.since_s + self._config.starvation_s for front in fronts]
        times_s += [self._sizing.refresh_due_s] if fronts else []
        return min((time_s for time_s in times_s if time_s > now), default=None)

    def upcoming(self) -> Iterator[Request]:
        """Fronts of all queues, then the second ones, and so on."""
        queues = [iter(queue) for queue in self._queues]
        while queues:
            heads = [(queue, next(queue, None)) for queue in queues]
            yield from (waiter.request for _, waiter in heads if waiter is not None)
            queues = [queue for queue, waiter in heads if waiter is not None]

    def queue_of(self, request_id: RequestId) -> str:
        """Name of the queue that a request waits in; queue-0 has the smallest."""
        return _name(self._waiters[request_id].queue)

    def held_by(self, request_id: RequestId, *, now: float) -> WaitCause | None:
        """Those before it, or its queue's quota and that nobody lends enough."""
        waiter, overdue = self._waiters[request_id], self._overdue(self._fronts(), now)
        if overdue is not None:
            return None if waiter is overdue else "order"
        if waiter is not self._queues[waiter.queue].first():
            return "order"
        lendable = self._accounts.lendable(self._lenders())
        return None if self._is_within_quota(waiter) or self._need(waiter) <= lendable else "quota"

    def queues(self, *, now: float) -> tuple[QueueSnapshot, ...]:
        """All queues, smallest requests first."""
        return tuple(self._snapshot(index, now=now) for index in range(len(self._queues)))

    def _snapshot(self, index: int, *, now: float) -> QueueSnapshot:
        queue, cutoffs = self._queues[index], self._sizing.cutoffs
        front = queue.first()
        return QueueSnapshot(
            _name(index),
            len(queue),
            max(0.0, now - front.since_s) if front is not None else 0.0,
            quota_tokens=self._accounts.quotas[index],
            used_tokens=self._accounts.used(index),
            size_limit=cutoffs[index] if index < len(cutoffs) else None,
        )

    def check_integrity(self) -> None:
        """Assert that queues and accounts hold the requests, each once."""
        self._accounts.check_integrity()
        assert len(self._accounts) == len(self._running)
        cutoffs = self._sizing.cutoffs
        assert len(self._queues) == len(self._accounts.quotas) == len(cutoffs) + 1
        assert list(cutoffs) == sorted(set(cutoffs))
        for index, queue in enumerate(self._queues):
            queue.check_integrity()
            for waiter in queue:
                assert waiter.queue == index == self._sizing.queue_of(waiter.request)
                assert self._waiters[waiter.request_id] is waiter
        assert len(self._waiters) == sum(len(queue) for queue in self._queues)
        for attempt, running in self._running.items():
            assert running.request.attempt == attempt
            assert running.passed is None or running in running.passed.passed_by
        assert self._squashed <= self._config.squash_fraction * self._taken


def _name(queue: int) -> str:
    return f"queue-{queue}"
