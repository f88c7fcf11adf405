"""The requests at a worker, in order of arrival: those that wait and those that are admitted."""

from bisect import insort

from services.core.sequence import Sequence
from services.core.types import Attempt, Request, RequestId


class Roster:
    """Both lists are oldest first. Several attempts of a request may be here while one leaves."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self._sequences: dict[Attempt, Sequence] = {}
        self._latest: dict[RequestId, Sequence] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def get(self, attempt: Attempt) -> Sequence | None:
        """The sequence of an attempt, if it is here."""
        return self._sequences.get(attempt)

    def latest(self, request_id: RequestId) -> Sequence | None:
        """The latest attempt of a request, if one is here."""
        return self._latest.get(request_id)

    def all(self) -> tuple[Sequence, ...]:
        """Everything that is here, in order of arrival."""
        return tuple(self._sequences.values())

    def add(self, request: Request) -> None:
        """A request has arrived and waits."""
        assert request.attempt not in self._sequences
        self._arrivals += 1
        sequence = Sequence(request, self._arrivals, request.context_tokens)
        self._sequences[request.attempt] = sequence
        self._latest[request.attempt.request_id] = sequence
        self.waiting.append(sequence)

    def admit(self, sequence: Sequence) -> None:
        """It waits no more."""
        self.waiting.remove(sequence)
        sequence.is_admitted = True
        insort(self.admitted, sequence, key=_order)

    def put_back(self, sequence: Sequence) -> None:
        """It waits again, at its old place, with nothing computed."""
        self.admitted.remove(sequence)
        sequence.restart()
        insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """It leaves."""
        del self._sequences[sequence.attempt]
        if self._latest.get(sequence.attempt.request_id) is sequence:
            del self._latest[sequence.attempt.request_id]
        (self.admitted if sequence.is_admitted else self.waiting).remove(sequence)

    def check_integrity(self) -> None:
        """Assert that every sequence is in one list, in order."""
        both = sorted([*self.waiting, *self.admitted], key=_order)
        assert both == list(self._sequences.values())
        assert self.waiting == [one for one in both if not one.is_admitted]
        assert self.admitted == [one for one in both if one.is_admitted]
        for request_id, sequence in self._latest.items():
            assert sequence.attempt.request_id == request_id
            assert self._sequences[sequence.attempt] is sequence


def _order(sequence: Sequence) -> int:
    return sequence.order
