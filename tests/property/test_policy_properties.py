"""Whatever is queued and finishes: policies lose nothing, waste no memory, starve nobody."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from services.core.costs import StepCosts
from services.core.policies import POLICY_NAMES, build_policy
from services.core.policies.fifo import FifoConfig
from services.core.policies.sjf import SjfConfig
from services.core.policies.static import StaticConfig
from services.core.policies.static_batches import UellmConfig
from services.core.policies.vtc import VtcConfig
from services.core.queues import QueuePolicy
from services.core.types import Attempt, TenantId
from tests.unit.core.core_world import adapter, request
from tests.unit.core.policy_world import OnePool, pool_size

QUOTAS = {"static", "chameleon"}  # may leave memory unused for a quota's sake
STARVES = {"sjf", "static"}  # and say so

MACHINE = settings(max_examples=40, stateful_step_count=50, deadline=None, derandomize=True)

sizes = st.one_of(st.integers(1, 60), st.integers(100, 300), st.integers(400, 989))


def drain(pool: OnePool) -> None:
    """Nothing more comes: all that wait must go."""
    for _ in range(2000):
        pool.dispatch()
        if not pool.waiting:
            return
        pool.now += 1.0
        pool.finish_oldest()
    raise AssertionError(f"{len(pool.waiting)} requests wait for ever")


class PolicyMachine(RuleBasedStateMachine):
    """One policy and one worker; each request leaves once, and the accounts hold throughout."""

    def __init__(self, policy: QueuePolicy) -> None:
        super().__init__()
        self.pool = OnePool(policy)
        self.count = 0
        self.cancelled: set[Attempt] = set()
        self.submitted: set[Attempt] = set()

    @rule(
        context=sizes,
        output=st.integers(1, 10),
        priority=st.integers(0, 2),
        tenant=st.sampled_from("tuv"),
        rank=st.sampled_from([0, 8, 64]),
        slo_s=st.one_of(st.none(), st.floats(0.0, 100.0)),
        number=st.integers(1, 2),
    )
    def submit(
        self,
        *,
        context: int,
        output: int,
        priority: int,
        tenant: str,
        rank: int,
        slo_s: float | None,
        number: int,
    ) -> None:
        now = self.pool.now
        self.count += 1
        new = request(
            f"r{self.count}",
            number=number,
            context=context,
            output=output,
            priority=priority,
            tenant=tenant,
            using=adapter(f"a{rank}", rank=rank) if rank else None,
            arrived_s=max(0.0, now - number + 1),
            deadline_s=None if slo_s is None else now + slo_s,
        )
        self.submitted.add(new.attempt)
        self.pool.submit(new)

    @precondition(lambda self: self.pool.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        attempt = data.draw(st.sampled_from(list(self.pool.waiting)))
        self.cancelled.add(attempt)
        self.pool.cancel(attempt)

    @precondition(lambda self: self.pool.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.pool.finish(data.draw(st.sampled_from(list(self.pool.running))))

    @rule(wait_s=st.sampled_from([0.01, 1.0, 40.0]))
    def wait(self, wait_s: float) -> None:
        self.pool.now += wait_s

    @rule(step_s=st.floats(0.001, 0.1))
    def learn(self, step_s: float) -> None:
        self.pool.policy.learn(StepCosts(step_s=step_s))

    @rule(workers=st.integers(1, 3))
    def resize(self, workers: int) -> None:
        self.pool.policy.resize(pool_size(self.pool.kv_tokens, workers=workers))

    @rule()
    def release_an_unknown_one(self) -> None:
        self.pool.policy.release(request("adopted").attempt, now=self.pool.now)

    @rule()
    def dispatch(self) -> None:
        self.pool.dispatch()

    @invariant()
    def accounts_hold(self) -> None:
        self.pool.check()

    def teardown(self) -> None:
        drain(self.pool)
        first = [one for one in self.pool.dispatched if one in self.submitted]
        assert len(self.pool.dispatched) == len(set(self.pool.dispatched))
        gone = {*first, *self.cancelled, *self.pool.refused}
        assert self.submitted <= gone


def run_machine(build: Callable[[], QueuePolicy]) -> None:
    class Machine(PolicyMachine):
        def __init__(self) -> None:
            super().__init__(build())

    run_state_machine_as_test(Machine, settings=MACHINE)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_request_leaves_once_and_accounts_hold(name: str) -> None:
    run_machine(lambda: build_policy(name))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("fifo", FifoConfig(bypasses=3)),
        ("sjf", SjfConfig(by="service_s", bypasses=3)),
        ("static", StaticConfig(cutoffs=(50.0, 350.0), lends=False)),
        ("vtc", VtcConfig(weights={TenantId("t"): 3.0}, bypasses=2, idle_tenants=1)),
        ("slo_odbs", UellmConfig(form="published", cap=3, waits_for_batch=True)),
    ],
)
def test_so_it_is_with_other_options(name: str, config: object) -> None:
    run_machine(lambda: build_policy(name, config))


@pytest.mark.parametrize("name", [name for name in POLICY_NAMES if name not in QUOTAS])
@given(steps=st.lists(st.one_of(st.just(0), sizes), max_size=80))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_memory_idles_only_for_a_request_that_is_larger_than_it(
    name: str, steps: list[int]
) -> None:
    pool = OnePool(build_policy(name))
    for index, tokens in enumerate(steps):
        pool.now += 0.1
        if tokens:
            pool.submit(request(f"r{index}", context=tokens, arrived_s=pool.now))
        else:
            pool.finish_oldest()
        pool.dispatch()
        if pool.waiting:
            assert pool.running
            needs = [one.context_tokens + 10 for one in pool.waiting.values()]
            assert max(needs) > pool.free_tokens


@pytest.mark.parametrize("name", [name for name in POLICY_NAMES if name not in STARVES])
@given(flood=st.lists(st.integers(50, 90), min_size=120, max_size=120), large=st.integers(400, 989))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_a_flood_of_small_requests_starves_no_large_one(
    name: str, flood: list[int], large: int
) -> None:
    """Every second one request comes and the oldest running one ends: the pool is always full."""
    pool = OnePool(build_policy(name))
    for index in range(20):
        pool.submit(request(f"first{index}", context=60))
    pool.submit(request("large", context=large))
    for index, tokens in enumerate(flood):
        pool.dispatch()
        pool.now += 1.0
        pool.submit(request(f"r{index}", context=tokens, arrived_s=pool.now))
        pool.finish_oldest()
    assert request("large").attempt in pool.dispatched
