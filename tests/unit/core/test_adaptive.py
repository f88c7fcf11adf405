"""The default order: due times, deadlines, passing and draining, thirds."""

import math
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.costs import StepCosts
from services.core.decisions import RejectReason
from services.core.ledger import Fit
from services.core.policies.adaptive import Adaptive, AdaptiveConfig
from services.core.queues import Refused, Taken
from services.core.types import Request, RequestId
from tests.unit.core.core_world import request

# A request takes 1 s per ten tokens of prompt and 1 s per token of output: sums a reader can do.
COSTS = StepCosts(
    step_s=0.0,
    prefill_token_s=0.1,
    prefill_rank_token_s=0.0,
    decode_sequence_s=1.0,
    decode_rank_s=0.0,
    cached_token_s=0.0,
)
# Told in full, so that the figures below don't depend on the defaults.
SHAPE = AdaptiveConfig(patience=8.0, decode_share=1.0, priority_s=10.0, drain_s=1.0, passers=16)


@dataclass
class Pool:
    """One worker with so many tokens of memory, as a placer. `stop` answers everybody."""

    tokens: int = 1000
    used: dict[RequestId, int] = field(default_factory=dict)
    stop: Fit | None = None
    version: int = 0
    asked: list[RequestId] = field(default_factory=list)

    @property
    def free_tokens(self) -> int:
        return self.tokens - sum(self.used.values())

    def __call__(self, request: Request) -> Fit:
        self.asked.append(request.attempt.request_id)
        if self.stop is not None:
            return self.stop
        return Fit.FITS if need(request) <= self.free_tokens else Fit.MEMORY

    def is_near(self, request: Request) -> bool:
        return True

    def free_in_s(self, request: Request) -> float:
        return math.inf

    def start(self, new: Request) -> None:
        assert need(new) <= self.free_tokens
        self.used[new.attempt.request_id] = need(new)

    def end(self, name: str) -> None:
        del self.used[RequestId(name)]
        self.version += 1


def need(new: Request) -> int:
    return new.context_tokens + new.remaining_output_tokens


def sized(
    name: str,
    service_s: int,
    *,
    arrived_s: float = 0.0,
    priority: int = 0,
    deadline_s: float | None = None,
) -> Request:
    """A request of one token of output and as much prompt as its service takes."""
    return request(
        name,
        context=10 * (service_s - 1),
        output=1,
        arrived_s=arrived_s,
        priority=priority,
        deadline_s=deadline_s,
    )


def adaptive(*requests: Request, config: AdaptiveConfig = SHAPE) -> Adaptive:
    policy = Adaptive(config)
    policy.learn(COSTS)
    for new in requests:
        policy.push(new, now=new.arrived_s)
    return policy


def drain(policy: Adaptive, pool: Pool, *, now: float) -> list[str]:
    """Who goes now, in order."""
    gone: list[str] = []
    while (outcome := policy.take(pool, now=now)) is not None:
        policy.check_integrity()
        assert isinstance(outcome, Taken)
        pool.start(outcome.request)
        gone.append(outcome.request.attempt.request_id)
    return gone


# --- the order ------------------------------------------------------------------------------------


def test_requests_go_in_order_of_arrival_plus_eight_times_their_service() -> None:
    policy = adaptive(
        sized("large", 5, arrived_s=0.0),  # due at 40
        sized("medium", 3, arrived_s=10.0),  # due at 34
        sized("small", 2, arrived_s=20.0),  # due at 36
        sized("late", 2, arrived_s=25.0),  # due at 41
    )
    assert drain(policy, Pool(), now=30.0) == ["medium", "small", "large", "late"]


def test_patience_says_how_much_size_counts() -> None:
    requests = sized("large", 5, arrived_s=0.0), sized("small", 2, arrived_s=5.0)
    assert (
        drain(adaptive(*requests, config=replace(SHAPE, patience=1.0)), Pool(), now=9.0)[0]
        == "large"
    )
    assert (
        drain(adaptive(*requests, config=replace(SHAPE, patience=2.0)), Pool(), now=9.0)[0]
        == "small"
    )
    assert (
        drain(adaptive(*requests, config=replace(SHAPE, patience=0.0)), Pool(), now=9.0)[0]
        == "large"
    )


