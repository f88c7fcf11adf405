"""Quotas by the paper's formula, against values computed by hand, and who is charged for what."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.quotas import QueueLoad, TokenAccounts, divide
from services.core.types import Request
from tests.unit.core.chameleon_world import adapter, request

# S·D·(1/SLO + λ): 100·2·(0.2 + 1) = 240; 1000·4·(0.2 + 0.3) = 2000
SMALL = QueueLoad(max_tokens=100, service_s=2.0, arrivals_per_s=1.0)
LARGE = QueueLoad(max_tokens=1000, service_s=4.0, arrivals_per_s=0.3)


def test_the_least_quota_keeps_an_m_m_1_queue_within_the_slo() -> None:
    assert SMALL.min_tokens(5.0) == pytest.approx(240)
    assert LARGE.min_tokens(5.0) == pytest.approx(2000)
    rate = LARGE.min_tokens(5.0) / (LARGE.max_tokens * LARGE.service_s)
    assert 1 / (rate - LARGE.arrivals_per_s) == pytest.approx(5.0)


def test_what_is_left_is_shared_in_proportion_to_the_least_quotas() -> None:
    # 4480 - 2240 = 2240 are left: each quota doubles
    division = divide(4480, [SMALL, LARGE], slo_s=5.0, weights=None)
    assert (division.quotas, division.is_overloaded) == ((480, 4000), False)


def test_what_is_left_is_shared_by_configured_weights() -> None:
    division = divide(4240, [SMALL, LARGE], slo_s=5.0, weights=(3.0, 1.0))
    assert division.quotas == (240 + 1500, 2000 + 500)


def test_quotas_that_do_not_fit_are_scaled_and_reported() -> None:
    division = divide(1120 * 2, [SMALL, LARGE], slo_s=5.0, weights=None)
    assert not division.is_overloaded
    division = divide(1680, [SMALL, LARGE], slo_s=5.0, weights=None)  # three quarters
    assert (division.quotas, division.is_overloaded) == ((180, 1500), True)


def test_no_quota_is_scaled_below_the_largest_request_of_its_queue() -> None:
    # by half it would be 120 and 1000; by 1100 / 2240 the large one would fall below 1000
    assert divide(1120, [SMALL, LARGE], slo_s=5.0, weights=None).quotas == (120, 1000)
    assert divide(1110, [SMALL, LARGE], slo_s=5.0, weights=None).quotas == (110, 1000)
    division = divide(500, [SMALL, LARGE], slo_s=5.0, weights=None)
    assert (division.quotas, division.is_overloaded) == ((100, 1000), True)


def test_a_quick_queue_still_has_room_for_its_largest_request() -> None:
    quick = QueueLoad(max_tokens=300, service_s=0.1, arrivals_per_s=0.1)
    division = divide(300, [quick], slo_s=5.0, weights=None)
    assert (division.quotas, division.is_overloaded) == ((300,), False)


def test_without_any_measurement_queues_share_alike() -> None:
    assert divide(1001, [QueueLoad()] * 2, slo_s=5.0, weights=None).quotas == (500, 501)


loads = st.builds(QueueLoad, st.integers(1, 5000), st.floats(0.001, 100.0), st.floats(0.001, 50.0))


@given(st.integers(0, 10**7), st.lists(loads, min_size=1, max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_quotas_add_up_and_hold_the_largest_request(total: int, queues: list[QueueLoad]) -> None:
    division = divide(total, queues, slo_s=5.0, weights=None)
    floors = [load.max_tokens for load in queues]
    assert sum(division.quotas) == max(total, sum(floors))
    assert all(quota >= floor for quota, floor in zip(division.quotas, floors, strict=True))
    asked = sum(load.min_tokens(5.0) for load in queues)
    assert division.is_overloaded == (asked > total)


# --- accounts ---


def accounts(*quotas: int) -> TokenAccounts:
    ledger = TokenAccounts(quotas)
    ledger.token_bytes = 1000.0
    return ledger


def state(ledger: TokenAccounts) -> list[tuple[int, int]]:
    """What each queue has available, and used."""
    ledger.check_integrity()
    queues = range(len(ledger.quotas))
    return [(ledger.available(queue), ledger.used(queue)) for queue in queues]


def test_lenders_are_debited_smallest_first_and_paid_back() -> None:
    ledger = accounts(100, 200, 300)
    borrower = request("b")
    assert ledger.lendable([0, 2]) == 400
    ledger.charge(borrower, 150, queue=1, lenders=[0, 2])
    assert state(ledger) == [(0, 0), (200, 150), (250, 0)]
    ledger.release(borrower.attempt)
    assert state(ledger) == [(100, 0), (200, 0), (300, 0)]


def test_an_adapter_is_charged_to_its_first_user_and_paid_back_by_its_last() -> None:
    ledger = accounts(500)
    lora = adapter("a", 64)
    first, second = request("1", using=lora), request("2", using=lora)
    assert ledger.need(100, lora) == 164
    ledger.charge(first, 100, queue=0)
    assert ledger.need(100, lora) == 100
    ledger.charge(second, 100, queue=0)
    assert state(ledger) == [(236, 264)]
    ledger.release(first.attempt)
    assert state(ledger) == [(336, 164)]
    ledger.release(second.attempt)
    assert state(ledger) == [(500, 0)]
    assert ledger.need(100, lora) == 164


def test_an_overdrawn_queue_lends_nothing() -> None:
    ledger = accounts(100, 100)
    ledger.charge(request("big"), 130, queue=0)
    assert state(ledger) == [(-30, 130), (100, 0)]
    assert ledger.lendable([0, 1]) == 100


def test_a_new_division_ends_loans_and_loses_no_token() -> None:
    ledger = accounts(100, 300)
    lora = adapter("a", 50)
    own, lent = request("own", context=10), request("lent", context=500, using=lora)
    ledger.charge(own, 80, queue=0)
    ledger.charge(lent, 120, queue=0, lenders=[1])
    assert state(ledger) == [(20, 250), (130, 0)]

    def by_length(one: Request) -> int:
        return 2 if one.context_tokens > 100 else 0

    ledger.redivide((200, 50, 150), by_length)
    assert state(ledger) == [(120, 80), (50, 0), (-20, 170)]
    ledger.release(lent.attempt)
    ledger.release(own.attempt)
    assert state(ledger) == [(200, 0), (50, 0), (150, 0)]
