"""Fair arrivals: shares by weight, a bound on what a noisy tenant costs others, no old grudges."""

import heapq
import math
import random
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.fairness import FairClock, FairConfig, Stamp
from services.core.types import TenantId

WEIGHTS = {"a": 1.0, "b": 1.0, "double": 2.0, "triple": 3.0}


def weight(tenant_id: TenantId) -> float:
    return WEIGHTS.get(tenant_id, 1.0)


@dataclass(frozen=True)
class Arrival:
    at_s: float
    tenant: str
    service_s: float


@dataclass
class Station:
    """Servers that take whoever has the smallest key: fair arrival + patience x service."""

    clock: FairClock
    servers: int = 1
    patience: float = 0.0
    queue: list[tuple[float, int, Arrival, Stamp]] = field(default_factory=list)
    starts: list[tuple[float, Arrival]] = field(default_factory=list)

    def run(self, arrivals: list[Arrival], until_s: float = math.inf) -> None:
        free = [0.0] * self.servers
        arrivals = sorted(arrivals, key=lambda each: each.at_s)
        index = 0
        while index < len(arrivals) or self.queue:
            at_s = max(free[0], arrivals[index].at_s if not self.queue else 0.0)
            while index < len(arrivals) and arrivals[index].at_s <= at_s:
                self._arrive(arrivals[index], index)
                index += 1
            if at_s > until_s:
                return
            _, _, arrival, stamp = heapq.heappop(self.queue)
            self.clock.leave(stamp, now=at_s)
            self.starts.append((at_s, arrival))
            heapq.heapreplace(free, at_s + arrival.service_s)

    def _arrive(self, arrival: Arrival, index: int) -> None:
        stamp = self.clock.arrive(TenantId(arrival.tenant), arrival.service_s, now=arrival.at_s)
        assert stamp.at_s >= arrival.at_s
        key = stamp.at_s + self.patience * arrival.service_s
        heapq.heappush(self.queue, (key, index, arrival, stamp))

    def served_s(self, from_s: float, to_s: float) -> dict[str, float]:
        served: dict[str, float] = defaultdict(float)
        for at_s, arrival in self.starts:
            if from_s <= at_s < to_s:
                served[arrival.tenant] += arrival.service_s
        return served

    def waits_s(self, *tenants: str) -> list[float]:
        return sorted(at - one.at_s for at, one in self.starts if one.tenant in tenants)


def poisson(
    tenant: str, load: float, until_s: float, *, seed: int, mean_s: float = 0.2
) -> list[Arrival]:
    """Requests of `mean_s` on the average that bring `load` seconds of service per second."""
    rng = random.Random(f"{tenant}{seed}")
    at_s = 0.0
    arrivals: list[Arrival] = []
    while (at_s := at_s + rng.expovariate(load / mean_s)) < until_s:
        arrivals.append(Arrival(at_s, tenant, mean_s * rng.uniform(0.5, 1.5)))
    return arrivals


def p99(values: list[float]) -> float:
    return values[int(0.99 * (len(values) - 1))]


@pytest.mark.parametrize("believed", [1, 3])
@pytest.mark.parametrize(("one", "other", "ratio"), [("a", "b", 1.0), ("a", "triple", 1 / 3)])
@pytest.mark.parametrize("patience", [0.0, 8.0])
def test_backlogged_tenants_are_served_in_the_ratio_of_their_weights(
    one: str, other: str, ratio: float, patience: float, believed: int
) -> None:
    station = Station(FairClock(weight), servers=3, patience=patience)
    station.clock.resize(believed)
    arrivals = poisson(one, 100.0, 100.0, seed=1) + poisson(other, 6.0, 100.0, seed=1)
    station.run(arrivals, until_s=100.0)
    served = station.served_s(1.0, 100.0)
    assert served[one] / served[other] == pytest.approx(ratio, rel=0.06)