def test_output_counts_as_expected_not_as_allowed() -> None:
    policy = adaptive(
        request("long", context=10, output=9, output_max=900),  # due at 80
        request("short", context=10, output=5, output_max=900, arrived_s=1.0),  # due at 49
    )
    assert drain(policy, Pool(), now=1.0) == ["short", "long"]


def test_output_counts_as_little_as_the_configuration_says() -> None:
    long = request("long", context=10, output=900)  # due at 8, or at 2,168 by a share of 0.3
    short = request("short", context=20, output=5, arrived_s=1.0)  # due at 17, or at 29
    by_prompt = adaptive(long, short, config=replace(SHAPE, decode_share=0.0))
    assert drain(by_prompt, Pool(), now=1.0) == ["long", "short"]
    by_both = adaptive(long, short, config=replace(SHAPE, decode_share=0.3))
    assert drain(by_both, Pool(), now=1.0) == ["short", "long"]


def test_equal_due_times_go_in_order_of_arrival_here() -> None:
    policy = adaptive(*[sized(name, 2) for name in "cab"])
    assert drain(policy, Pool(), now=0.0) == ["c", "a", "b"]


def test_a_step_of_priority_is_worth_ten_seconds() -> None:
    policy = adaptive(
        sized("plain", 2, arrived_s=0.0),  # due at 16
        sized("urgent", 2, arrived_s=9.0, priority=1),  # due at 15
        sized("too-late", 2, arrived_s=11.0, priority=1),  # due at 17
        sized("twice", 2, arrived_s=12.0, priority=2),  # due at 8
    )
    assert drain(policy, Pool(), now=12.0) == ["twice", "urgent", "plain", "too-late"]


def test_a_later_attempt_counts_from_its_first_arrival_and_only_what_is_left() -> None:
    again = request("again", number=2, context=20, prior=10, output=12, arrived_s=0.0)  # due at 32
    policy = adaptive(sized("other", 2, arrived_s=10.0))  # due at 26
    policy.push(again, now=20.0)
    policy.push(sized("third", 3, arrived_s=20.0), now=20.0)  # due at 44
    assert drain(policy, Pool(), now=20.0) == ["other", "again", "third"]


def test_costs_learned_later_weigh_those_that_come_later() -> None:
    policy = adaptive(sized("a", 3))  # due at 24
    policy.learn(StepCosts())
    policy.push(sized("b", 30, arrived_s=10.0), now=10.0)  # some milliseconds of service now
    assert drain(policy, Pool(), now=10.0) == ["b", "a"]


# --- deadlines ------------------------------------------------------------------------------------


def test_a_deadline_makes_a_request_due_when_it_must_start_at_the_latest() -> None:
    """Its prompt takes 4 s, and nothing faster is believed of its one token."""
    policy = adaptive(
        sized("before", 2, arrived_s=2.9),  # due at 18.9
        sized("bound", 5, deadline_s=23.0),  # due at 19, not 40
        sized("after", 2, arrived_s=3.1),  # due at 19.1
    )
    assert drain(policy, Pool(), now=3.1) == ["before", "bound", "after"]


def test_a_far_deadline_makes_no_request_wait_longer() -> None:
    policy = adaptive(sized("bound", 2, deadline_s=500.0), sized("plain", 3))
    assert drain(policy, Pool(), now=0.0) == ["bound", "plain"]


