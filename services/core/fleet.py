"""The workers that take requests, indexed so that a request finds its worker without asking all.

Two orders, by load and by free memory, and who has or expects which adapter. Workers tell of every
change; each costs a search among the workers.
"""

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Sequence
from typing import Generic, TypeVar

from services.core.types import AdapterDigest, Capacity
from services.core.workers import Worker

K = TypeVar("K", tuple[float, int, int], tuple[int, int])


class _Order(Generic[K]):
    """Workers sorted by a key that ends with their number."""

    def __init__(self) -> None:
        self.keys: list[K] = []
        self._now: dict[int, K] = {}

    def put(self, number: int, key: K) -> None:
        """The worker's key is this now."""
        before = self._now.get(number)
        if before == key:
            return
        if before is not None:
            del self.keys[bisect_left(self.keys, before)]
        insort(self.keys, key)
        self._now[number] = key


class Fleet:
    """Open workers and their indexes. It watches its workers."""

    def __init__(self) -> None:
        self.workers: Sequence[Worker] = ()
        self.capacities: set[Capacity] = set()  # distinct ones
        self._numbers: dict[int, int] = {}  # of a worker, by the object's identity
        self._counts: list[int] = []
        self.requests = 0  # at these workers
        self._by_load: _Order[tuple[float, int, int]] = _Order()
        self._by_memory: _Order[tuple[int, int]] = _Order()
        self._expecting: dict[AdapterDigest, dict[int, Worker]] = {}

    def open_to(self, workers: Sequence[Worker]) -> None:
        """These take requests from now on, the oldest first."""
        self.workers = workers
        self.capacities = {worker.capacity for worker in workers}
        self._numbers = {id(worker): number for number, worker in enumerate(workers)}
        self._counts = [0] * len(workers)
        self.requests = 0
        self._by_load, self._by_memory = _Order(), _Order()
        self._expecting = {}
        for worker in workers:
            self.note_load(worker)
            for digest in worker.expected():
                self.note_adapter(worker, digest)

    # --- what workers tell ----------------------------------------------------------------------

    def note_load(self, worker: Worker) -> None:
        """Its requests, backlog or promised memory have changed."""
        number = self._numbers.get(id(worker))
        if number is None:
            return
        count, free_blocks = len(worker.placed), worker.ledger.free_blocks
        self.requests += count - self._counts[number]
        self._counts[number] = count
        self._by_load.put(number, (worker.backlog_s, -free_blocks, number))
        free_tokens = free_blocks * worker.capacity.block_tokens
        self._by_memory.put(number, (free_tokens, number))

    def note_adapter(self, worker: Worker, digest: AdapterDigest) -> None:
        """It may have come to expect an adapter, or to expect it no more."""
        number = self._numbers.get(id(worker))
        if number is None:
            return
        if worker.expects(digest):
            self._expecting.setdefault(digest, {})[number] = worker
        elif (workers := self._expecting.get(digest)) is not None:
            workers.pop(number, None)
            if not workers:
                del self._expecting[digest]

    # --- what placement asks --------------------------------------------------------------------

    @property
    def most_free_tokens(self) -> int:
        """Most KV tokens that any one worker has unpromised."""
        keys = self._by_memory.keys
        return max(0, keys[-1][0]) if keys else 0

    def by_load(self) -> Iterator[Worker]:
        """Least backlog of prompts first, then most unpromised blocks, then the oldest."""
        return (self.workers[key[2]] for key in self._by_load.keys)

    def is_expected(self, digest: AdapterDigest) -> bool:
        """True if some worker has an adapter or expects it."""
        return digest in self._expecting

    def expecting(self, digest: AdapterDigest) -> Collection[Worker]:
        """Workers that have an adapter or expect it."""
        return self._expecting.get(digest, _NOBODY).values()

    def check_integrity(self) -> None:
        """Assert that the indexes say what the workers say."""
        assert self.requests == sum(len(worker.placed) for worker in self.workers)
        loads = [
            (worker.backlog_s, -worker.ledger.free_blocks, number)
            for number, worker in enumerate(self.workers)
        ]
        assert self._by_load.keys == sorted(loads)
        free = [w.ledger.free_blocks * w.capacity.block_tokens for w in self.workers]
        assert self.most_free_tokens == max(0, *free, 0)
        expected = {(d, n) for n, w in enumerate(self.workers) for d in w.expected()}
        assert expected == {(d, n) for d, workers in self._expecting.items() for n in workers}


_NOBODY: dict[int, Worker] = {}
