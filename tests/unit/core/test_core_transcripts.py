"""Whole scenarios as text: what happened (>) and what was decided, for a reader to check."""

from collections.abc import Iterable
from dataclasses import replace
from textwrap import dedent
from typing import assert_never

from services.core import decisions as do
from services.core import events as on
from services.core.cluster import ClusterConfig, ClusterScheduler
from services.core.policies.adaptive import Adaptive, AdaptiveConfig
from services.core.replica import ReplicaConfig, ReplicaScheduler
from services.core.types import Attempt, Capacity, Request, RequestId, WorkerId
from tests.unit.core.core_world import GATEWAY, QUIET, adapter, attempt, capacity, request


def tell(subject: Attempt) -> str:
    return f"{subject.request_id}.{subject.number}"


def tell_replica(decision: do.ReplicaDecision) -> str:  # noqa: PLR0911 - one per decision
    match decision:
        case do.LoadAdapter(wanted):
            return f"load {wanted.digest}"
        case do.EvictAdapter(digest):
            return f"evict {digest}"
        case do.StartRequest(subject):
            return f"start {tell(subject)}"
        case do.PreemptRequest(subject):
            return f"preempt {tell(subject)}"
        case do.EndRequest(subject):
            return f"end {tell(subject)}"
        case do.FailRequest(subject, failure, _):
            return f"fail {tell(subject)} {failure}"
        case do.ExpireRequest(subject):
            return f"expire {tell(subject)}"
        case do.RunStep(work):
            parts = (f"{w.request_id}:{w.tokens}{'*' if w.samples else ''}" for w in work)
            return f"step {' '.join(parts)}"
        case _:
            assert_never(decision)


def tell_cluster(decision: do.ClusterDecision) -> str:
    match decision:
        case do.Dispatch(worker_id, subject, queue_s, _, waited_for):
            why = "at once" if not queue_s else f"after {queue_s:g} s for {waited_for}"
            return f"dispatch {tell(subject)} to {worker_id} {why}"
        case do.Reject(_, subject, reason, _):
            return f"reject {tell(subject)} {reason}"
        case do.Return(_, subject, worker_id):
            return f"return {tell(subject)} from {worker_id}"
        case do.Abort(worker_id, subject, cause):
            return f"abort {tell(subject)} at {worker_id}: {cause}"
        case do.Forget(subject):
            return f"forget {tell(subject)}"
        case do.Prefetch(worker_id, wanted):
            return f"hint {worker_id}: {' '.join(one.digest for one in wanted) or 'nothing'}"
        case _:
            assert_never(decision)


def matches(lines: Iterable[str], expected: str) -> None:
    assert "\n".join(lines) == dedent(expected).strip()


def test_a_cold_adapter_stalls_nobody() -> None:
    """Ten blocks of ten tokens; `*` marks the work that samples a token."""
    machine = ReplicaScheduler(
        ReplicaConfig(stepping="chunked", prefill_tokens_per_step=16), capacity(10)
    )
    lines = []

    def after(story: str, event: on.ReplicaEvent) -> None:
        decisions = machine.handle(event, now=0.0)
        machine.check_integrity()
        lines.append(f"> {story}")
        lines.extend(tell_replica(decision) for decision in decisions)

    def step(*sampled: str, ended: tuple[str, ...] = ()) -> None:
        names = tuple(RequestId(name) for name in sampled)
        ends = tuple(RequestId(name) for name in ended)
        story = f"stepped {' '.join(sampled)}".strip()
        after(f"{story}; ended {' '.join(ended)}" if ended else story, on.StepFinished(names, ends))

    cold = adapter("cold", blocks=3)
    asks_more = request("base", context=30, output=4, output_max=60)
    after("base: 30 tokens of prompt", on.RequestDispatched(asks_more))
    after(
        "tuned: cold adapter of 3 blocks",
        on.RequestDispatched(request("tuned", using=cold, context=8, output=2, output_max=20)),
    )
    step()
    after("cold is loaded", on.AdapterLoaded(cold.digest))
    step("base")
    step("base", "tuned")
    step("base", "tuned", ended=("tuned",))
    after(
        "late: 40 tokens, wants another adapter",
        on.RequestDispatched(
            request("late", using=adapter("other", blocks=1), context=40, output=5)
        ),
    )
    step("base", ended=("base",))
    after("other is loaded", on.AdapterLoaded(adapter("other").digest))
    after("late is cancelled", on.RequestAborted(attempt("late")))
    step()
    matches(
        lines,
        """
        > base: 30 tokens of prompt
        start base.1
        step base:16
        > tuned: cold adapter of 3 blocks
        load cold
        > stepped
        step base:14*
        > cold is loaded
        > stepped base
        start tuned.1
        step base:1* tuned:8*
        > stepped base tuned
        step base:1* tuned:1*
        > stepped base tuned; ended tuned
        end tuned.1
        step base:1*
        > late: 40 tokens, wants another adapter
        load other
        > stepped base; ended base
        end base.1
        > other is loaded
        start late.1
        step late:16
        > late is cancelled
        > stepped
        end late.1
        """,
    )


