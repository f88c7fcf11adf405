"""Chameleon's batch formation: Algorithm 1, bypass and squash, on one worker."""

from dataclasses import replace

import pytest

from services.core.policies.chameleon_sizing import ChameleonConfig
from services.core.queues import PoolSize
from services.core.snapshots import WaitCause
from services.core.types import Attempt, RequestId
from tests.unit.core.chameleon_world import (
    FREE,
    HALF_SECOND_STEPS,
    TOKEN_BYTES,
    TWO_QUEUES,
    OneWorker,
    adapter,
    large,
    quotas,
    request,
    small,
    two_queues,
)

ONE_QUEUE = ChameleonConfig(squash_fraction=1.0)


def names(lines: list[str]) -> list[str]:
    return [line.split()[1] for line in lines]


def held(world: OneWorker, name: str) -> WaitCause | None:
    return world.policy.held_by(RequestId(name), now=world.now)


# --- queues ---


def test_before_the_first_refresh_there_is_one_queue_with_all_tokens() -> None:
    world = OneWorker(ONE_QUEUE, 1000)
    world.push(large("l"))
    world.push(small("s"))
    assert quotas(world) == [("queue-0", 1000, 0)]
    assert names(world.take()) == ["l", "s"]
    assert quotas(world) == [("queue-0", 1000, 400)]


def test_the_first_refresh_cuts_queues_between_the_sizes_seen() -> None:
    world = two_queues()
    assert quotas(world) == [("queue-0", 400, 0), ("queue-1", 600, 0)]
    limits = [one.size_limit for one in world.policy.queues(now=0.0)]
    # no adapter: 1/16; (0.4 * 90/1000 + 0.006) / 16 = 0.002625 and 0.007625
    assert limits == [pytest.approx(0.005125), None]
    world.push(large("l"))
    world.push(small("s"))
    assert [world.policy.queue_of(RequestId(name)) for name in "sl"] == ["queue-0", "queue-1"]
    assert names(world.take()) == ["s", "l"]


def test_the_next_refresh_comes_with_time_and_moves_the_queued_in_order_of_arrival() -> None:
    world = two_queues(tokens=600)
    world.now = 1.0
    for name in ("l1", "l2", "l3", "l4"):
        world.push(large(name, at=1.0))
    world.push(small("s1", at=1.0))
    assert names(world.take()) == ["s1", "l1"]
    assert world.policy.next_deadline(now=1.0) == 61.0  # who waits since 1 s is then overdue
    world.policy.learn(FREE)
    world.finish("s1")
    for number in range(30):
        world.push(request(f"h{number}", context=900, at=2.0))
    world.now = 301.0
    world.slots = 1
    assert world.take() == []
    assert [world.policy.queue_of(RequestId(name)) for name in ("l2", "h0")] == [
        "queue-0",
        "queue-1",
    ]
    assert [one.used_tokens for one in world.policy.queues(now=301.0)] == [300, 0]
    assert [one.attempt.request_id for one in world.policy.upcoming()][:4] == [
        "l2",
        "h0",
        "l3",
        "h1",
    ]


def test_a_level_of_priority_counts_as_having_come_earlier() -> None:
    world = OneWorker(ONE_QUEUE, 300)
    world.now = 40.0
    for name, at, priority in (("old", 0.0, 0), ("new", 40.0, 0), ("urgent", 40.0, 1)):
        world.push(small(name, at=at, priority=priority))
    assert names(world.take()) == ["old", "urgent", "new"]


# --- Algorithm 1 ---


def test_an_empty_queue_lends_and_is_paid_back() -> None:
    world = two_queues()
    for number in range(9):
        world.push(small(f"s{number}"))
    world.push(large("l0"))
    world.policy.remove(RequestId("l0"))  # queue-1 is empty: it lends 600
    assert names(world.take()) == [f"s{number}" for number in range(9)]
    assert quotas(world) == [("queue-0", 400, 900), ("queue-1", 600, 0)]
    world.push(large("l1"))
    assert (world.take(), held(world, "l1")) == ([], "quota")  # 100 of its 600 are there
    world.finish("s0")
    world.finish("s1")
    assert world.take() == []  # queue-0 has 200 again and lends them, which is not enough
    world.finish("s7")
    world.finish("s8")
    assert world.take() == ["take l1 from queue-1, waited for quota"]


