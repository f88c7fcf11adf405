"""The requests at a worker, in order of arrival: who waits, who is admitted, who can be in a step.

An admitted sequence is in one of three places: `decoding` (one token is due), `prompts` (more are)
or, until its adapter is there, in neither; it is `early` once the adapter's first layers are there.
The lists are kept as things happen, so that a step looks at nobody who has not changed.
"""

from bisect import bisect_left, insort

from services.core.decisions import StepWork
from services.core.sequence import Sequence
from services.core.types import AdapterDigest, Attempt, Request, RequestId


class Roster:
    """All lists are oldest first. Several attempts of a request may be here while one leaves."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self.prompts: list[Sequence] = []
        self.early: list[Sequence] = []  # their adapters are coming, with some layers here
        self.decode_ranks = 0  # of the decoding ones' adapters, together
        self._decodes: tuple[StepWork, ...] | None = None  # None: `decoding` has changed
        self._awaiting: dict[AdapterDigest, list[Sequence]] = {}  # admitted, adapter not here
        self._wanting: dict[AdapterDigest, list[Sequence]] = {}  # waiting ones by adapter
        self._sequences: dict[Attempt, Sequence] = {}
        self._latest: dict[RequestId, Sequence] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def is_awaiting_loads(self) -> bool:
        """True while an admitted request's adapter is not here."""
        return bool(self._awaiting)

    def get(self, attempt: Attempt) -> Sequence | None:
        """The sequence of an attempt, if it is here."""
        return self._sequences.get(attempt)

    def latest(self, request_id: RequestId) -> Sequence | None:
        """The latest attempt of a request, if one is here."""
        return self._latest.get(request_id)

    def all(self) -> tuple[Sequence, ...]:
        """Everything that is here, in order of arrival."""
        return tuple(self._sequences.values())

    def first_wanting(self, digest: AdapterDigest) -> Sequence | None:
        """The oldest waiting request that wants this adapter."""
        wanting = self._wanting.get(digest)
        return wanting[0] if wanting else None

    def decodes(self) -> tuple[StepWork, ...]:
        """The work of every decoding sequence. The same object until `decoding` changes."""
        if self._decodes is None:
            self._decodes = tuple(sequence.decode for sequence in self.decoding)
        return self._decodes

    # --- changes ----------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """A request has arrived and waits."""
        assert request.attempt not in self._sequences
        self._arrivals += 1
        sequence = Sequence(request, self._arrivals)
        self._sequences[request.attempt] = sequence
        self._latest[sequence.request_id] = sequence
        self._wait(sequence)

    def admit(self, sequence: Sequence, *, ready_layers: int | None) -> None:
        """It waits no more; it can be in a step as far as its adapter is ready; None: it is all."""
        self._end_wait(sequence)
        sequence.is_admitted = True
        insort(self.admitted, sequence, key=_order)
        if ready_layers is None:
            self._enter_steps(sequence)
        else:
            assert sequence.digest is not None
            self._awaiting.setdefault(sequence.digest, []).append(sequence)
            self._set_ready(sequence, ready_layers)

    def progress(self, digest: AdapterDigest, ready_layers: int) -> None:
        """So many layers of a coming adapter are here: those admitted for it can use them."""
        for sequence in self._awaiting.get(digest, ()):
            self._set_ready(sequence, ready_layers)

    def end_load(self, digest: AdapterDigest) -> None:
        """The adapter is here: those admitted for it can be in a step."""
        for sequence in self._awaiting.pop(digest, ()):
            if sequence.ready_layers:
                _take_out(self.early, sequence)
            sequence.ready_layers = None
            self._enter_steps(sequence)

    def end_prompt(self, sequence: Sequence) -> None:
        """Of its known tokens only one is due now."""
        _take_out(self.prompts, sequence)
        self._enter_steps(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """It waits again, at its old place, with nothing computed."""
        self._leave_steps(sequence)
        sequence.restart()
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It leaves."""
        del self._sequences[sequence.attempt]
        if self._latest.get(sequence.request_id) is sequence:
            del self._latest[sequence.request_id]
        if sequence.is_admitted:
            self._leave_steps(sequence)
        else:
            self._end_wait(sequence)

    def check_integrity(self) -> None:
        """Assert that every sequence is where it should be, in order."""
        both = sorted([*self.waiting, *self.admitted], key=_order)
        assert both == list(self._sequences.values())
        assert self.waiting == [one for one in both if not one.is_admitted]
        assert self.admitted == [one for one in both if one.is_admitted]
        awaiting = [one for group in self._awaiting.values() for one in group]
        assert sorted([*self.decoding, *self.prompts, *awaiting], key=_order) == self.admitted
        assert self.early == sorted((one for one in awaiting if one.ready_layers), key=_order)
        assert all(one.ready_layers is not None for one in awaiting)
        assert all(one.ready_layers is None for one in [*self.decoding, *self.prompts])
        assert all(one.uncomputed_tokens == 1 for one in self.decoding)
        assert all(one.uncomputed_tokens > 1 for one in self.prompts)
        assert self.decode_ranks == sum(one.rank for one in self.decoding)
        assert self.decodes() == tuple(one.decode for one in self.decoding)
        wanting = [one for group in self._wanting.values() for one in group]
        assert sorted(wanting, key=_order) == [one for one in self.waiting if one.digest]
        for request_id, sequence in self._latest.items():
            assert sequence.request_id == request_id
            assert self._sequences[sequence.attempt] is sequence

    def _wait(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_order)
        if sequence.digest is not None:
            insort(self._wanting.setdefault(sequence.digest, []), sequence, key=_order)

    def _end_wait(self, sequence: Sequence) -> None:
        _take_out(self.waiting, sequence)
        if sequence.digest is not None:
            _take_from_group(self._wanting, sequence.digest, sequence)

    def _set_ready(self, sequence: Sequence, layers: int) -> None:
        if layers and not sequence.ready_layers:
            insort(self.early, sequence, key=_order)
        sequence.ready_layers = layers

    def _enter_steps(self, sequence: Sequence) -> None:
        if sequence.uncomputed_tokens > 1:
            insort(self.prompts, sequence, key=_order)
            return
        insort(self.decoding, sequence, key=_order)
        self.decode_ranks += sequence.rank
        self._decodes = None

    def _leave_steps(self, sequence: Sequence) -> None:
        _take_out(self.admitted, sequence)
        if sequence.digest is not None and sequence.digest in self._awaiting:
            _take_from_group(self._awaiting, sequence.digest, sequence)
            if sequence.ready_layers:
                _take_out(self.early, sequence)
        elif sequence.uncomputed_tokens > 1:
            _take_out(self.prompts, sequence)
        else:
            _take_out(self.decoding, sequence)
            self.decode_ranks -= sequence.rank
            self._decodes = None


def _order(sequence: Sequence) -> int:
    return sequence.order


def _take_out(sequences: list[Sequence], sequence: Sequence) -> None:
    index = bisect_left(sequences, sequence.order, key=_order)
    assert sequences[index] is sequence
    del sequences[index]


def _take_from_group(
    groups: dict[AdapterDigest, list[Sequence]], digest: AdapterDigest, sequence: Sequence
) -> None:
    group = groups[digest]
    _take_out(group, sequence)
    if not group:
        del groups[digest]
