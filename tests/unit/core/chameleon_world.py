"""What the tests of Chameleon share: requests, and one worker's memory as a placer."""

from collections.abc import Iterator
from dataclasses import replace

from services.core.costs import StepCosts
from services.core.ledger import Fit
from services.core.policies.chameleon import Chameleon
from services.core.policies.chameleon_sizing import ChameleonConfig
from services.core.queues import PoolSize, Refused, Squashed, Taken
from services.core.types import (
    Adapter,
    AdapterDigest,
    Attempt,
    GatewayId,
    Request,
    RequestId,
    TenantId,
)

TOKEN_BYTES = 1000.0
FREE = StepCosts(0, 0, 0, 0, 0, 0, 0, 0)  # D = 0: a quota is S and an equal share of the rest
HALF_SECOND_STEPS = replace(FREE, step_s=0.5)  # ten tokens take 5.5 s
TWO_QUEUES = ChameleonConfig(
    k_max=2,
    selection="paper",
    first_refresh_requests=8,
    weights=(1.0, 1.0),
    max_input_tokens=1000.0,
    max_output_tokens=1000.0,
)


def adapter(name: str, tokens: int, rank: int = 8) -> Adapter:
    return Adapter(AdapterDigest(name), rank, int(tokens * TOKEN_BYTES))


def request(
    name: str,
    *,
    context: int = 90,
    output: int = 10,
    using: Adapter | None = None,
    number: int = 1,
    prior: int = 0,
    at: float = 0.0,
    priority: int = 0,
) -> Request:
    """Of `context` tokens, `prior` of them generated before; `output` is predicted in total."""
    return Request(
        attempt=Attempt(RequestId(name), number),
        gateway_id=GatewayId("g"),
        tenant_id=TenantId("t"),
        adapter=using,
        context_tokens=context,
        prior_output_tokens=prior,
        max_output_tokens=1000,
        predicted_output_tokens=output,
        output_tokens_q90=output,
        priority=priority,
        arrived_s=at,
        deadline_s=None,
    )


class OneWorker:
    """A policy, and a worker whose memory is `tokens`; adapters of no running request are free."""

    def __init__(self, config: ChameleonConfig, tokens: int, *, slots: int = 1000) -> None:
        self.policy = Chameleon(config)
        self.tokens = tokens
        self.slots = slots
        self.now = 0.0
        self.version = 0
        self.running: dict[Attempt, tuple[Request, float]] = {}  # with their predicted end
        self.near: set[AdapterDigest] = set()
        self.asked: list[str] = []
        self.policy.resize(PoolSize(tokens, TOKEN_BYTES, 1, slots))

    # --- the placer ---

    @property
    def free_tokens(self) -> int:
        return self.tokens - self._used([one for one, _ in self.running.values()])

    def __call__(self, request: Request) -> Fit:
        self.asked.append(request.attempt.request_id)
        if len(self.running) >= self.slots:
            return Fit.BATCH_SLOTS
        if _tokens(request) > self.free_tokens:
            return Fit.MEMORY
        return Fit.FITS if self._fits(request, self._requests()) else Fit.ADAPTER

    def is_near(self, request: Request) -> bool:
        return request.adapter is None or request.adapter.digest in self.near

    def free_in_s(self, request: Request) -> float:
        by_end = sorted(self.running.values(), key=lambda pair: pair[1])
        for ended in range(len(by_end) + 1):
            if self._fits(request, [one for one, _ in by_end[ended:]]):
                return max(0.0, by_end[ended - 1][1] - self.now) if ended else 0.0
        return float("inf")

    # --- what happens ---

    def push(self, new: Request) -> None:
        self.policy.push(new, now=self.now)
        self.policy.check_integrity()

    def take(self, *, lasting_s: float = 10.0) -> list[str]:
        """All outcomes until there is none; squashed ones end at once but keep their tokens."""
        self.version += 1
        return list(self._outcomes(lasting_s))

    def finish(self, name: str, number: int = 1) -> None:
        attempt = Attempt(RequestId(name), number)
        del self.running[attempt]
        self.policy.release(attempt, now=self.now)
        self.policy.check_integrity()

    def _outcomes(self, lasting_s: float) -> Iterator[str]:
        while (outcome := self.policy.take(self, now=self.now)) is not None:
            match outcome:
                case Taken(taken, queue, cause):
                    assert self(taken) is Fit.FITS
                    self.running[taken.attempt] = (taken, self.now + lasting_s)
                    yield f"take {taken.attempt.request_id} from {queue}, waited for {cause}"
                case Squashed(attempt):
                    assert attempt in self.running
                    yield f"squash {attempt.request_id}.{attempt.number}"
                case Refused():
                    raise AssertionError(outcome)
            self.policy.check_integrity()

    def _requests(self) -> list[Request]:
        return [one for one, _ in self.running.values()]

    def _fits(self, request: Request, running: list[Request]) -> bool:
        return self._used([*running, request]) <= self.tokens

    def _used(self, requests: list[Request]) -> int:
        adapters = {one.adapter for one in requests if one.adapter is not None}
        adapter_tokens = sum(int(one.size_bytes / TOKEN_BYTES) for one in adapters)
        return sum(_tokens(one) for one in requests) + adapter_tokens


def _tokens(request: Request) -> int:
    return request.context_tokens + request.remaining_output_tokens


def small(name: str, *, at: float = 0.0, priority: int = 0) -> Request:
    return request(name, context=90, output=10, at=at, priority=priority)


def large(name: str, *, at: float = 0.0) -> Request:
    return request(name, context=290, output=10, at=at)


def two_queues(tokens: int = 1000, config: ChameleonConfig = TWO_QUEUES) -> OneWorker:
    """Queue-0 has requests of 100 tokens, queue-1 of 300; of 1000 they get 400 and 600."""
    world = OneWorker(config, tokens, slots=0)
    world.policy.learn(FREE)
    for number in range(4):
        world.push(small(f"s{number}"))
        world.push(large(f"l{number}"))
    assert world.take() == []  # refreshes
    for number in range(4):
        world.policy.remove(RequestId(f"s{number}"))
        world.policy.remove(RequestId(f"l{number}"))
    world.policy.learn(HALF_SECOND_STEPS)
    world.slots = 1000
    return world


def quotas(world: OneWorker) -> list[tuple[str, float | None, int]]:
    queues = world.policy.queues(now=world.now)
    return [(one.name, one.quota_tokens, one.used_tokens) for one in queues]