def test_a_queue_that_waits_keeps_its_remainder() -> None:
    world = two_queues()
    for number in range(3):
        world.push(large(f"l{number}"))
        world.push(small(f"s{number}"))
    for number in range(3, 6):
        world.push(small(f"s{number}"))
    # 4 small and 2 large within quota; s4 would borrow, but queue-1 is not empty
    assert names(world.take()) == ["s0", "s1", "s2", "s3", "l0", "l1"]
    assert (held(world, "s4"), held(world, "s5"), held(world, "l2")) == ("quota", "order", "quota")


def test_lent_tokens_go_to_the_smallest_queue_first() -> None:
    config = replace(TWO_QUEUES, k_max=3, weights=(1.0, 1.0, 1.0), first_refresh_requests=3)
    world = OneWorker(config, 1400, slots=0)
    world.policy.learn(FREE)
    for name, context in (("s", 90), ("m", 290), ("h", 690)):
        world.push(request(name, context=context))
    world.take()  # quotas: 100, 300 and 700 and 100 each of the rest
    assert [quota for _, quota, _ in quotas(world)] == [200, 400, 800]
    world.policy.remove(RequestId("h"))
    for name, context in (("s1", 90), ("s2", 90), ("s3", 90), ("m1", 290), ("m2", 290)):
        world.push(request(name, context=context))
    world.slots = 1000
    # own quotas: s s1 | m; queue-2 lends 800: s2 s3, and with 600 left m1 m2
    assert names(world.take()) == ["s", "s1", "m", "s2", "s3", "m1", "m2"]
    assert [used for _, _, used in quotas(world)] == [400, 900, 0]


def test_a_request_above_the_whole_quota_goes_when_all_of_it_is_there() -> None:
    world = two_queues()
    world.push(small("s"))
    world.push(large("l"))
    assert names(world.take()) == ["s", "l"]
    world.push(request("huge", context=690))
    world.push(small("s2"))  # so that queue-0 lends nothing
    world.slots = 2
    assert world.take() == []
    assert held(world, "huge") == "quota"
    world.slots = 3
    world.finish("l")
    world.tokens = 1100
    assert names(world.take()) == ["s2", "huge"]


def test_when_nothing_runs_the_first_goes_whatever_its_quota() -> None:
    world = OneWorker(ONE_QUEUE, 500)
    world.policy.resize(PoolSize(50, TOKEN_BYTES, 1, 8))
    world.push(small("s1"))
    world.push(small("s2"))
    assert names(world.take()) == ["s1"]
    world.finish("s1")
    assert names(world.take()) == ["s2"]


def test_an_adapter_is_charged_to_the_first_of_its_users() -> None:
    world = OneWorker(ONE_QUEUE, 1000)
    lora = adapter("a", 128)
    world.push(request("1", using=lora))
    world.push(request("2", using=lora))
    world.take()
    assert quotas(world) == [("queue-0", 1000, 328)]
    world.finish("1")
    assert quotas(world) == [("queue-0", 1000, 228)]
    world.finish("2")
    assert quotas(world) == [("queue-0", 1000, 0)]


def test_full_workers_are_asked_once() -> None:
    world = two_queues()
    world.slots = 0
    world.push(small("s"))
    world.push(large("l"))
    world.asked.clear()
    assert world.take() == []
    assert world.asked == ["s"]
    world.slots = 2
    assert world.take() == [
        "take s from queue-0, waited for batch_slots",
        "take l from queue-1, waited for nothing",
    ]


def test_nobody_is_asked_again_until_something_changes() -> None:
    world = two_queues()
    world.slots = 0
    world.push(small("s"))
    assert world.take() == []
    world.asked.clear()
    assert world.policy.take(world, now=1.0) is None
    assert world.asked == []
    for change in (
        lambda: world.push(small("s2")),
        lambda: world.policy.remove(RequestId("s2")),
        lambda: world.policy.learn(FREE),
        lambda: world.policy.resize(PoolSize(900, TOKEN_BYTES, 1, 8)),
    ):
        change()
        world.policy.take(world, now=1.0)
        world.policy.take(world, now=1.0)
    assert world.asked == ["s"] * 4
    assert world.policy.take(world, now=60.0) is None  # it is overdue now
    assert world.asked == ["s"] * 5


