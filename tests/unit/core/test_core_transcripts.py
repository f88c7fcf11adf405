"""Whole scenarios as text: what happened (>) and what was decided, for a reader to check."""

from collections.abc import Iterable
from textwrap import dedent
from typing import assert_never

from services.core import decisions as do
from services.core import events as on
from services.core.cluster import ClusterConfig, ClusterScheduler
from services.core.policies import build_policy
from services.core.replica import ReplicaConfig, ReplicaScheduler
from services.core.types import Attempt, RequestId, WorkerId
from tests.unit.core.core_world import GATEWAY, adapter, attempt, capacity, request


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
        case do.Dispatch(worker_id, subject, queue_s):
            return f"dispatch {tell(subject)} to {worker_id} after {queue_s:g} s"
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
    machine = ReplicaScheduler(ReplicaConfig(prefill_tokens_per_step=16), capacity(10))
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


def test_a_worker_goes_and_its_request_goes_on_elsewhere() -> None:
    cluster = ClusterScheduler(ClusterConfig(), build_policy("multilevel"))
    lines = []
    w, v = WorkerId("w"), WorkerId("v")

    def show(now: float, story: str, decisions: list[do.ClusterDecision]) -> None:
        cluster.check_integrity()
        lines.append(f"> {now:g} {story}")
        lines.extend(tell_cluster(decision) for decision in decisions)

    def after(now: float, story: str, event: on.ClusterEvent) -> None:
        show(now, story, cluster.handle(event, now=now))

    def attach(now: float, worker_id: WorkerId, *running: on.RunningRequest) -> None:
        event = on.WorkerAttached(worker_id, capacity(requests=1), running, (), draining=False)
        after(now, f"{worker_id} attached", event)

    after(0, "gateway attached", on.GatewayAttached(GATEWAY, ()))
    attach(0, w)
    after(1, "a submitted", on.RequestSubmitted(request("a", using=adapter("x"))))
    after(2, "b submitted", on.RequestSubmitted(request("b", using=adapter("y"))))
    after(3, "w detached", on.WorkerDetached(w))
    attach(4, v)
    show(8, "time passes", cluster.tick(now=8.0))
    again = request("a", number=2, using=adapter("x"), context=14)
    after(8, "a submitted again", on.RequestSubmitted(again))
    attach(9, w, on.RunningRequest(attempt("a"), GATEWAY, adapter("x").digest, 14, 6))
    after(9.1, "a.1 finished at w", on.RequestFinished(w, attempt("a"), 4))
    after(10, "a cancelled", on.RequestCancelled(attempt("a", 2), "client_cancelled"))
    matches(
        lines,
        """
        > 0 gateway attached
        > 0 w attached
        > 1 a submitted
        dispatch a.1 to w after 0 s
        > 2 b submitted
        hint w: y
        > 3 w detached
        > 4 v attached
        dispatch b.1 to v after 2 s
        > 8 time passes
        return a.1 from w
        > 8 a submitted again
        hint v: x
        > 9 w attached
        abort a.1 at w: superseded
        hint v: nothing
        > 9.1 a.1 finished at w
        dispatch a.2 to w after 1.1 s
        > 10 a cancelled
        abort a.2 at w: client_cancelled
        """,
    )