def test_all_that_are_too_late_are_refused_at_once() -> None:
    late = [sized(name, 2, deadline_s=10.0) for name in "ab"]
    policy = adaptive(*late, sized("c", 2, deadline_s=20.0), sized("d", 2))
    pool = Pool(stop=Fit.BATCH_SLOTS)
    assert policy.next_deadline(now=0.0) == 9.0
    assert policy.take(pool, now=8.9) is None
    assert [policy.take(pool, now=9.0) for _ in range(3)] == [
        Refused(RequestId("a"), RejectReason.DEADLINE_UNREACHABLE),
        Refused(RequestId("b"), RejectReason.DEADLINE_UNREACHABLE),
        None,
    ]
    policy.check_integrity()
    assert policy.next_deadline(now=9.0) == 19.0


def test_who_goes_or_is_removed_in_time_is_not_refused_later() -> None:
    policy = adaptive(*[sized(name, 2, deadline_s=10.0) for name in "ab"])
    policy.remove(RequestId("a"))
    assert drain(policy, Pool(), now=1.0) == ["b"]
    assert policy.next_deadline(now=1.0) is None
    assert policy.take(Pool(), now=99.0) is None


def test_who_does_not_refuse_late_ones_runs_them() -> None:
    policy = adaptive(sized("a", 2, deadline_s=10.0), config=replace(SHAPE, refuses_late=False))
    assert policy.next_deadline(now=0.0) is None
    assert drain(policy, Pool(), now=9.9) == ["a"]


# --- who may pass ---------------------------------------------------------------------------------


def blocked(config: AdaptiveConfig = SHAPE) -> tuple[Adaptive, Pool]:
    """A first request that needs 91 tokens where 50 are free."""
    policy = adaptive(sized("large", 10, arrived_s=0.0), config=config)
    return policy, Pool(100, {RequestId("old"): 50})


def test_who_fits_may_pass_a_first_one_that_lacks_memory_until_it_has_drained() -> None:
    policy, pool = blocked()
    assert drain(policy, pool, now=100.0) == []
    policy.push(sized("a", 2, arrived_s=100.0), now=100.5)
    assert drain(policy, pool, now=100.5) == ["a"]
    policy.push(sized("b", 2, arrived_s=100.0), now=101.0)
    assert drain(policy, pool, now=101.0) == []
    pool.end("a")
    assert drain(policy, pool, now=150.0) == []
    pool.end("old")
    assert drain(policy, pool, now=160.0) == ["large"]
    pool.end("large")
    assert drain(policy, pool, now=160.0) == ["b"]


def test_a_request_that_is_due_before_is_not_passing() -> None:
    """Draining holds back those behind, not those that the order puts in front."""
    policy, pool = blocked()
    drain(policy, pool, now=2.0)
    policy.push(sized("small", 2, arrived_s=20.0), now=20.0)  # due at 36, the large one at 80
    assert drain(policy, pool, now=20.0) == ["small"]


def test_nobody_passes_a_drained_request_while_another_one_is_first() -> None:
    policy, pool = blocked()
    drain(policy, pool, now=20.0)
    policy.push(sized("first", 7, arrived_s=20.0), now=20.0)  # due at 76, needs 61 tokens
    policy.push(sized("behind", 2, arrived_s=99.0), now=99.0)
    assert drain(policy, pool, now=99.0) == []
    pool.end("old")
    assert drain(policy, pool, now=100.0) == ["first"]


def test_passers_are_asked_in_order_and_so_many_at_most() -> None:
    policy, pool = blocked(replace(SHAPE, passers=2))
    for name, service_s in (("a", 8), ("b", 9), ("c", 2)):
        policy.push(sized(name, service_s, arrived_s=100.0 - 8 * service_s), now=100.0)
    assert drain(policy, pool, now=100.0) == []
    policy.remove(RequestId("a"))
    assert drain(policy, pool, now=100.0) == ["c"]


def test_nobody_is_asked_who_needs_more_than_any_worker_has() -> None:
    policy, pool = blocked()
    policy.push(sized("too-large", 7, arrived_s=30.0), now=30.0)  # 61 tokens
    policy.push(sized("fits", 5, arrived_s=60.0), now=60.0)  # 41 tokens
    assert drain(policy, pool, now=60.0) == ["fits"]
    assert "too-large" not in pool.asked