# --- bypass and squash ---


def blocked(config: ChameleonConfig = ONE_QUEUE) -> OneWorker:
    """R1 needs 900 of 1000 tokens; a request that the policy does not know has 500 until 20 s."""
    world = OneWorker(config, 1000)
    world.policy.learn(HALF_SECOND_STEPS)
    world.running[Attempt(RequestId("adopted"))] = (request("adopted", context=490), 20.0)
    world.push(request("R1", context=890))
    return world


def test_a_younger_request_passes_if_it_ends_before_the_first_could_start() -> None:
    world = blocked()
    world.push(request("slow", output=40))  # 20.5 s
    world.push(request("wide", context=600))
    world.push(request("quick", output=20))  # 10.5 s
    assert world.take() == ["take quick from queue-0, waited for nothing"]
    assert (held(world, "R1"), held(world, "slow")) == (None, "order")


def test_the_load_of_an_adapter_counts_unless_it_is_near() -> None:
    world = blocked()
    world.policy.learn(replace(HALF_SECOND_STEPS, load_byte_s=15.0 / 20_000))
    far = request("r2", using=adapter("a", 20))  # 5.5 s and 15 s
    world.push(far)
    assert world.take() == []
    world.near.add(adapter("a", 20).digest)
    assert names(world.take()) == ["r2"]


@pytest.mark.parametrize("change", [{"bypass": False}, {"bypass_scan": 0}])
def test_bypass_can_be_turned_off(change: dict[str, bool | int]) -> None:
    world = blocked(replace(ONE_QUEUE, **change))  # type: ignore[arg-type]
    world.push(request("r2"))
    assert world.take() == []


def test_who_passed_is_squashed_when_its_memory_completes_what_the_first_needs() -> None:
    world = blocked()
    story: list[str] = []

    def then(what: str) -> None:
        story.extend((f"> {what}", *world.take()))

    world.push(request("R2", context=190, at=0.5))
    then("R2 comes; R1 waits for 900, 500 are free")
    world.now = 1.0
    then("nothing happens: stopping R2 would only undo the bypass")
    world.now = 2.0
    world.finish("adopted")
    then("the adopted one ends early: 800 free, 200 with R2")
    world.push(request("R3", context=10, at=2.0))
    then("R3 comes; R1's memory is on its way, so nobody passes")
    world.finish("R2")
    world.push(request("R2", number=2, context=195, prior=5, at=0.5))
    then("R2 has stopped and comes back")
    world.now = 9.0
    world.finish("R1")
    then("R1 ends")
    assert story == [
        "> R2 comes; R1 waits for 900, 500 are free",
        "take R2 from queue-0, waited for nothing",
        "> nothing happens: stopping R2 would only undo the bypass",
        "> the adopted one ends early: 800 free, 200 with R2",
        "squash R2.1",
        "> R3 comes; R1's memory is on its way, so nobody passes",
        "> R2 has stopped and comes back",
        "take R1 from queue-0, waited for memory",
        "> R1 ends",
        "take R2 from queue-0, waited for quota",
        "take R3 from queue-0, waited for order",
    ]


def test_no_request_is_squashed_twice() -> None:
    world = blocked()
    world.push(request("R2", number=2, context=190))
    assert names(world.take()) == ["R2"]
    world.finish("adopted")
    assert world.take() == []


def test_at_most_the_given_share_of_the_requests_is_squashed() -> None:
    world = blocked(replace(ONE_QUEUE, squash_fraction=0.05))
    for number in range(18):
        world.push(request(f"filler{number}"))
        assert names(world.take()) == [f"filler{number}"]
        world.finish(f"filler{number}")
    world.push(request("R2", context=190))
    assert names(world.take()) == ["R2"]  # the 19th
    world.finish("adopted")
    assert world.take() == []
    world.push(request("R3"))
    assert world.take() == ["take R3 from queue-0, waited for nothing", "squash R2.1"]


# --- limits ---


