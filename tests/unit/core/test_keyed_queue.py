"""The queue with a static key, against a sorted list."""

from bisect import insort
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.keyed import KeyedQueue

Step = tuple[str, int]

steps = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 20)),
        st.tuples(st.just("push"), st.integers(0, 20)),
        st.tuples(st.sampled_from(["remove", "first", "front"]), st.integers(0, 63)),
    ),
    max_size=300,
)


@dataclass(eq=False)
class Entry:
    name: int


class Both:
    """A keyed queue and a sorted list of (key, order of arrival, entry)."""

    def __init__(self) -> None:
        self.queue: KeyedQueue[Entry] = KeyedQueue()
        self.model: list[tuple[int, int, Entry]] = []
        self.pushed = 0

    def push(self, key: int) -> bool:
        self.pushed += 1
        entry = Entry(self.pushed)
        insort(self.model, (key, self.pushed, entry))
        return self.queue.push(float(key), entry)

    def remove(self, index: int) -> None:
        _, _, entry = self.model.pop(index % len(self.model))
        assert entry in self.queue
        self.queue.remove(entry)
        assert entry not in self.queue

    def front(self, count: int) -> list[Entry]:
        return [entry for _, _, entry in self.model[:count]]

    def check(self) -> None:
        self.queue.check_integrity()
        assert len(self.queue) == len(self.model)
        assert {entry.name for entry in self.queue} == {entry.name for _, _, entry in self.model}
        assert len(list(self.queue)) == len(self.model)


@given(steps=steps, keys=st.lists(st.integers(0, 20), max_size=120))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_it_gives_the_entries_in_order_of_key_then_of_arrival(
    steps: list[Step], keys: list[int]
) -> None:
    both = Both()
    for key in keys:
        both.push(key)
    for step, value in steps:
        match step:
            case "push":
                both.push(value)
            case "remove" if both.model:
                both.remove(value)
            case "first":
                assert both.queue.first() is next(iter(both.front(1)), None)
            case _:
                assert both.queue.front(value) == both.front(value)
        both.check()
    while both.model:
        assert both.queue.first() is both.front(1)[0]
        both.remove(0)
    assert both.queue.first() is None


@given(keys=st.lists(st.integers(0, 1000), max_size=200), late=st.integers(0, 1000))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_push_that_is_said_to_be_far_changes_nothing_at_the_front(
    keys: list[int], late: int
) -> None:
    both = Both()
    for key in keys:
        both.push(key)
    before = both.queue.front(17)
    is_near = both.push(late)
    assert is_near or both.queue.front(17) == before


def test_iteration_begins_with_what_was_looked_at_in_order() -> None:
    both = Both()
    for key in (5, 3, 9, 1, 7):
        both.push(key)
    front = both.queue.front(3)
    assert list(both.queue)[:3] == front == both.front(3)


def test_entries_may_be_removed_while_the_queue_is_iterated() -> None:
    both = Both()
    for key in range(100):
        both.push(key)
    both.queue.front(10)
    for entry in both.queue:
        both.queue.remove(entry)
    assert len(both.queue) == 0


def test_keys_may_be_tuples() -> None:
    queue: KeyedQueue[Entry] = KeyedQueue()
    a, b, c = Entry(1), Entry(2), Entry(3)
    queue.push((0, False, 2.0), a)
    queue.push((-1, True, 3.0), b)
    queue.push((0, False, 1.0), c)
    assert queue.front(3) == [b, c, a]


def test_an_entry_may_come_back_with_another_key() -> None:
    queue: KeyedQueue[Entry] = KeyedQueue()
    a, b = Entry(1), Entry(2)
    queue.push(1.0, a)
    queue.push(2.0, b)
    queue.remove(a)
    queue.push(3.0, a)
    assert queue.front(2) == [b, a]
    queue.check_integrity()


def test_an_entry_is_in_the_queue_once() -> None:
    queue: KeyedQueue[Entry] = KeyedQueue()
    one = Entry(1)
    queue.push(1.0, one)
    with pytest.raises(AssertionError):
        queue.push(2.0, one)


def test_removed_entries_do_not_pile_up_whether_they_were_in_front_or_not() -> None:
    queue: KeyedQueue[Entry] = KeyedQueue()
    front = [Entry(index) for index in range(10)]
    for index, entry in enumerate(front):
        queue.push(float(index), entry)
    assert queue.front(10) == front
    behind = [Entry(index) for index in range(84)]
    for entry in behind:
        queue.push(100.0, entry)
    for entry in [*behind, *front]:
        queue.remove(entry)
        queue.check_integrity()
