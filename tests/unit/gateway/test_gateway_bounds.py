"""A million made-up names: nothing that is kept per name grows with them."""

import random
import tracemalloc
from collections import Counter

from services.gateway.absences import ABSENT_MAX, ABSENT_S, Absences
from services.gateway.popularity import OTHER, SHOWN_MAX, PopularAdapters
from services.gateway.types import AdapterName

NAMES = 1_000_000


def test_a_million_unknown_names_are_remembered_in_bounded_memory() -> None:
    absences = Absences()
    tracemalloc.start()
    try:
        for number in range(NAMES):
            absences.add("default", AdapterName(f"made-up-{number}"), now=0.0)
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(absences) == ABSENT_MAX
    assert held_bytes < 10 * 2**20
    assert absences.holds("default", AdapterName(f"made-up-{NAMES - 1}"), now=0.0)
    assert not absences.holds("default", AdapterName("made-up-0"), now=0.0)


def test_an_absence_is_one_tenants_and_believed_for_a_moment() -> None:
    absences = Absences()
    name = AdapterName("poet")
    absences.add("acme", name, now=5.0)
    assert absences.holds("acme", name, now=5.0 + 0.9 * ABSENT_S)
    assert not absences.holds("acme", name, now=5.0 + ABSENT_S)
    assert not absences.holds("globex", name, now=5.0)
    assert not absences.holds("acme", AdapterName("poet", version=1), now=5.0)


def test_a_million_names_leave_the_number_of_series_bounded_and_every_request_counted_once() -> (
    None
):
    popular = PopularAdapters()
    shown: set[str] = set()
    total = 0
    for number in range(NAMES):
        popular.add(f"made-up-{number}", "host")
        if number % 50_000 == 0:
            popular.check_integrity()
            shown |= {name for name, _ in popular.counts()}
    popular.check_integrity()
    counts = popular.counts()
    total = sum(counts.values())
    assert len(counts) <= SHOWN_MAX + 1
    assert len(shown | {name for name, _ in counts}) <= SHOWN_MAX + 1  # equals take no turns
    assert total == NAMES
    assert counts[OTHER, "host"] == NAMES - SHOWN_MAX


def test_the_first_adapters_have_counts_of_their_own_by_label() -> None:
    popular = PopularAdapters()
    for label in ("host", "device", "device"):
        popular.add("poet", label)
    assert popular.counts() == {("poet", "host"): 1, ("poet", "device"): 2}


def test_the_adapters_that_most_requests_are_for_get_counts_of_their_own() -> None:
    popular = PopularAdapters(shown_max=10, candidates_max=100)
    for number in range(10):
        popular.add(f"early-{number}", "host")
    chance = random.Random(7)
    asked = Counter[str]()
    for _ in range(20_000):
        name = f"zipf-{int(chance.paretovariate(0.8))}"
        asked[name] += 1
        popular.add(name, "device")
    popular.check_integrity()
    shown = {name for name, _ in popular.counts()}
    assert {name for name, _ in asked.most_common(6)} <= shown


def test_what_was_popular_once_gives_way() -> None:
    popular = PopularAdapters(shown_max=2, candidates_max=20)
    for _ in range(1000):
        popular.add("old-1", "device")
        popular.add("old-2", "device")
    for _ in range(5000):
        popular.add("new", "device")
    shown = {name for name, _ in popular.counts()}
    assert "new" in shown
    assert len(shown - {OTHER}) == 2


def test_a_count_never_goes_down_while_it_is_shown() -> None:
    popular = PopularAdapters(shown_max=3, candidates_max=10)
    chance = random.Random(3)
    before: dict[tuple[str, str], int] = {}
    for step in range(6_000):
        popular.add(f"a{int(chance.paretovariate(0.5)) + step // 2000}", "host")
        now = popular.counts()
        assert all(now[key] >= before[key] for key in before.keys() & now.keys())
        assert sum(now.values()) <= step + 1
        before = now