class StrictStation(Station):
    """The best for everybody but the noisy tenant: it goes when nobody else waits."""

    def _arrive(self, arrival: Arrival, index: int) -> None:
        stamp = self.clock.arrive(TenantId(arrival.tenant), 0.0, now=arrival.at_s)
        key = arrival.at_s + (1e9 if arrival.tenant == "noisy" else 0.0)
        heapq.heappush(self.queue, (key, index, arrival, stamp))


@pytest.mark.parametrize("patience", [0.0, 8.0])
@pytest.mark.parametrize("believed", [1, 8, 12])
def test_a_noisy_tenant_at_100_times_its_share_costs_others_little_more_than_full_servers(
    believed: int, patience: float
) -> None:
    """Eight tenants at half of their shares of eight servers; a ninth comes with 100 times its."""
    quiet = [f"quiet{index}" for index in range(8)]
    arrivals = [each for name in quiet for each in poisson(name, 0.44, 80.0, seed=2)]
    arrivals += [
        Arrival(20.0 + each.at_s, each.tenant, each.service_s)
        for each in poisson("noisy", 88.0, 60.0, seed=2)
    ]
    best = StrictStation(FairClock(weight), servers=8)
    best.run(arrivals, until_s=80.0)
    station = Station(FairClock(weight), servers=8, patience=patience)
    station.clock.resize(believed)
    station.run(arrivals, until_s=80.0)
    mean_s = 0.2
    assert p99(station.waits_s(*quiet)) <= p99(best.waits_s(*quiet)) + mean_s
    # The servers are never idle for the sake of fairness.
    assert sum(station.served_s(25.0, 75.0).values()) == pytest.approx(8 * 50.0, rel=0.01)
    station.clock.check_integrity()


services_s = st.lists(st.floats(0.01, 2.0), min_size=20, max_size=40)


