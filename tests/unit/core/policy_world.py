"""What the tests of queue policies share: placers, and one worker's memory behind a policy."""

from collections.abc import Callable
from typing import assert_never

from services.core.ledger import Fit
from services.core.queues import Placer, PoolSize, QueuePolicy, Refused, Squashed, Taken
from services.core.types import Attempt, Request
from tests.unit.core.core_world import request


def pool_size(kv_tokens: int = 1000, *, workers: int = 1) -> PoolSize:
    return PoolSize(kv_tokens, token_bytes=100.0, workers=workers, max_requests=64 * workers)


class Answers:
    """A placer that answers by a function. Each new one has a new version."""

    versions = 0

    def __init__(self, answer: Callable[[Request], Fit | bool] = lambda _: True) -> None:
        Answers.versions += 1
        self.version = Answers.versions
        self.free_tokens = 1_000_000
        self.asked: list[str] = []
        self._answer = answer

    def __call__(self, request: Request) -> Fit:
        self.asked.append(request.attempt.request_id)
        answer = self._answer(request)
        if isinstance(answer, Fit):
            return answer
        return Fit.FITS if answer else Fit.MEMORY

    def is_near(self, request: Request) -> bool:
        return True

    def free_in_s(self, request: Request) -> float:
        return float("inf")


def push(policy: QueuePolicy, *requests: Request, now: float = 0.0) -> None:
    for one in requests:
        policy.push(one, now=now)
        policy.check_integrity()


def take_all(policy: QueuePolicy, place: Placer | None = None, *, now: float = 0.0) -> list[Taken]:
    """All that can go, in order."""
    place = place or Answers()
    taken: list[Taken] = []
    while (outcome := policy.take(place, now=now)) is not None:
        assert isinstance(outcome, Taken)
        taken.append(outcome)
        policy.check_integrity()
    return taken


def drain(policy: QueuePolicy, place: Placer | None = None, *, now: float = 0.0) -> list[str]:
    """Names of all that can go, in order."""
    return [taken.request.attempt.request_id for taken in take_all(policy, place, now=now)]


class OnePool:
    """One worker with nothing but KV memory, and everything that a policy may do to it."""

    def __init__(self, policy: QueuePolicy, *, kv_tokens: int = 1000) -> None:
        self.policy = policy
        self.kv_tokens = kv_tokens
        self.running: dict[Attempt, Request] = {}
        self.waiting: dict[Attempt, Request] = {}
        self.dispatched: list[Attempt] = []
        self.refused: list[Attempt] = []
        self.now = 0.0
        self.version = 0
        policy.resize(pool_size(kv_tokens))

    @property
    def free_tokens(self) -> int:
        return self.kv_tokens - sum(map(_tokens, self.running.values()))

    def __call__(self, request: Request) -> Fit:
        assert request.attempt in self.waiting, "only queued requests are offered"
        return Fit.FITS if _tokens(request) <= self.free_tokens else Fit.MEMORY

    def is_near(self, request: Request) -> bool:
        return True

    def free_in_s(self, request: Request) -> float:
        return float(len(self.running))

    def submit(self, new: Request) -> None:
        self.waiting[new.attempt] = new
        self.policy.push(new, now=self.now)

    def cancel(self, attempt: Attempt) -> None:
        del self.waiting[attempt]
        self.policy.remove(attempt.request_id)

    def finish(self, attempt: Attempt) -> None:
        del self.running[attempt]
        self.version += 1
        self.policy.release(attempt, now=self.now)

    def finish_oldest(self) -> None:
        if self.running:
            self.finish(next(iter(self.running)))

    def dispatch(self) -> None:
        """Do all that the policy wants done now."""
        while (outcome := self.policy.take(self, now=self.now)) is not None:
            match outcome:
                case Taken(taken):
                    assert _tokens(taken) <= self.free_tokens
                    self.running[taken.attempt] = self.waiting.pop(taken.attempt)
                    self.dispatched.append(taken.attempt)
                case Squashed(attempt):
                    self._squash(attempt)
                case Refused(request_id):
                    attempt = next(one for one in self.waiting if one.request_id == request_id)
                    del self.waiting[attempt]
                    self.refused.append(attempt)
                case _:
                    assert_never(outcome)
            self.check()

    def check(self) -> None:
        """What is true of every policy between two calls."""
        policy = self.policy
        policy.check_integrity()
        assert len(policy) == len(self.waiting)
        assert {one.attempt for one in policy.upcoming()} == set(self.waiting)
        queues = {queue.name: queue.length for queue in policy.queues(now=self.now)}
        assert sum(queues.values()) == len(self.waiting)
        assert all(policy.queue_of(one.request_id) in queues for one in self.waiting)
        for one in self.waiting:
            policy.held_by(one.request_id, now=self.now)

    def _squash(self, attempt: Attempt) -> None:
        old = self.running[attempt]
        self.finish(attempt)
        self.submit(
            request(
                attempt.request_id,
                number=attempt.number + 1,
                context=old.context_tokens,
                output=old.predicted_output_tokens,
                priority=old.priority,
                arrived_s=old.arrived_s,
                deadline_s=old.deadline_s,
                tenant=old.tenant_id,
                using=old.adapter,
            )
        )


def _tokens(asked: Request) -> int:
    return asked.context_tokens + asked.remaining_output_tokens
