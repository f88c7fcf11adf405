"""Whatever is queued and finishes: policies waste no memory, starve nobody, lose nothing."""

from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.config import MultilevelConfig
from services.core.policies import POLICY_NAMES, build_policy
from services.core.types import Attempt, Request
from tests.unit.core.core_world import request

POOL_TOKENS = 1000
LEVELS = MultilevelConfig(
    cutoffs=(100.0, 400.0), shares=(1.0, 1.0, 1.0), bypasses=3, starvation_s=20.0
)
Step = Literal["finish"] | tuple[int, int]

sizes = st.one_of(st.integers(1, 60), st.integers(100, 300), st.integers(400, 989))
steps = st.lists(st.one_of(st.just("finish"), st.tuples(sizes, st.integers(0, 2))), max_size=80)


class OnePool:
    """One worker with nothing but KV memory, behind a policy."""

    def __init__(self, name: str) -> None:
        self.policy = build_policy(name, multilevel=LEVELS)
        self.policy.resize(POOL_TOKENS)
        self.running: dict[Attempt, int] = {}
        self.waiting: dict[Attempt, tuple[Request, float]] = {}
        self.waits_s: list[float] = []
        self.now = 0.0

    def fits(self, new: Request) -> bool:
        return sum(self.running.values()) + new.context_tokens + 10 <= POOL_TOKENS

    def push(self, name: str, tokens: int, priority: int) -> None:
        new = request(name, context=tokens, priority=priority)
        self.waiting[new.attempt] = (new, self.now)
        self.policy.push(new, now=self.now)

    def finish_oldest(self) -> None:
        if self.running:
            attempt = next(iter(self.running))
            del self.running[attempt]
            self.policy.release(attempt)

    def dispatch(self) -> None:
        while (taken := self.policy.take(self.fits, now=self.now)) is not None:
            assert self.fits(taken)
            self.running[taken.attempt] = taken.context_tokens + 10
            _, since_s = self.waiting.pop(taken.attempt)
            self.waits_s.append(self.now - since_s)
        self.policy.check_integrity()


@given(steps=steps, name=st.sampled_from(POLICY_NAMES))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_memory_idles_only_for_a_request_that_is_larger_than_it(
    steps: list[Step], name: str
) -> None:
    pool = OnePool(name)
    for index, step in enumerate(steps):
        pool.now += 0.1
        if step == "finish":
            pool.finish_oldest()
        else:
            pool.push(f"r{index}", *step)
        pool.dispatch()
        if pool.waiting:
            assert pool.running
            assert not all(pool.fits(new) for new, _ in pool.waiting.values())
    while pool.waiting:
        pool.finish_oldest()
        pool.dispatch()
    assert len(pool.waits_s) == sum(step != "finish" for step in steps)


@given(
    flood=st.lists(st.tuples(st.integers(50, 300), st.integers(0, 2)), min_size=60, max_size=60),
    large=st.integers(400, 989),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_flood_of_urgent_small_requests_starves_no_large_one(
    flood: list[tuple[int, int]], large: int
) -> None:
    """Each second one request comes and the oldest running one ends: the pool is always full."""
    pool = OnePool("multilevel")
    for index in range(8):
        pool.push(f"first{index}", 200, 2)
    pool.push("large", large, 0)
    large_attempt = request("large").attempt
    gone_s = None
    for index, (tokens, priority) in enumerate(flood):
        pool.dispatch()
        if gone_s is None and large_attempt not in pool.waiting:
            gone_s = pool.now
        pool.now += 1.0
        pool.push(f"r{index}", tokens, priority)
        pool.finish_oldest()
    # After starvation_s at most `bypasses` others pass it; then what runs ends, one each second.
    assert gone_s is not None
    most_running = POOL_TOKENS // (50 + 10)
    assert gone_s <= LEVELS.starvation_s + LEVELS.bypasses + most_running + 1