@given(one=services_s, other=services_s, weights=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_between_two_backlogged_tenants_the_gap_of_weighted_service_is_bounded(
    one: list[float], other: list[float], weights: tuple[float, float]
) -> None:
    by_name = dict(zip("ab", weights, strict=True))
    config = FairConfig()
    clock = FairClock(by_name.__getitem__, config)
    for name in "ab":  # both are known: none is alone
        clock.leave(clock.arrive(TenantId(name), 1.0, now=0.0), now=0.0)
    waiting = [
        (clock.arrive(TenantId(name), service_s, now=1.0), name, service_s)
        for name, each in (("a", one), ("b", other))
        for service_s in each
    ]
    left = {"a": len(one), "b": len(other)}
    served = {"a": 0.0, "b": 0.0}
    most_s = max(one + other)
    slack_s = config.slack_s * config.headroom / sum(weights)
    bound = most_s / weights[0] + most_s / weights[1] + slack_s
    for stamp, name, service_s in sorted(waiting, key=lambda each: each[0].at_s):
        if min(left.values()) == 0:
            break
        clock.leave(stamp, now=1.0)
        left[name] -= 1
        served[name] += service_s
        gap = abs(served["a"] / by_name["a"] - served["b"] / by_name["b"])
        assert gap <= bound * (1 + 1e-9)


def test_a_tenant_that_competes_with_nobody_keeps_its_arrivals() -> None:
    clock = FairClock(weight)
    stamps = [clock.arrive(TenantId("a"), 100.0, now=0.1 * index) for index in range(50)]
    assert [stamp.at_s for stamp in stamps] == [pytest.approx(0.1 * i) for i in range(50)]
    clock.check_integrity()


def test_a_tenant_within_its_share_keeps_its_arrivals_beside_a_flood() -> None:
    clock = FairClock(weight)
    clock.resize(4)
    quiet, flood = TenantId("a"), TenantId("b")
    clock.leave(clock.arrive(quiet, 1.0, now=0.0), now=0.0)
    clock.arrive(flood, 1.0, now=0.0)  # waits for ever
    for second in range(1, 50):
        pushed = [clock.arrive(flood, 1.0, now=float(second)) for _ in range(100)]
        stamp = clock.arrive(quiet, 0.9, now=float(second))
        assert stamp.at_s == second  # its share is 0.5 x 4 / 2: one second per second
        clock.leave(stamp, now=float(second))
        assert pushed[-1].at_s == pytest.approx(100 * second - 2, abs=2)
    clock.check_integrity()


def test_what_a_tenant_took_of_idle_capacity_is_not_held_against_it() -> None:
    clock = FairClock(weight)
    greedy, other = TenantId("a"), TenantId("b")
    clock.leave(clock.arrive(other, 1.0, now=0.0), now=0.0)
    stamps = [clock.arrive(greedy, 10.0, now=1.0) for _ in range(20)]
    assert stamps[-1].at_s > 100
    for stamp in stamps:
        clock.leave(stamp, now=2.0)
    assert clock.arrive(greedy, 10.0, now=3.0).at_s == 3.0  # nothing waited in between


def test_a_tenant_that_returns_while_others_wait_is_held_to_a_bounded_lead() -> None:
    clock = FairClock(weight, FairConfig(lead_max_s=30.0, slack_s=0.0))
    greedy, other = TenantId("a"), TenantId("b")
    clock.arrive(other, 1.0, now=0.0)  # is too large for now, say
    for stamp in [clock.arrive(greedy, 10.0, now=1.0) for _ in range(20)]:
        clock.leave(stamp, now=2.0)
    assert clock.arrive(greedy, 10.0, now=3.0).at_s == 33.0


def test_a_tenant_that_comes_back_stands_level_with_the_least_of_those_that_wait() -> None:
    clock = FairClock(weight)
    flood, back = TenantId("a"), TenantId("b")
    clock.leave(clock.arrive(back, 1.0, now=0.0), now=0.0)
    stamps = [clock.arrive(flood, 10.0, now=1.0) for _ in range(20)]
    for stamp in stamps[:15]:
        clock.leave(stamp, now=2.0)
    assert clock.arrive(back, 1.0, now=3.0).at_s == stamps[15].at_s > 3.0


def test_a_request_that_is_not_served_gives_its_turn_back() -> None:
    clock = FairClock(weight, FairConfig(slack_s=0.0))
    one, other = TenantId("a"), TenantId("b")
    clock.arrive(other, 1.0, now=0.0)
    clock.arrive(one, 1.0, now=0.0)
    cancelled = clock.arrive(one, 50.0, now=0.0)
    clock.leave(cancelled, now=0.0, is_served=False)
    assert clock.arrive(one, 1.0, now=0.0).at_s == cancelled.at_s


def test_made_up_tenants_do_not_fill_the_memory_and_are_forgotten_in_time() -> None:
    clock = FairClock(weight, FairConfig(tenants_max=50, memory_s=60.0))
    for index in range(1000):
        clock.leave(clock.arrive(TenantId(f"fake{index}"), 1.0, now=0.0), now=0.0)
        clock.check_integrity()
    late = [clock.arrive(TenantId("a"), 100.0, now=61.0 + index) for index in range(3)]
    assert [stamp.at_s for stamp in late] == [61.0, 62.0, 63.0]  # alone again


moves = st.tuples(
    st.sampled_from("abcd"), st.floats(0.0, 20.0), st.floats(0.0, 40.0), st.integers(0, 9)
)


@given(moves=st.lists(moves, max_size=60))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_stamps_are_never_early_and_keep_each_tenants_order(
    moves: list[tuple[str, float, float, int]],
) -> None:
    clock = FairClock(weight, FairConfig(memory_s=30.0, tenants_max=2))
    waiting: list[tuple[str, Stamp]] = []
    now = 0.0
    for name, service_s, pause_s, leaver in moves:
        now += pause_s if leaver == 9 else 0.0
        stamp = clock.arrive(TenantId(name), service_s, now=now)
        assert stamp.at_s >= now
        assert all(stamp.at_s >= each.at_s for other, each in waiting if other == name)
        waiting.append((name, stamp))
        if leaver < len(waiting):
            _, left = waiting.pop(leaver)
            clock.leave(left, now=now, is_served=leaver != 5)
        clock.check_integrity()
