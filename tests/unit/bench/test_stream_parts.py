import pytest

from bench.stream import _Rates


def test_a_ratio_is_the_median_over_turns_against_the_slowest_of_the_others() -> None:
    rates = _Rates()
    for mine, first, second in ((10, 20, 40), (30, 100, 10), (5, 10, 20)):
        for name, rate in (("mine", mine), ("first", first), ("second", second)):
            rates.add(name, rate * 2**20, 1.0)
    assert rates.ratio("mine", "first", "second") == pytest.approx(0.5)
    assert rates.ratio("mine", "second") == pytest.approx(0.25)