def test_without_passers_or_with_no_time_to_drain_the_first_one_blocks() -> None:
    for config in (replace(SHAPE, passers=0), replace(SHAPE, drain_s=0.0)):
        policy, pool = blocked(config)
        policy.push(sized("small", 2, arrived_s=100.0), now=100.0)
        assert drain(policy, pool, now=100.0) == []


@pytest.mark.parametrize("stop", [Fit.BATCH_SLOTS, Fit.PREFILL])
def test_when_no_worker_takes_anybody_only_one_is_asked(stop: Fit) -> None:
    policy, pool = blocked()
    pool.stop = stop
    policy.push(sized("small", 2, arrived_s=100.0), now=100.0)
    assert drain(policy, pool, now=100.0) == []
    assert pool.asked == ["large"]
    pool.stop = None
    pool.version += 1
    assert drain(policy, pool, now=200.0) == ["small"]  # waiting for a slot is not draining


def test_nobody_is_asked_again_before_something_has_changed() -> None:
    policy, pool = blocked()
    for index in range(30):
        policy.push(sized(f"r{index}", 6 + index, arrived_s=100.0), now=100.0)
    drain(policy, pool, now=100.0)
    pool.asked.clear()
    policy.push(sized("last", 90, arrived_s=100.0), now=100.1)
    assert drain(policy, pool, now=100.1) in ([], ["last"])
    asked = len(pool.asked)
    assert drain(policy, pool, now=100.2) == []
    assert len(pool.asked) == asked
    pool.end("old")
    assert drain(policy, pool, now=100.3) == ["large"]


# --- what it tells --------------------------------------------------------------------------------


def test_the_cause_of_a_wait_is_what_the_request_lacked_when_it_was_asked_last() -> None:
    policy, pool = blocked()
    for name in ("also-large", "unasked"):
        policy.push(sized(name, 10, arrived_s=0.0), now=0.0)
    drain(policy, pool, now=1.0)
    assert policy.held_by(RequestId("large"), now=1.0) is None
    assert policy.held_by(RequestId("unasked"), now=1.0) == "order"
    pool.tokens = 1000
    pool.version += 1
    taken = [policy.take(pool, now=2.0) for _ in range(3)]
    assert [one.waited_for for one in taken if isinstance(one, Taken)] == ["memory"] * 3
    policy.push(sized("new", 2, arrived_s=2.0), now=2.0)
    policy.push(sized("newer", 2, arrived_s=2.0), now=2.0)
    first = policy.take(pool, now=2.0)
    assert isinstance(first, Taken)
    assert first.waited_for == "nothing"
    second = policy.take(pool, now=3.0)
    assert isinstance(second, Taken)
    assert second.waited_for == "order"


def test_queues_are_thirds_of_recent_sizes() -> None:
    policy = adaptive(*[sized(f"r{index}", 2 + index) for index in range(9)])
    small, medium, large = policy.queues(now=4.0)
    assert (small.name, small.size_limit) == ("small", 5.0)
    assert (medium.name, medium.size_limit) == ("medium", 8.0)
    assert (large.name, large.size_limit) == ("large", None)
    assert small.length + medium.length + large.length == 9
    policy.push(sized("tiny", 2), now=4.0)
    policy.push(sized("huge", 90), now=4.0)
    assert policy.queue_of(RequestId("tiny")) == "small"
    assert policy.queue_of(RequestId("huge")) == "large"


def test_thirds_follow_the_recent_requests_only() -> None:
    policy = adaptive()
    for index in range(1100):
        policy.push(sized(f"r{index}", 2 if index < 500 else 50), now=0.0)
        if index % 2:
            policy.remove(RequestId(f"r{index}"))
    assert [queue.size_limit for queue in policy.queues(now=0.0)] == [50.0, 50.0, None]
    policy.check_integrity()


