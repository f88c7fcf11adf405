"""Chameleon under anything: no token lost, no memory idle for ever, nobody passes the overdue."""

from typing import Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.core.costs import StepCosts
from services.core.ledger import Fit
from services.core.policies.chameleon import Chameleon
from services.core.policies.chameleon_sizing import ChameleonConfig
from services.core.queues import PoolSize, Refused, Squashed, Taken
from services.core.types import Adapter, Attempt, Request
from tests.unit.core.chameleon_world import TOKEN_BYTES, adapter, request

MEMORY_TOKENS: Final = 1200  # of each worker
SLOTS: Final = 8
STARVATION_S: Final = 20.0
ADAPTERS: Final = (None, adapter("a", 16), adapter("b", 64), adapter("c", 256))

shapes = st.tuples(
    st.one_of(st.integers(1, 50), st.integers(200, 400), st.integers(700, 850)),  # context
    st.integers(0, 90),  # predicted output
    st.sampled_from(ADAPTERS),
    st.integers(0, 1),  # priority
)
configs = st.builds(
    ChameleonConfig,
    size_form=st.sampled_from(["degree2", "linear"]),
    selection=st.sampled_from(["paper", "elbow", "silhouette"]),
    k_max=st.just(3),
    weights=st.sampled_from([None, (1.0, 1.0, 1.0), (1.0, 2.0, 9.0)]),
    refresh_s=st.just(25.0),
    first_refresh_requests=st.sampled_from([2, 8]),
    window=st.just(16),
    bypass=st.booleans(),
    squash_fraction=st.sampled_from([0.05, 1.0]),
    starvation_s=st.just(STARVATION_S),
    priority_lead_s=st.sampled_from([0.0, 5.0]),
)


