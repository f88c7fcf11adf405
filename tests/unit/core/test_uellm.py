"""UELLM's batches as a live queue."""

from services.core.policies.static_batches import UellmConfig
from services.core.policies.uellm import Uellm
from services.core.types import Request
from tests.unit.core.core_world import attempt, request
from tests.unit.core.policy_world import Answers, drain, pool_size, push


def one(
    name: str, *, slo_s: float = 60.0, length: int = 10, arrived_s: float = 0.0, priority: int = 0
) -> Request:
    return request(
        name,
        arrived_s=arrived_s,
        deadline_s=arrived_s + slo_s,
        output=length,
        priority=priority,
    )


def test_the_family_orders_by_slo_and_length_by_slo_and_by_length() -> None:
    queries = [
        one("a", slo_s=100, length=100),
        one("b", slo_s=120, length=20),
        one("c", slo_s=90, length=200),
    ]
    orders = {}
    for slo_weight, length_weight in ((1.0, 0.5), (1.0, 0.0), (0.0, 0.5)):
        policy = Uellm(UellmConfig(slo_weight=slo_weight, length_weight=length_weight))
        push(policy, *queries)
        orders[policy.name] = "".join(drain(policy))
    assert orders == {"slo_odbs": "bac", "slo_dbs": "cab", "odbs": "bac"}


def test_a_turn_that_has_begun_goes_before_newcomers_and_its_head_blocks() -> None:
    policy = Uellm(UellmConfig(cap=3))
    push(policy, *[one(f"r{index}", slo_s=50 + index) for index in range(4)])
    head_only = Answers(lambda asked: asked.attempt.request_id == "r0")
    assert drain(policy, head_only) == ["r0"]
    push(policy, one("urgent", slo_s=1, priority=9))
    assert policy.held_by(attempt("r1").request_id, now=0.0) is None
    assert policy.held_by(attempt("urgent").request_id, now=0.0) == "order"
    assert [asked.attempt.request_id for asked in policy.upcoming()] == [
        "r1",
        "r2",
        "urgent",
        "r3",
    ]
    assert drain(policy) == ["r1", "r2", "urgent", "r3"]


def test_a_turn_may_lose_a_member_that_was_cancelled() -> None:
    policy = Uellm(UellmConfig(cap=3))
    push(policy, *[one(f"r{index}", slo_s=50 + index) for index in range(4)])
    assert drain(policy, Answers(lambda _: False)) == []
    policy.remove(attempt("r0").request_id)
    policy.remove(attempt("r3").request_id)
    policy.check_integrity()
    assert drain(policy) == ["r1", "r2"]


def test_who_waited_too_long_opens_the_next_turn() -> None:
    policy = Uellm(UellmConfig(cap=2, max_wait_s=30.0))
    push(policy, one("patient", slo_s=10_000))
    push(policy, *[one(f"r{index}", slo_s=50) for index in range(3)], now=29.0)
    assert drain(policy, now=29.9) == ["r0", "r1", "r2", "patient"]
    push(policy, one("patient", slo_s=10_000))
    push(policy, *[one(f"r{index}", slo_s=50) for index in range(3)], now=29.0)
    assert drain(policy, now=30.0) == ["patient", "r0", "r1", "r2"]


def test_static_batches_wait_for_all_of_the_one_before() -> None:
    policy = Uellm(UellmConfig(cap=2, waits_for_batch=True))
    push(policy, *[one(f"r{index}") for index in range(5)])
    assert drain(policy) == ["r0", "r1"]
    assert policy.held_by(attempt("r2").request_id, now=0.0) == "order"
    policy.release(attempt("r0"), now=1.0)
    assert drain(policy, now=1.0) == []
    policy.release(attempt("r1"), now=2.0)
    assert drain(policy, now=2.0) == ["r2", "r3"]


def test_each_worker_may_have_a_batch_unfinished() -> None:
    policy = Uellm(UellmConfig(cap=2, waits_for_batch=True))
    policy.resize(pool_size(workers=2))
    push(policy, *[one(f"r{index}") for index in range(7)])
    assert drain(policy) == ["r0", "r1", "r2", "r3"]
    policy.release(attempt("r0"), now=1.0)
    policy.release(attempt("r2"), now=1.0)
    assert drain(policy, now=1.0) == []
    policy.release(attempt("r3"), now=1.0)
    assert drain(policy, now=1.0) == ["r4", "r5"]


def test_a_batch_whose_first_members_end_early_is_still_one_batch() -> None:
    policy = Uellm(UellmConfig(cap=2, waits_for_batch=True))
    push(policy, *[one(f"r{index}") for index in range(3)])
    assert drain(policy, Answers(lambda asked: asked.attempt.request_id == "r0")) == ["r0"]
    policy.release(attempt("r0"), now=1.0)
    assert drain(policy, now=1.0) == ["r1"]
    policy.release(attempt("r1"), now=2.0)
    assert drain(policy, now=2.0) == ["r2"]
