"""Chances of a request soon, from gaps, hours of the day and shares."""

from services.core.demand import Demand
from services.core.forecast import Forecast
from tests.unit.core.core_world import adapter


def chance(forecast: Forecast, name: str, *, horizon_s: float, now: float) -> float:
    demand = Demand()
    for _ in range(1000):
        demand.use(adapter("another").digest)
    found = forecast.chances(demand, horizon_s=horizon_s, now=now)
    return {one.digest: likely for one, likely in found}[adapter(name).digest]


def test_a_regular_gap_says_little_before_its_end_and_much_at_it() -> None:
    forecast = Forecast(day_offset_s=None)
    for turn in range(20):
        forecast.note(adapter("a"), now=600.0 * turn)
    last_s = 600.0 * 19
    forecast.note(adapter("b"), now=last_s)
    assert chance(forecast, "a", horizon_s=60.0, now=last_s + 60) < 0.3
    assert chance(forecast, "a", horizon_s=300.0, now=last_s + 500) > 0.7
    assert chance(forecast, "b", horizon_s=60.0, now=last_s + 500) < 0.1
    forecast.check_integrity()


def test_a_few_gaps_say_nothing() -> None:
    forecast = Forecast(day_offset_s=None)
    for turn in range(4):
        forecast.note(adapter("a"), now=600.0 * turn)
    assert chance(forecast, "a", horizon_s=200.0, now=1800.0 + 500) < 0.1


def test_an_hour_of_the_day_is_remembered_where_it_is_known() -> None:
    chances = []
    for offset_s in (None, 0.0):
        forecast = Forecast(day_offset_s=offset_s)
        for day in range(3):
            forecast.note(adapter("other"), now=day * 86_400.0)
            for minute in range(30):
                forecast.note(adapter("a"), now=day * 86_400.0 + 9 * 3600.0 + 2 * minute)
        forecast.note(adapter("other"), now=3 * 86_400.0)
        chances.append(chance(forecast, "a", horizon_s=600.0, now=3 * 86_400.0 + 9 * 3600.0))
        assert chance(forecast, "a", horizon_s=600.0, now=3 * 86_400.0 + 15 * 3600.0) < 0.2
    unknown, known = chances
    assert unknown < 0.2
    assert known > 0.9


def test_no_more_adapters_are_known_than_the_limit() -> None:
    forecast = Forecast(day_offset_s=0.0, limit=50)
    for index in range(1000):
        forecast.note(adapter(f"a{index}"), now=float(index))
        assert len(forecast) <= 50
    forecast.check_integrity()
    assert adapter("a999").digest in {
        one.digest for one, _ in forecast.chances(Demand(), horizon_s=1.0, now=1000.0)
    }