def test_the_age_of_a_queue_is_that_of_its_oldest_request() -> None:
    policy = adaptive(sized("a", 5, arrived_s=1.0), sized("b", 5, arrived_s=2.0))
    assert [queue.oldest_s for queue in policy.queues(now=4.0)] == [0.0, 0.0, 3.0]
    policy.remove(RequestId("a"))
    assert [queue.oldest_s for queue in policy.queues(now=4.0)] == [0.0, 0.0, 2.0]


# --- whatever comes -------------------------------------------------------------------------------

Step = tuple[str, int, float]

events = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "end", "cancel", "stop"]),
        st.sampled_from([2, 3, 5, 15, 30, 60, 90]),
        st.sampled_from([0.0, 0.1, 0.4, 2.0, 30.0]),
    ),
    max_size=60,
)


class Watch:
    """Feeds a policy and its pool, and judges by the due times who may go."""

    def __init__(self, config: AdaptiveConfig) -> None:
        self.config = config
        self.policy, self.pool = adaptive(config=config), Pool(900)
        self.waiting: dict[RequestId, Request] = {}  # in order of arrival
        self.lacking_since_s: dict[RequestId, float] = {}
        self.now = 0.0

    def due_s(self, new: Request) -> float:
        return new.arrived_s + self.config.patience * COSTS.service_s(new)

    def in_order(self) -> list[Request]:
        return sorted(self.waiting.values(), key=self.due_s)

    def is_drained(self, new: Request) -> bool:
        since_s = self.lacking_since_s.get(new.attempt.request_id)
        return since_s is not None and self.now >= since_s + self.config.drain_s

    def may_go(self) -> list[Request]:
        """Whom the policy may ask, by its rules, and who would go."""
        if not self.waiting or self.pool.stop is not None:
            return []
        order = self.in_order()
        if need(order[0]) <= self.pool.free_tokens:
            return order[:1]
        self.lacking_since_s.setdefault(order[0].attempt.request_id, self.now)
        candidates: list[Request] = []
        for one in order[: 1 + self.config.passers]:
            candidates.append(one)
            if self.is_drained(one):
                break
        return [one for one in candidates if need(one) <= self.pool.free_tokens]

    def perform(self, index: int, step: Step) -> None:
        kind, size, wait_s = step
        self.now += wait_s
        if kind == "push":
            new = sized(f"r{index}", size, arrived_s=self.now)
            self.waiting[new.attempt.request_id] = new
            self.policy.push(new, now=self.now)
        elif kind == "cancel" and self.waiting:
            request_id = list(self.waiting)[size % len(self.waiting)]
            del self.waiting[request_id]
            self.policy.remove(request_id)
        elif kind == "end" and self.pool.used:
            self.pool.end(next(iter(self.pool.used)))
        elif kind == "stop":
            self.pool.stop = Fit.PREFILL if self.pool.stop is None else None
            self.pool.version += 1
        self.take_all()

    def take_all(self) -> None:
        while True:
            allowed = self.may_go()
            outcome = self.policy.take(self.pool, now=self.now)
            self.policy.check_integrity()
            if outcome is None:
                assert not allowed, "who may go and fits has gone"
                return
            assert isinstance(outcome, Taken)
            assert outcome.request is allowed[0], "the first of those that may go"
            del self.waiting[outcome.request.attempt.request_id]
            self.pool.start(outcome.request)


