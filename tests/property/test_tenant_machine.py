"""Whatever tenants send and however it ends: nothing is lost, counted twice or passed in debt."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.core.tenant_gate import Refusal, TenantGate
from services.core.tenants import TenantLimits, Tenants
from services.core.types import Request, TenantId
from tests.unit.core.core_world import request

LIMITS = {
    "slots": TenantLimits(max_running=2, max_queued=3),
    "rate": TenantLimits(tokens_per_s=10, burst_tokens=40, max_queued=4),
    "both": TenantLimits(tokens_per_s=50, burst_tokens=1, max_running=1, max_queued=2, priority=5),
    "free": TenantLimits(),
}
DEFAULT = TenantLimits(tokens_per_s=20, max_running=3, max_queued=2)


class TenantMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        tenants = Tenants(DEFAULT, {TenantId(name): each for name, each in LIMITS.items()})
        self.gate = TenantGate(tenants, idle_max=2)
        self.now = 0.0
        self.count = 0
        self.held: dict[str, Request] = {}
        self.passed: dict[str, Request] = {}
        self.returned: list[Request] = []
        self.sent = self.left = self.refused = self.removed = 0

    def limits(self, tenant: str) -> TenantLimits:
        return LIMITS.get(tenant, DEFAULT)

    def running(self, tenant: str) -> int:
        return sum(each.tenant_id == tenant for each in self.passed.values())

    def note_passed(self, passed: Request) -> None:
        name = passed.attempt.request_id
        assert name not in self.passed
        self.passed[name] = passed

    def collect(self) -> None:
        for passed in self.gate.due(now=self.now):
            assert passed.arrived_s == self.now
            del self.held[passed.attempt.request_id]
            most = self.limits(passed.tenant_id).max_running
            assert most is None or self.running(passed.tenant_id) < most
            self.note_passed(passed)
        assert self.gate.due(now=self.now) == []

    @rule(
        tenant=st.sampled_from((*LIMITS, "x", "y", "z", "u")),
        context=st.integers(1, 200),
        predicted=st.integers(1, 100),
        priority=st.integers(-1, 1),
    )
    def send(self, tenant: str, context: int, predicted: int, priority: int) -> None:
        self.count += 1
        new = request(
            f"r{self.count}",
            tenant=tenant,
            context=context,
            output=predicted,
            output_max=200,
            priority=priority,
            arrived_s=self.now,
        )
        self.sent += 1
        limits = self.limits(tenant)
        mine = [each for each in self.held.values() if each.tenant_id == tenant]
        shown = {each.tenant_id: each for each in self.gate.snapshots(now=self.now)}
        answer = self.gate.offer(new, now=self.now)
        if isinstance(answer, Request):
            assert not mine
            assert tenant not in shown or shown[new.tenant_id].available_tokens > -1e-6
            assert limits.max_running is None or self.running(tenant) < limits.max_running
            assert answer.priority == priority + limits.priority
            self.note_passed(answer)
        elif isinstance(answer, Refusal):
            assert len(mine) == limits.max_queued
            assert answer.retry_after_s is None or answer.retry_after_s > 0
            self.refused += 1
        else:
            assert len(mine) < limits.max_queued
            self.held[new.attempt.request_id] = new

    @precondition(lambda self: self.passed)
    @rule(data=st.data(), output=st.none() | st.integers(0, 200))
    def end(self, data: st.DataObject, output: int | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.passed)))
        done = self.passed.pop(name)
        total = None if output is None else output + done.prior_output_tokens
        self.gate.leave(done.attempt, total, now=self.now)
        self.gate.leave(done.attempt, total, now=self.now)  # said twice, counted once
        self.left += 1
        self.collect()

    @precondition(lambda self: self.passed)
    @rule(data=st.data(), emitted=st.integers(0, 50), is_lost=st.booleans())
    def interrupt(self, data: st.DataObject, emitted: int, is_lost: bool) -> None:  # noqa: FBT001
        """Its worker is lost, or it was squashed; its gateway submits it again, now or later."""
        name = data.draw(st.sampled_from(sorted(self.passed)))
        old = self.passed.pop(name)
        total = 0 if is_lost else old.prior_output_tokens + emitted
        self.gate.leave(old.attempt, total, now=self.now)
        self.returned.append(
            request(
                name,
                tenant=old.tenant_id,
                number=old.attempt.number + 1,
                context=old.context_tokens + emitted,
                prior=old.prior_output_tokens + emitted,
                output=old.predicted_output_tokens,
                output_max=old.max_output_tokens,
            )
        )
        self.collect()

    @precondition(lambda self: self.returned)
    @rule()
    def resubmit(self) -> None:
        answer = self.gate.offer(self.returned.pop(), now=self.now)
        assert isinstance(answer, Request)
        self.note_passed(answer)
        self.collect()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def cancel_held(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        assert self.gate.remove(self.held.pop(name).attempt.request_id).attempt.request_id == name
        self.removed += 1
        self.collect()

    @rule(pause_s=st.floats(0.001, 30.0))
    def wait(self, pause_s: float) -> None:
        self.now += pause_s
        self.collect()

    @rule()
    def wait_for_the_deadline(self) -> None:
        """What is due is done then: no deadline stays in the past."""
        due_s = self.gate.next_deadline()
        if due_s is None:
            return
        assert due_s > self.now
        self.now = due_s
        self.collect()
        later_s = self.gate.next_deadline()
        assert later_s is None or later_s > due_s

    @invariant()
    def nothing_is_lost_or_counted_twice(self) -> None:
        self.gate.check_integrity()
        gone = self.left + self.refused + self.removed
        assert self.sent == len(self.held) + len(self.passed) + len(self.returned) + gone
        assert {held.attempt.request_id for held in self.gate.held()} == set(self.held)
        assert len(self.gate) == len(self.held)
        running = Counter(each.tenant_id for each in self.passed.values())
        for shown in self.gate.snapshots(now=self.now):
            assert shown.running == running[shown.tenant_id]

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        for name in {each.tenant_id for each in self.held.values()}:
            limits = self.limits(name)
            is_full = limits.max_running is not None and self.running(name) >= limits.max_running
            assert is_full or self.gate.next_deadline() is not None

    def teardown(self) -> None:
        """Everything ends, and everybody who waits passes in time."""
        self.returned.clear()
        for _ in range(10_000):
            for done in self.passed.values():
                self.gate.leave(done.attempt, done.prior_output_tokens + 1, now=self.now)
            self.passed.clear()
            self.collect()
            if not self.held and not self.passed:
                return
            due_s = self.gate.next_deadline()
            if due_s is not None:
                self.now = max(self.now, due_s)
                self.collect()
        raise AssertionError(f"{len(self.held)} requests never passed")


TestTenantMachine = TenantMachine.TestCase
TestTenantMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True
)