class Anything(RuleBasedStateMachine):
    """Two workers of fixed memory behind one policy; also the placer that the policy is offered."""

    @initialize(config=configs)
    def begin(self, config: ChameleonConfig) -> None:
        self.config = config
        self.policy = Chameleon(config)
        self.policy.resize(PoolSize(2 * MEMORY_TOKENS, TOKEN_BYTES, 2, 2 * SLOTS))
        self.now = 0.0
        self.version = 0
        self.wait_s = 5.0
        self.pushed = 0
        self.queued: dict[Attempt, Request] = {}
        self.running: tuple[dict[Attempt, Request], ...] = ({}, {})
        self.charged: dict[Attempt, int] = {}
        self.squashed: set[Attempt] = set()
        self.squashes = self.taken = 0
        self.chosen = 0

    # --- the placer ---

    @property
    def free_tokens(self) -> int:
        return max(MEMORY_TOKENS - used(list(worker.values())) for worker in self.running)

    def __call__(self, request: Request) -> Fit:
        workers = [index for index, worker in enumerate(self.running) if len(worker) < SLOTS]
        for index in workers:
            if used([*self.running[index].values(), request]) <= MEMORY_TOKENS:
                self.chosen = index
                return Fit.FITS
        if not workers:
            return Fit.BATCH_SLOTS
        return Fit.MEMORY if kv_tokens(request) > self.free_tokens else Fit.ADAPTER

    def is_near(self, request: Request) -> bool:
        return any(request.adapter == one.adapter for one in self._all_running())

    def free_in_s(self, request: Request) -> float:
        return self.wait_s

    # --- events ---

    @rule(batch=st.lists(shapes, min_size=1, max_size=5))
    def submit(self, batch: list[tuple[int, int, Adapter | None, int]]) -> None:
        for context, output, using, priority in batch:
            self.pushed += 1
            self._push(
                request(
                    f"r{self.pushed}",
                    context=context,
                    output=output,
                    using=using,
                    at=self.now,
                    priority=priority,
                )
            )
        self._decide()

    @precondition(lambda self: self.queued)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        attempt = data.draw(st.sampled_from(sorted(self.queued)))
        del self.queued[attempt]
        self.policy.remove(attempt.request_id)
        self._decide()

    @precondition(lambda self: self.charged)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from(sorted(self.charged))))
        self._decide()

    @rule(passed_s=st.floats(0.0, 6.0), wait_s=st.sampled_from([0.0, 2.0, float("inf")]))
    def wait(self, passed_s: float, wait_s: float) -> None:
        self.now += passed_s
        self.wait_s = wait_s
        self._decide()

    @rule(step_s=st.floats(0.001, 1.0))
    def learn(self, step_s: float) -> None:
        self.policy.learn(StepCosts(step_s=step_s))

    @rule(workers=st.integers(0, 2), token_bytes=st.sampled_from([0.0, TOKEN_BYTES, 500.0]))
    def resize(self, workers: int, token_bytes: float) -> None:
        self.policy.resize(PoolSize(workers * MEMORY_TOKENS, token_bytes, workers, SLOTS * workers))
        self._decide()

    @precondition(lambda self: self.squashed)
    @rule(data=st.data())
    def stop_a_squashed_one(self, data: st.DataObject) -> None:
        attempt = data.draw(st.sampled_from(sorted(self.squashed)))
        old = self.running[self.charged[attempt]][attempt]
        self._end(attempt)
        again = request(
            attempt.request_id,
            number=2,
            context=old.context_tokens + 1,
            prior=1,
            output=old.predicted_output_tokens,
            using=old.adapter,
            at=old.arrived_s,
            priority=old.priority,
        )
        self._push(again)
        self._decide()

    # --- what always holds ---

    @invariant()
    def all_is_there(self) -> None:
        self.policy.check_integrity()
        assert len(self.policy) == len(self.queued)
        assert {one.attempt for one in self.policy.upcoming()} == set(self.queued)
        assert self.squashes <= self.config.squash_fraction * self.taken

    @invariant()
    def what_is_out_is_what_runs(self) -> None:
        snapshots = self.policy.queues(now=self.now)
        kv = sum(kv_tokens(one) for one in self._all_running())
        out = sum(one.used_tokens for one in snapshots)
        digests = {one.adapter.digest for one in self._all_running() if one.adapter is not None}
        assert (out == kv) if not digests else (out > kv)
        assert sum(one.length for one in snapshots) == len(self.queued)

    @invariant()
    def who_is_held_has_a_reason(self) -> None:
        for attempt in self.queued:
            cause = self.policy.held_by(attempt.request_id, now=self.now)
            assert cause in {None, "order", "quota"}

    def teardown(self) -> None:
        """Whatever happened, all get out in the end."""
        if not hasattr(self, "policy"):
            return
        for _ in range(3 * self.pushed + 1):
            self._decide()
            for attempt in sorted(self.charged)[:1]:
                self._end(attempt)
            self.now += 1.0
            self.all_is_there()
        assert not self.queued
        assert not any(one.used_tokens for one in self.policy.queues(now=self.now))

    # --- private ---

    def _decide(self) -> None:
        """All that the policy takes; then nothing that its rules let go may be left."""
        while (outcome := self.policy.take(self, now=self.now)) is not None:
            self.policy.check_integrity()
            match outcome:
                case Taken(new):
                    assert self(new) is Fit.FITS
                    assert self._key(new) <= self._overdue_key()
                    del self.queued[new.attempt]
                    self.running[self.chosen][new.attempt] = new
                    self.charged[new.attempt] = self.chosen
                    self.taken += 1
                case Squashed(attempt):
                    assert attempt in self.charged
                    assert attempt not in self.squashed
                    assert attempt.number == 1
                    self.squashed.add(attempt)
                    self.squashes += 1
                case Refused():
                    pytest.fail("it refuses nobody")
        assert not self.queued or self.charged, "something always runs"
        for one in self.queued.values():
            if self.policy.held_by(one.attempt.request_id, now=self.now) is None:
                assert self(one) is not Fit.FITS

    def _push(self, new: Request) -> None:
        self.queued[new.attempt] = new
        self.policy.push(new, now=self.now)

    def _end(self, attempt: Attempt) -> None:
        del self.running[self.charged.pop(attempt)][attempt]
        self.squashed.discard(attempt)
        self.version += 1
        self.policy.release(attempt, now=self.now)

    def _all_running(self) -> list[Request]:
        return [one for worker in self.running for one in worker.values()]

    def _key(self, one: Request) -> float:
        return one.arrived_s - self.config.priority_lead_s * one.priority

    def _overdue_key(self) -> float:
        """The smallest key of all, if its request has waited too long: it must go next."""
        first = min(self.queued.values(), key=self._key)
        is_overdue = first.arrived_s <= self.now - STARVATION_S
        return self._key(first) if is_overdue else float("inf")


def kv_tokens(one: Request) -> int:
    return one.context_tokens + one.remaining_output_tokens


def used(requests: list[Request]) -> int:
    adapters = {one.adapter for one in requests if one.adapter is not None}
    loaded = sum(int(one.size_bytes / TOKEN_BYTES) for one in adapters)
    return sum(kv_tokens(one) for one in requests) + loaded


TestAnything = Anything.TestCase
TestAnything.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