# Told in full, so that the stories don't depend on the defaults.
SHAPE = AdaptiveConfig(patience=8.0, decode_share=1.0, drain_s=1.0)


class Story:
    """A cluster under `adaptive`, told line by line."""

    def __init__(self, config: ClusterConfig) -> None:
        self.cluster = ClusterScheduler(config, Adaptive(SHAPE))
        self.lines: list[str] = []
        self.after(0, "gateway attached", on.GatewayAttached(GATEWAY, ()))

    def after(self, now: float, story: str, event: on.ClusterEvent) -> None:
        self._show(now, story, self.cluster.handle(event, now=now))

    def time_passes(self, now: float) -> None:
        self._show(now, "time passes", self.cluster.tick(now=now))

    def attach(
        self, now: float, worker_id: WorkerId, limits: Capacity, *running: on.RunningRequest
    ) -> None:
        event = on.WorkerAttached(worker_id, limits, running, (), draining=False)
        self.after(now, f"{worker_id} attached", event)

    def submit(self, now: float, story: str, new: Request) -> None:
        arrived = replace(new, arrived_s=now)
        self.after(now, f"{tell(new.attempt)}: {story}", on.RequestSubmitted(arrived))

    def finish(self, now: float, worker_id: WorkerId, name: str, number: int = 1) -> None:
        event = on.RequestFinished(worker_id, attempt(name, number), 1)
        self.after(now, f"{name}.{number} finished at {worker_id}", event)

    def _show(self, now: float, story: str, decisions: list[do.ClusterDecision]) -> None:
        self.cluster.check_integrity()
        self.lines.append(f"> {now:g} {story}")
        self.lines.extend(tell_cluster(decision) for decision in decisions)


W, V = WorkerId("w"), WorkerId("v")


def test_a_worker_goes_and_its_request_goes_on_elsewhere() -> None:
    story = Story(ClusterConfig())
    one_slot = capacity(requests=1)
    story.attach(0, W, one_slot)
    story.submit(1, "wants x", request("a", using=adapter("x")))
    story.submit(2, "wants y", request("b", using=adapter("y")))
    story.after(3, "w detached", on.WorkerDetached(W))
    story.attach(4, V, one_slot)
    story.time_passes(8)
    again = request("a", number=2, using=adapter("x"), context=14, prior=4)
    story.submit(8, "its next attempt, with 4 tokens of output", again)
    running = on.RunningRequest(attempt("a"), GATEWAY, adapter("x").digest, 14, 6)
    story.attach(9, W, one_slot, running)
    story.finish(9.1, W, "a")
    story.after(10, "a cancelled", on.RequestCancelled(attempt("a", 2), "client_cancelled"))
    matches(
        story.lines,
        """
        > 0 gateway attached
        > 0 w attached
        > 1 a.1: wants x
        dispatch a.1 to w at once
        > 2 b.1: wants y
        hint w: y
        > 3 w detached
        > 4 v attached
        dispatch b.1 to v after 2 s for no_worker
        > 8 time passes
        return a.1 from w
        > 8 a.2: its next attempt, with 4 tokens of output
        hint v: x
        > 9 w attached
        abort a.1 at w: superseded
        > 9.1 a.1 finished at w
        dispatch a.2 to w after 1.1 s for batch_slots
        hint v: nothing
        > 10 a cancelled
        abort a.2 at w: client_cancelled
        """,
    )


