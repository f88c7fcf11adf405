"""The simulated gateway: it owns every request, predicts, counts tokens, and submits again.

As the live one: a returned request is submitted again with the tokens that its client has, after a
jittered pause that doubles; frames of an older attempt do not count.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

from bench.sim.clients import Client, Outcome, Work
from bench.sim.engine import Live
from bench.sim.loop import EventLoop
from bench.sim.predictors import Predictor
from bench.workload.trace import Arrival
from services.core.types import Attempt, RequestId

# As in `services.common.clients.Backoff`.
_PAUSE_S: Final = 0.1
_PAUSE_S_MAX: Final = 3.0


class Peers(Protocol):
    """Whom the gateway talks to; each call arrives after the link's latency."""

    def submit(self, work: Work) -> None: ...
    def cancel(self, attempt: Attempt, cause: str) -> None: ...


class SimGateway:
    """All clients of a run."""

    def __init__(
        self,
        loop: EventLoop,
        predictor: Predictor,
        peers: Peers,
        *,
        seed: int,
        patience_s: float | None,
    ) -> None:
        self.clients: list[Client] = []
        self.open = 0  # clients that wait for something
        self._loop = loop
        self._predictor = predictor
        self._peers = peers
        self._patience_s = patience_s
        self._rng = random.Random(f"gateway {seed}")

    def run(self, arrivals: Iterable[Arrival], *, on_last: Callable[[], None]) -> None:
        """Let the requests arrive at their times."""
        self._await_next(iter(arrivals), on_last)

    def tokens(self, lives: tuple[Live, ...]) -> None:
        """A worker's frame: one more token each."""
        now = self._loop.now
        for live in lives:
            client = live.work.client
            if client.number != live.work.request.attempt.number or client.outcome is not None:
                continue
            if client.emitted == 0:
                client.first_s = now
            elif (gap_s := now - client.last_s) > client.gap_max_s:
                client.gap_max_s = gap_s
            client.last_s = now
            client.emitted += 1
            if client.emitted == client.output_tokens:
                self._predictor.end(client.arrival)
                self._end(client, "done")

    def reject(self, attempt: Attempt, reason: str) -> None:
        """The scheduler will not run it."""
        if client := self._current(attempt):
            self._end(client, "rejected", reason)

    def fail(self, attempt: Attempt, reason: str) -> None:
        """Its worker could not run it."""
        if client := self._current(attempt):
            self._end(client, "failed", reason)

    def give_back(self, attempt: Attempt) -> None:
        """Its worker is lost, or had to stop it: submit it again."""
        client = self._current(attempt)
        if client is None:
            return
        pause_s = min(_PAUSE_S_MAX, _PAUSE_S * 2 ** (client.number - 1))
        client.number += 1
        number = client.number

        def submit_again() -> None:
            if client.outcome is None and client.number == number:
                self._peers.submit(Work(client.request(), client))

        self._loop.after(self._rng.uniform(0.0, pause_s), submit_again)

    def close(self) -> None:
        """Time is over: who is still here will not finish."""
        for client in self.clients:
            if client.outcome is None:
                client.outcome = "unfinished"
        self.open = 0

    # --- clients ----------------------------------------------------------------------------

    def _await_next(self, arrivals: Iterator[Arrival], on_last: Callable[[], None]) -> None:
        arrival = next(arrivals, None)
        if arrival is None:
            on_last()
            return

        def come() -> None:
            self._arrive(arrival)
            self._await_next(arrivals, on_last)

        self._loop.at(arrival.arrival_s, come)

    def _arrive(self, arrival: Arrival) -> None:
        prediction = self._predictor.predict(arrival)
        client = Client(len(self.clients), arrival, prediction, arrival.output_tokens)
        self.clients.append(client)
        self.open += 1
        if arrival.deadline_s is not None:
            self._loop.after(arrival.deadline_s, lambda: self._leave(client, "deadline"))
        if arrival.leaves_s is not None:
            self._loop.after(arrival.leaves_s, lambda: self._leave(client, "cancelled"))
        if self._patience_s is not None:
            self._loop.after(self._patience_s, lambda: self._lose_patience(client))
        self._peers.submit(Work(client.request(), client))

    def _lose_patience(self, client: Client) -> None:
        """Nobody waits so long for a first token."""
        if client.first_s is None:
            self._leave(client, "cancelled")

    def _leave(self, client: Client, outcome: Outcome) -> None:
        if client.outcome is None:
            self._peers.cancel(client.attempt, outcome)
            self._end(client, outcome)

    def _end(self, client: Client, outcome: Outcome, reason: str = "") -> None:
        assert client.outcome is None
        client.outcome, client.reason, client.end_s = outcome, reason, self._loop.now
        self.open -= 1

    def _current(self, attempt: Attempt) -> Client | None:
        client = self.clients[_index(attempt.request_id)]
        is_current = client.outcome is None and client.number == attempt.number
        return client if is_current else None


def _index(request_id: RequestId) -> int:
    return int(request_id[1:])