def test_who_has_waited_too_long_goes_first_and_everybody_waits_for_it() -> None:
    world = two_queues()
    world.running[Attempt(RequestId("adopted"))] = (request("adopted", context=790), 99.0)
    world.push(large("old"))
    world.now = 59.0
    world.push(small("s1", at=59.0))
    assert names(world.take()) == ["s1"]
    assert world.policy.next_deadline(now=59.0) == 60.0
    world.now = 60.0
    world.push(small("s2", at=60.0))
    assert world.take() == []
    assert (held(world, "old"), held(world, "s2")) == (None, "order")
    assert world.policy.next_deadline(now=60.0) == 120.0  # nothing but s2 becomes overdue
    world.finish("s1")
    assert world.take() == []
    world.tokens = 1200
    assert names(world.take()) == ["old", "s2"]


def test_who_has_waited_too_long_needs_no_quota() -> None:
    world = two_queues()
    for number in range(3):
        world.push(large(f"l{number}"))
    for number in range(5):
        world.push(small(f"s{number}", at=0.1))
    world.tokens = 2000
    assert names(world.take()) == ["s0", "s1", "s2", "s3", "l0", "l1"]
    world.now = 60.0
    assert names(world.take()) == ["l2", "s4"]  # as they came
    assert quotas(world) == [("queue-0", 400, 500), ("queue-1", 600, 900)]


def test_a_resubmitted_request_has_waited_since_it_arrived() -> None:
    world = OneWorker(ONE_QUEUE, 150)
    world.now = 70.0
    world.push(small("young", at=69.0))
    world.push(request("back", number=2, at=5.0))
    assert names(world.take()) == ["back"]
    assert world.policy.queues(now=70.0)[0].oldest_s == 0.0


def test_a_load_that_no_quota_can_serve_is_reported() -> None:
    world = two_queues()
    before = world.policy.is_overloaded
    for number in range(100):
        world.push(large(f"x{number}"))
    world.now = 300.0
    world.policy.learn(replace(FREE, step_s=1000.0))
    world.slots = 0
    world.take()
    assert (before, world.policy.is_overloaded) == (False, True)
    assert sum(quota or 0 for _, quota, _ in quotas(world)) == 1000


def test_measured_times_replace_predicted_ones() -> None:
    """S·D·(1/SLO + λ) of one queue of 8 requests in 5 s: 100·D·(0.2 + 1.6) = 180·D."""
    for lasting_s, is_overloaded in ((5.0, False), (6.0, True)):
        world = OneWorker(replace(TWO_QUEUES, k_max=1, weights=None), 1000)
        world.policy.learn(replace(FREE, step_s=1000.0))
        for number in range(7):
            world.push(small(f"s{number}"))
            world.take()
        world.now = lasting_s
        for number in range(7):
            world.finish(f"s{number}")
        world.now = 0.0
        world.push(small("last"))
        world.take()
        assert world.policy.is_overloaded == is_overloaded


def test_the_release_of_an_adopted_request_changes_nothing() -> None:
    world = OneWorker(ONE_QUEUE, 1000)
    world.policy.release(Attempt(RequestId("adopted")), now=1.0)
    world.policy.check_integrity()
    assert world.policy.next_deadline(now=0.0) is None
    assert not len(world.policy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slo_s": 0.0}, "slo_s must be positive"),
        ({"slo_s": float("nan")}, "slo_s must be positive"),
        ({"output_weight": -0.6}, "output_weight must be positive"),
        ({"k_max": 0}, "k_max must be positive"),
        ({"weights": (1.0, 0.0, 1.0, 1.0)}, r"weights\[1\] must be positive"),
        ({"weights": (1.0,)}, "weights must be 4"),
        ({"selection": "best"}, "selection must be one of"),
        ({"size_form": "cubic"}, "size_form must be one of"),
        ({"squash_fraction": 1.5}, "at most 1"),
        ({"window": 10}, "window must hold"),
        ({"bypass_scan": 1000}, "bypass_scan must be at most"),
        ({"max_input_tokens": 0.0}, "max_input_tokens must be positive"),
        ({"starvation_s": float("inf")}, "starvation_s must be positive"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ChameleonConfig(**change)  # type: ignore[arg-type]