def test_small_requests_pass_a_large_one_until_it_is_due() -> None:
    """One slot. By what is believed the large one takes 1.14 s, a small one 0.05 s: they are due
    9.1 s and 0.4 s after they came.
    """
    story = Story(QUIET)
    story.attach(0, W, capacity(requests=1))
    story.submit(0, "runs", request("now"))
    story.submit(1, "large, due at 10.1", request("large", context=400, output=400))
    story.submit(2, "due at 2.4", request("small1"))
    story.submit(9.5, "due at 9.9", request("small2"))
    story.submit(10, "due at 10.4", request("small3"))
    for now, done in enumerate(("now", "small1", "small2", "large"), start=11):
        story.finish(now, W, done)
    matches(
        story.lines,
        """
        > 0 gateway attached
        > 0 w attached
        > 0 now.1: runs
        dispatch now.1 to w at once
        > 1 large.1: large, due at 10.1
        > 2 small1.1: due at 2.4
        > 9.5 small2.1: due at 9.9
        > 10 small3.1: due at 10.4
        > 11 now.1 finished at w
        dispatch small1.1 to w after 9 s for batch_slots
        > 12 small1.1 finished at w
        dispatch small2.1 to w after 2.5 s for batch_slots
        > 13 small2.1 finished at w
        dispatch large.1 to w after 12 s for batch_slots
        > 14 large.1 finished at w
        dispatch small3.1 to w after 4 s for batch_slots
        """,
    )


def test_a_request_that_lacks_memory_is_passed_for_a_second_and_then_waited_for() -> None:
    """Ten blocks of ten tokens."""
    story = Story(QUIET)
    story.attach(0, W, capacity(10))
    story.submit(0, "4 blocks", request("a", context=30, output=10))
    story.submit(0, "4 blocks", request("b", context=30, output=10))
    story.submit(1, "6 blocks", request("large", context=50, output=10))
    story.submit(1.2, "2 blocks: passes it", request("c", context=10, output=10))
    story.submit(1.3, "2 blocks: none left", request("d", context=10, output=10))
    story.finish(1.4, W, "c")
    story.submit(1.5, "2 blocks", request("e", context=10, output=10))
    story.finish(2.1, W, "d")
    story.finish(3, W, "a")
    story.finish(4, W, "b")
    matches(
        story.lines,
        """
        > 0 gateway attached
        > 0 w attached
        > 0 a.1: 4 blocks
        dispatch a.1 to w at once
        > 0 b.1: 4 blocks
        dispatch b.1 to w at once
        > 1 large.1: 6 blocks
        > 1.2 c.1: 2 blocks: passes it
        dispatch c.1 to w at once
        > 1.3 d.1: 2 blocks: none left
        > 1.4 c.1 finished at w
        dispatch d.1 to w after 0.1 s for memory
        > 1.5 e.1: 2 blocks
        > 2.1 d.1 finished at w
        > 3 a.1 finished at w
        dispatch large.1 to w after 2 s for memory
        > 4 b.1 finished at w
        dispatch e.1 to w after 2.5 s for memory
        """,
    )


def test_a_deadline_that_cannot_be_kept_is_refused_early_and_one_that_can_is_kept() -> None:
    """One slot; ten tokens of prompt and output take 0.302 s, as believed."""
    story = Story(QUIET)
    story.attach(0, W, capacity(requests=1))
    story.submit(0, "runs", request("now"))
    story.submit(0, "a quarter of a second is too little", request("rash", deadline_s=0.25))
    story.submit(1, "no deadline", request("calm"))
    story.submit(1.1, "deadline 1.5: due first", request("late", deadline_s=1.5))
    story.submit(1.1, "deadline 4", request("soon", deadline_s=4.0))
    story.time_passes(1.15)
    story.time_passes(1.2)
    story.finish(2, W, "now")
    story.finish(3, W, "calm")
    matches(
        story.lines,
        """
        > 0 gateway attached
        > 0 w attached
        > 0 now.1: runs
        dispatch now.1 to w at once
        > 0 rash.1: a quarter of a second is too little
        reject rash.1 DEADLINE_UNREACHABLE
        > 1 calm.1: no deadline
        > 1.1 late.1: deadline 1.5: due first
        > 1.1 soon.1: deadline 4
        > 1.15 time passes
        > 1.2 time passes
        reject late.1 DEADLINE_UNREACHABLE
        > 2 now.1 finished at w
        dispatch calm.1 to w after 1 s for batch_slots
        > 3 calm.1 finished at w
        dispatch soon.1 to w after 1.9 s for batch_slots
        """,
    )
