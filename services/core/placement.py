"""Which worker a request goes to, and which worker is told to expect its adapter.

A worker that has the adapter is preferred, so that each adapter lives on few workers, as long as
its load is not more than `load_bound` times the mean (consistent hashing with bounded loads has the
same rule). Otherwise the worker with most unpromised blocks; ties by id. Chameleon leaves the
policy across replicas open.
"""

import math
from collections.abc import Iterable, Sequence

from services.core.ledger import Fit, need_of
from services.core.types import Adapter, AdapterDigest, Request, WorkerId
from services.core.workers import Worker


class Placement:
    """Affinity with bounded load."""

    def __init__(self, *, load_bound: float) -> None:
        self._load_bound = load_bound

    def choose(self, request: Request, workers: Sequence[Worker]) -> Worker | Fit:
        """The worker that starts the request now, or what it lacks at all of them."""
        capacities = dict.fromkeys(worker.capacity for worker in workers)  # most often one
        needs = {capacity: need_of(request, capacity) for capacity in capacities}
        fits = [(worker, worker.ledger.fit(needs[worker.capacity])) for worker in workers]
        fitting = [worker for worker, fit in fits if fit is Fit.FITS]
        if fitting:
            return self._prefer(request, fitting, self._load_limit(workers), {})
        is_memory = any(fit is Fit.MEMORY for _, fit in fits)
        return Fit.MEMORY if is_memory else Fit.BATCH_SLOTS

    def plan_hints(
        self, upcoming: Iterable[Request], workers: Sequence[Worker], *, depth: int
    ) -> dict[WorkerId, tuple[Adapter, ...]]:
        """Adapters that each worker should load for the queue: those it does not hold."""
        hints: dict[WorkerId, dict[AdapterDigest, Adapter]] = {w.worker_id: {} for w in workers}
        planned_blocks: dict[WorkerId, int] = {}
        limit = self._load_limit(workers)
        for request in upcoming:
            adapter = request.adapter
            if adapter is None:
                continue
            worker = self._prefer(request, workers, limit, planned_blocks)
            chosen = hints[worker.worker_id]
            if len(chosen) == depth or worker.holds(adapter.digest):
                continue
            if adapter.digest in chosen:
                continue
            chosen[adapter.digest] = adapter
            blocks = worker.capacity.adapter_blocks(adapter)
            planned_blocks[worker.worker_id] = planned_blocks.get(worker.worker_id, 0) + blocks
        return {worker_id: tuple(adapters.values()) for worker_id, adapters in hints.items()}

    def _prefer(
        self,
        request: Request,
        workers: Sequence[Worker],
        load_limit: int,
        planned_blocks: dict[WorkerId, int],
    ) -> Worker:
        adapter = request.adapter
        if adapter is not None:
            near = [w for w in workers if w.expects(adapter.digest) and len(w.ledger) < load_limit]
            workers = near or workers
        return min(
            workers,
            key=lambda w: (
                planned_blocks.get(w.worker_id, 0) - w.ledger.free_blocks,
                w.worker_id,
            ),
        )

    def _load_limit(self, workers: Sequence[Worker]) -> int:
        """Requests that a worker may have after taking one more for its adapter's sake."""
        total = 1 + sum(len(worker.ledger) for worker in workers)
        return math.ceil(self._load_bound * total / len(workers))
