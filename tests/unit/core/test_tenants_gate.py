"""A tenant gets what its quotas allow: exactly, over a minute, whatever was predicted."""

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from services.core.tenant_gate import Held, Refusal, TenantGate
from services.core.tenants import TenantLimits, Tenants
from services.core.types import Attempt, Request, TenantId
from tests.unit.core.core_world import attempt, request


def gate(limits: TenantLimits, **named: TenantLimits) -> TenantGate:
    return TenantGate(Tenants(limits, {TenantId(name): one for name, one in named.items()}))


@dataclass
class Server:
    """Runs whatever passes, each token in 10 ms, and keeps count."""

    gate: TenantGate
    now: float = 0.0
    ends: list[tuple[float, int, Attempt, int]] = field(default_factory=list)
    true_output: dict[str, int] = field(default_factory=dict)
    passed_tokens: list[tuple[float, int]] = field(default_factory=list)
    ended_tokens: list[tuple[float, int]] = field(default_factory=list)

    def offer(self, new: Request, *, output: int) -> None:
        self.true_output[new.attempt.request_id] = output
        passed = self.gate.offer(new, now=self.now)
        if isinstance(passed, Request):
            self._run(passed)

    def run_until(self, until_s: float) -> None:
        while True:
            due_s = self.gate.next_deadline()
            end_s = self.ends[0][0] if self.ends else math.inf
            next_s = min(end_s, math.inf if due_s is None else max(due_s, self.now))
            if next_s > until_s:
                break
            self.now = next_s
            if end_s <= next_s:
                _, _, ended, tokens = heapq.heappop(self.ends)
                self.ended_tokens.append((self.now, tokens))
                output = self.true_output[ended.request_id]
                self.gate.leave(ended, output, now=self.now)
            for passed in self.gate.due(now=self.now):
                self._run(passed)
        self.now = until_s

    def _run(self, passed: Request) -> None:
        output = self.true_output[passed.attempt.request_id]
        tokens = passed.context_tokens + output
        self.passed_tokens.append((self.now, tokens))
        end = (self.now + 0.01 * output, len(self.passed_tokens), passed.attempt, tokens)
        heapq.heappush(self.ends, end)


def tokens_between(entries: list[tuple[float, int]], from_s: float, to_s: float) -> int:
    return sum(tokens for at_s, tokens in entries if from_s <= at_s < to_s)