@given(
    steps=events,
    config=st.builds(
        AdaptiveConfig,
        decode_share=st.just(1.0),
        patience=st.sampled_from([0.0, 1.0, 8.0]),
        drain_s=st.sampled_from([0.0, 1.0, 5.0, 1e9]),
        passers=st.sampled_from([0, 2, 16]),
    ),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_whoever_may_go_and_fits_goes_and_nobody_is_passed_after_it_has_drained(
    steps: list[Step], config: AdaptiveConfig
) -> None:
    watch = Watch(config)
    for index, step in enumerate(steps):
        watch.perform(index, step)
    watch.pool.stop = None
    watch.pool.version += 1
    watch.take_all()
    while watch.waiting:
        watch.pool.end(next(iter(watch.pool.used)))
        watch.take_all()


@given(
    sizes=st.lists(st.integers(2, 8), min_size=300, max_size=300),
    large=st.integers(20, 90),
    runs_s=st.integers(2, 12),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_flood_of_small_requests_starves_no_large_one(
    sizes: list[int], large: int, runs_s: int
) -> None:
    """Each second two small ones come; whoever runs ends after `runs_s`: there is never room."""
    policy, pool = adaptive(), Pool(900)
    ends: dict[int, list[str]] = {}
    policy.push(sized("large", large, arrived_s=0.0), now=0.0)
    pool.used[RequestId("old")] = 890
    ends[1] = ["old"]
    passed_by: list[float] = []
    gone_s: int | None = None
    for second in range(300 // 2):
        for name in ends.pop(second, []):
            pool.end(name)
        for index in (2 * second, 2 * second + 1):
            policy.push(sized(f"{second}-{index}", 10 * sizes[index], arrived_s=second), now=second)
        for name in drain(policy, pool, now=float(second)):
            ends.setdefault(second + runs_s, []).append(name)
            if name == "large":
                gone_s = second
            elif gone_s is None:
                passed_by.append(float(name.split("-")[0]))
        if gone_s is not None:
            break
    patience_s = 8.0 * large
    if gone_s is None:
        assert patience_s + 1.0 + runs_s >= 150
    else:
        assert gone_s <= patience_s + 1.0 + runs_s + 1
    assert all(arrived_s <= patience_s + 1.0 for arrived_s in passed_by)


def test_who_may_end_in_time_is_not_refused_for_an_uncertain_length() -> None:
    """300 tokens at 0.1 s each are expected; of the first, 2,000 are as likely as one."""
    policy = adaptive()
    policy.learn(replace(COSTS, step_s=0.1))
    pool = Pool(stop=Fit.BATCH_SLOTS)
    policy.push(request("a", context=2, output=300, output_q90=2000, deadline_s=10.0), now=0.0)
    assert policy.take(pool, now=0.0) is None
    policy.push(request("b", context=2, output=300, output_q90=310, deadline_s=10.0), now=0.0)
    assert policy.take(pool, now=0.0) == Refused(RequestId("b"), RejectReason.DEADLINE_UNREACHABLE)


# --- likely and lost -----------------------------------------------------------------------------


def test_who_is_not_likely_to_end_in_time_goes_behind_all_that_are() -> None:
    """Alone `lost` takes 0.2 s + 8 s if it is as long as nine of ten, and has 5 s left."""
    policy = adaptive(config=replace(SHAPE, refuses_late=False))
    policy.learn(replace(COSTS, step_s=1.0))
    policy.push(
        request("lost", context=2, output=2, output_q90=9, output_max=9, deadline_s=5.0), now=0.0
    )
    policy.push(request("free", context=40, output=2, arrived_s=1.0), now=1.0)
    policy.push(
        request("fine", context=2, output=2, output_q90=3, output_max=9, deadline_s=9.0), now=1.0
    )
    assert drain(policy, Pool(), now=1.0) == ["fine", "free", "lost"]
    policy.check_integrity()


def test_requests_that_run_longer_than_alone_make_later_ones_less_likely() -> None:
    """A hundred of 1 s that took 4 s each: one of 1 s with 3 s left is behind one without hurry."""
    policy = adaptive(config=replace(SHAPE, refuses_late=False))
    policy.learn(replace(COSTS, step_s=1.0, prefill_token_s=0.0))
    now = 0.0
    for number in range(100):
        policy.push(request(f"r{number}", context=2, output=1), now=now)
        assert drain(policy, Pool(), now=now) == [f"r{number}"]
        policy.release(request(f"r{number}").attempt, now=now + 4.0)
        now += 4.0
    hurried = request("hurried", context=2, output=1, arrived_s=now, deadline_s=now + 3.0)
    policy.push(hurried, now=now)
    policy.push(request("plain", context=2, output=1, arrived_s=now), now=now)
    assert drain(policy, Pool(), now=now) == ["plain", "hurried"]
