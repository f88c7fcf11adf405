"""Virtual time: actions in order of their time, and of their scheduling where times are equal."""

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class EventLoop:
    """Runs actions. Nothing here looks at a real clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Action]] = []
        self._sequence = 0

    def at(self, time_s: float, action: Action) -> None:
        """Run the action then; at once, after what is due before it, if the time has passed."""
        self._sequence += 1
        heapq.heappush(self._heap, (max(time_s, self.now), self._sequence, action))

    def after(self, delay_s: float, action: Action) -> None:
        """Run the action so much later."""
        self.at(self.now + delay_s, action)

    def run(self, *, until_s: float, is_done: Callable[[], bool]) -> None:
        """Until the time, or until `is_done`; actions that are not due stay."""
        while self._heap and self._heap[0][0] <= until_s and not is_done():
            self.now, _, action = heapq.heappop(self._heap)
            self.events += 1
            action()


class Alarm:
    """Calls `ring` at a deadline that may be moved. A machine's timer is at most one action ahead.

    `next_deadline` is asked again when it rings, because the earlier deadline may be gone by then.
    """

    def __init__(
        self, loop: EventLoop, *, next_deadline: Callable[[], float | None], ring: Action
    ) -> None:
        self._loop = loop
        self._next_deadline = next_deadline
        self._ring = ring
        self._set_s = float("inf")

    def set(self) -> None:
        """The machine's deadline may have changed."""
        deadline_s = self._next_deadline()
        if deadline_s is None or deadline_s >= self._set_s:
            return
        # As the live drivers do: never early, and never a busy loop.
        self._set_s = max(deadline_s, self._loop.now + 0.001)
        set_s = self._set_s
        self._loop.at(set_s, lambda: self._wake(set_s))

    def _wake(self, set_s: float) -> None:
        if set_s != self._set_s:  # moved forward since; that one has rung or will
            return
        self._set_s = float("inf")
        deadline_s = self._next_deadline()
        if deadline_s is not None and deadline_s <= self._loop.now:
            self._ring()
        self.set()