Predict = Callable[[random.Random, int], int]
PREDICTIONS: dict[str, Predict] = {
    "right": lambda _, true: true,
    "always one": lambda _, true: 1,
    "ten times too long": lambda _, true: 10 * true,
    "a third": lambda _, true: max(1, true // 3),
    "random": lambda rng, true: rng.randint(1, 400),
    "the wrong way round": lambda _, true: 401 - true,
}


@pytest.mark.parametrize("burst", [1, None])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_rate_of_true_tokens_is_exact_to_1_percent_over_a_minute(
    prediction: str, burst: float | None
) -> None:
    rng = random.Random(7)
    rate = 20_000.0
    server = Server(gate(TenantLimits(tokens_per_s=rate, burst_tokens=burst, max_queued=100_000)))
    for index in range(12_000):
        output = rng.randint(1, 400)
        predicted = PREDICTIONS[prediction](rng, output)
        context = rng.choice((5, 50, 800))
        new = request(f"r{index}", context=context, output=predicted, output_max=4000)
        server.offer(new, output=output)
    server.run_until(240.0)
    assert len(server.gate) > 0
    server.gate.check_integrity()
    for from_s in (60.0, 97.0, 160.0):
        minute = tokens_between(server.ended_tokens, from_s, from_s + 60.0)
        assert minute == pytest.approx(60 * rate, rel=0.01)
    if prediction == "right":
        passed = tokens_between(server.passed_tokens, 0.0, 240.0)
        assert passed <= rate * 240 + (burst or 10 * rate) + 1200  # one request over


def test_a_rested_tenant_may_take_its_burst_and_one_request_more() -> None:
    server = Server(gate(TenantLimits(tokens_per_s=100, burst_tokens=500)))
    for index in range(20):
        server.offer(request(f"r{index}", context=90, output=10), output=10)
    assert tokens_between(server.passed_tokens, 0, 1) == 600
    server.run_until(1000.0)
    assert tokens_between(server.passed_tokens, 0, 14) == 600 + 1400 - 100
    for index in range(20):
        server.offer(request(f"s{index}", context=90, output=10), output=10)
    assert tokens_between(server.passed_tokens, 1000, 1001) == 600


def test_nobody_passes_while_the_bucket_is_in_debt() -> None:
    server = Server(gate(TenantLimits(tokens_per_s=100, burst_tokens=1)))
    server.offer(request("large", context=5000, output=1), output=1)
    server.offer(request("small", context=1, output=1), output=1)
    server.run_until(49.9)
    assert len(server.gate) == 1
    server.run_until(50.1)
    assert len(server.gate) == 0


def test_no_more_requests_run_than_may() -> None:
    one = gate(TenantLimits(max_running=2))
    new = [request(name) for name in "abcd"]
    assert [isinstance(one.offer(each, now=0.0), Request) for each in new] == [
        True,
        True,
        False,
        False,
    ]
    assert one.due(now=5.0) == []
    assert one.next_deadline() is None
    one.leave(attempt("b"), 10, now=6.0)
    assert [each.attempt for each in one.due(now=6.0)] == [attempt("c")]
    one.leave(attempt("a"), None, now=7.0)
    assert [each.attempt for each in one.due(now=7.0)] == [attempt("d")]
    one.check_integrity()


def test_one_tenants_wait_holds_up_nobody_else() -> None:
    one = gate(TenantLimits(max_running=1))
    assert isinstance(one.offer(request("a", tenant="x"), now=0.0), Request)
    assert isinstance(one.offer(request("b", tenant="x"), now=0.0), Held)
    assert isinstance(one.offer(request("c", tenant="y"), now=0.0), Request)


def test_a_request_beyond_the_places_is_told_when_the_bucket_lets_one_pass() -> None:
    one = gate(TenantLimits(tokens_per_s=100, burst_tokens=1, max_queued=2))
    assert isinstance(one.offer(request("a", context=290, output=11), now=10.0), Request)
    assert isinstance(one.offer(request("b"), now=10.0), Held)
    assert isinstance(one.offer(request("c"), now=10.0), Held)
    refusal = one.offer(request("d"), now=10.5)
    assert isinstance(refusal, Refusal)
    assert refusal.retry_after_s == pytest.approx(2.5)
    assert one.next_deadline() == pytest.approx(13.0)
    later_s = 10.5 + (refusal.retry_after_s or 0.0)
    assert len(one.due(now=later_s)) == 1
    assert isinstance(one.offer(request("d"), now=later_s), Held)
    one.check_integrity()


def test_a_tenant_without_places_is_refused_at_once() -> None:
    one = gate(TenantLimits(max_running=1, max_queued=0))
    assert isinstance(one.offer(request("a"), now=0.0), Request)
    assert one.offer(request("b"), now=0.0) == Refusal(None)
    one.check_integrity()


def test_a_request_that_did_not_run_costs_nothing() -> None:
    one = gate(TenantLimits(tokens_per_s=10, burst_tokens=100))
    one.offer(request("a", context=100, output=50), now=0.0)
    one.leave(attempt("a"), None, now=0.0)
    assert [*one.snapshots(now=0.0)] == []
    assert isinstance(one.offer(request("b", context=100, output=1), now=0.0), Request)


def test_a_later_attempt_passes_at_once_and_pays_for_the_rest_of_the_output_only() -> None:
    one = gate(TenantLimits(tokens_per_s=100, burst_tokens=1000, max_running=1))
    one.offer(request("a", context=600, output=100), now=0.0)
    one.leave(attempt("a"), 40, now=0.0)  # squashed with 40 tokens out
    again = request("a", number=2, context=640, prior=40, output=100)
    one.offer(request("b"), now=0.0)
    assert isinstance(one.offer(again, now=0.0), Request)
    one.leave(again.attempt, 100, now=0.0)
    (shown,) = one.snapshots(now=0.0)
    assert shown.tokens_per_s == pytest.approx(700 / 60)
    one.leave(attempt("b"), None, now=0.0)
    (shown,) = one.snapshots(now=0.0)
    assert shown.available_tokens == pytest.approx(300)


def test_while_resubmitted_requests_are_more_than_may_run_no_other_passes() -> None:
    one = gate(TenantLimits(max_running=1))
    one.offer(request("a"), now=0.0)
    one.leave(attempt("a"), 0, now=0.0)
    one.offer(request("b"), now=0.0)
    one.offer(request("c"), now=0.0)
    one.offer(request("a", number=2), now=0.0)
    one.leave(attempt("b"), 10, now=1.0)
    assert one.due(now=1.0) == []
    one.leave(attempt("a", 2), 10, now=2.0)
    assert [each.attempt for each in one.due(now=2.0)] == [attempt("c")]


def test_an_attempt_that_never_passed_here_may_leave() -> None:
    one = gate(TenantLimits(max_running=1))
    one.leave(attempt("adopted"), 10, now=0.0)
    one.check_integrity()


def test_held_requests_go_by_priority_then_arrival_and_arrive_when_they_pass() -> None:
    one = gate(TenantLimits(max_running=1, priority=50))
    for name, priority in (("a", 0), ("b", 0), ("c", 0), ("d", 3)):
        one.offer(request(name, priority=priority, arrived_s=1.0), now=1.0)
    order: list[Request] = []
    for index, name in enumerate("adb"):
        one.leave(attempt(name), 1, now=2.0 + index)
        order += one.due(now=2.0 + index)
    assert [(r.attempt.request_id, r.priority, r.arrived_s) for r in order] == [
        ("d", 53, 2.0),
        ("b", 50, 3.0),
        ("c", 50, 4.0),
    ]


def test_a_held_request_can_be_removed() -> None:
    one = gate(TenantLimits(max_running=1))
    one.offer(request("a"), now=0.0)
    one.offer(request("b"), now=0.0)
    assert attempt("b").request_id in one
    assert [held.attempt for held in one.held()] == [attempt("b")]
    assert one.remove(attempt("b").request_id).attempt == attempt("b")
    one.leave(attempt("a"), 10, now=1.0)
    assert one.due(now=1.0) == []
    one.check_integrity()


def test_a_gate_without_limits_passes_everything_as_it_is_and_keeps_nothing() -> None:
    one = gate(TenantLimits(weight=3.0, max_queued=1))
    new = [request(f"r{index}", tenant=f"t{index}") for index in range(100)]
    assert all(one.offer(each, now=0.0) is each for each in new)
    assert [*one.snapshots(now=0.0)] == []


def test_made_up_tenants_do_not_fill_the_memory() -> None:
    tenants = Tenants(
        TenantLimits(tokens_per_s=10), {TenantId("known"): TenantLimits(tokens_per_s=1)}
    )
    one = TenantGate(tenants, idle_max=50)
    one.offer(request("k", tenant="known", context=500), now=0.0)
    one.leave(attempt("k"), 10, now=0.0)
    for index in range(1000):
        new = request(f"r{index}", tenant=f"fake{index}")
        one.offer(new, now=1.0)
        one.leave(new.attempt, 10, now=1.0)
    one.check_integrity()
    shown = {tenant.tenant_id for tenant in one.snapshots(now=1.0)}
    assert len(shown) == 51
    assert "known" in shown


def test_the_snapshot_tells_the_rate_of_the_last_minute() -> None:
    one = gate(TenantLimits(tokens_per_s=1000))
    for second in range(200):
        new = request(f"r{second}", context=50, output=10)
        one.offer(new, now=float(second))
        one.leave(new.attempt, 10, now=float(second))
    (shown,) = one.snapshots(now=199.9)
    assert shown.tokens_per_s == pytest.approx(60.0)
    assert [*one.snapshots(now=270.0)] == []


@pytest.mark.parametrize(
    ("field_name", "value"),
    [
        ("weight", 0.0),
        ("weight", -1.0),
        ("weight", math.nan),
        ("weight", math.inf),
        ("tokens_per_s", 0.0),
        ("tokens_per_s", math.nan),
        ("burst_tokens", 0.5),
        ("burst_tokens", math.inf),
        ("max_running", 0),
        ("max_queued", -1),
        ("priority", 1001),
    ],
)
def test_a_limit_that_cannot_be_is_refused_by_its_name(field_name: str, value: float) -> None:
    given = {"tokens_per_s": 10.0} | {field_name: value}
    with pytest.raises(ValueError, match=rf"^{field_name}: must be .* to .*, not"):
        TenantLimits(**given)  # type: ignore[arg-type]


def test_a_burst_without_a_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="burst_tokens: needs tokens_per_s"):
        TenantLimits(burst_tokens=10)


def test_a_default_burst_is_ten_seconds_of_the_rate() -> None:
    assert TenantLimits(tokens_per_s=30).burst == 300
    assert replace(TenantLimits(tokens_per_s=30), burst_tokens=7).burst == 7
