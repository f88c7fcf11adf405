"""Which worker a request goes to, and which worker is told to expect its adapter.

A worker takes another request while it has a batch slot, less than `prefill_ahead_s` of prompts to
compute and memory for the request. Among those, a worker that has or expects the adapter is
preferred, so that each adapter lives on few workers, as long as its load is not more than
`load_bound` times the mean (consistent hashing with bounded loads has the same rule): a hot adapter
spreads, a cold one stays where it is. Then the worker with the least backlog of prompts and the
most unpromised blocks; ties by age. Chameleon leaves the policy across replicas open.

With `dispatches_ahead` no worker is asked for anything but the shortest queue: S-LoRA's replicas
queue for themselves.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

from services.core.config import ClusterConfig
from services.core.fleet import Fleet
from services.core.ledger import Fit, Need, need_of
from services.core.types import Adapter, AdapterDigest, Capacity, Request, RequestId, WorkerId
from services.core.workers import Worker

_Known = tuple[Capacity, Need]

_NEAR_MAX: Final = 16  # workers with an adapter that are looked at; a hot one is at more


class Placement:
    """Affinity with bounded load. It is the `Placer` that policies see."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self.fleet = Fleet()
        self._now = 0.0
        self._refused: dict[RequestId, Fit] = {}
        self._needs: dict[RequestId, _Known] = {}  # of those that were asked
        self.version = 0
        self.chosen: tuple[Worker, Need] | None = None

    def open_to(self, workers: Sequence[Worker]) -> None:
        """These workers take requests from now on."""
        self.fleet.open_to(workers)
        self.forget_refusals()

    def forget_refusals(self) -> None:
        """Memory was freed, or some worker's is in reach again: all may be asked about once more.

        Until then a refusal stands: a dispatch makes the need of others and the free memory smaller
        by the same adapter.
        """
        self._refused.clear()
        self.version += 1

    def forget(self, request_id: RequestId) -> None:
        """The request waits no more."""
        self._refused.pop(request_id, None)
        self._needs.pop(request_id, None)

    def begin(self, *, now: float) -> None:
        """A round of takes begins."""
        self._now = now

    @property
    def refused(self) -> frozenset[RequestId]:
        """Who has been refused memory: nothing is kept of anybody else."""
        return frozenset(self._refused) | frozenset(self._needs)

    # --- what policies ask ----------------------------------------------------------------------

    @property
    def free_tokens(self) -> int:
        """Most KV tokens that any one worker has unpromised."""
        return self.fleet.most_free_tokens

    def __call__(self, request: Request) -> Fit:
        """Whether some worker can start the request now; `chosen` is then who, and at what cost."""
        request_id = request.attempt.request_id
        fit = self._refused.get(request_id)
        if fit is not None:
            return fit
        fit = self.choose(request)
        if fit is Fit.MEMORY or fit is Fit.ADAPTER:
            self._refused[request_id] = fit
        return fit

    def is_near(self, request: Request) -> bool:
        """True if some worker has its adapter or expects it, or if it has none."""
        adapter = request.adapter
        return adapter is None or self.fleet.is_expected(adapter.digest)

    def free_in_s(self, request: Request) -> float:
        """Predicted seconds until some worker's memory suffices for it; inf if that is unknown."""
        return min(
            (
                w.free_in_s(self.need(request, w.capacity), now=self._now)
                for w in self.fleet.workers
            ),
            default=math.inf,
        )

    # --- choice ---------------------------------------------------------------------------------

    def has_enough(self, worker: Worker) -> bool:
        """True while a worker has prompts enough to compute."""
        return worker.backlog_s >= self._config.prefill_ahead_s

    def need(self, request: Request, capacity: Capacity) -> Need:
        """What the request would be promised."""
        return need_of(request, capacity, self._config.reserve)

    def choose(self, request: Request) -> Fit:
        """As `__call__`, without memory of refusals."""
        if not self.fleet.workers:
            return Fit.BATCH_SLOTS
        if self._config.dispatches_ahead:
            return self._shortest_queue(request)
        best: tuple[Worker, Need] | None = None
        for worker in self._near(request) if self._may_fit(request) else ():
            if self.has_enough(worker):
                continue
            need = self._need_at(worker, request)
            is_better = best is None or _load(worker) < _load(best[0])
            if is_better and worker.ledger.fit(need) is Fit.FITS:
                best = worker, need
        if best is None:
            return self._least_loaded(request)
        self.chosen = best
        return Fit.FITS

    def _may_fit(self, request: Request) -> bool:
        """False if nobody has so much memory free; only of those that were asked before."""
        known = self._needs.get(request.attempt.request_id)
        if known is None or len(self.fleet.capacities) > 1:
            return True
        capacity, need = known
        return need.kv_blocks * capacity.block_tokens <= self.fleet.most_free_tokens

    def _near(self, request: Request) -> Sequence[Worker]:
        """Workers that its adapter makes preferable."""
        if request.adapter is None:
            return ()
        near = self.fleet.expecting(request.adapter.digest)
        if not near:
            return ()
        limit = self._load_limit()
        return [worker for worker in islice(near, _NEAR_MAX) if len(worker.placed) < limit]

    def _least_loaded(self, request: Request) -> Fit:
        worst, free_tokens = Fit.BATCH_SLOTS, self.fleet.most_free_tokens
        for worker in self.fleet.by_load():
            if self.has_enough(worker):  # and so have all behind it
                return Fit.PREFILL if worst is Fit.BATCH_SLOTS else worst
            need = self._need_at(worker, request)
            fit = worker.ledger.fit(need)
            if fit is Fit.FITS:
                self.chosen = worker, need
                return fit
            # Of two reasons the one that says more about the request itself is told.
            if fit is Fit.ADAPTER or (fit is Fit.MEMORY and worst is not Fit.ADAPTER):
                worst = fit
            if need.kv_blocks * worker.capacity.block_tokens > free_tokens:
                break  # nobody has so much
        return worst

    def _need_at(self, worker: Worker, request: Request) -> Need:
        request_id = request.attempt.request_id
        known = self._needs.get(request_id)
        if known is not None and known[0] is worker.capacity:
            return known[1]
        need = self.need(request, worker.capacity)
        self._needs[request_id] = worker.capacity, need
        return need

    def _shortest_queue(self, request: Request) -> Fit:
        worker = min(self.fleet.workers, key=lambda w: len(w.placed))
        self.chosen = worker, self.need(request, worker.capacity)
        return Fit.FITS

    def _load_limit(self) -> int:
        """Requests that a worker may have after taking one more for its adapter's sake."""
        fleet = self.fleet
        return math.ceil(self._config.load_bound * (1 + fleet.requests) / len(fleet.workers))

    # --- hints ----------------------------------------------------------------------------------

    def plan_hints(self, upcoming: Iterable[Request]) -> dict[WorkerId, tuple[Adapter, ...]]:
        """Adapters that each worker should have for the queue: those not in use there.

        One that is there and idle is named too: else it would go for the next one of the hint, and
        be loaded again.
        """
        fleet, depth = self.fleet, self._config.prefetch_depth
        hints: dict[WorkerId, dict[AdapterDigest, Adapter]] = {
            worker.worker_id: {} for worker in fleet.workers
        }
        limit = self._load_limit()
        by_load = tuple(fleet.by_load())
        fewest = [(0, rank) for rank in range(len(by_load))]  # a heap; counts may be outdated
        for request in upcoming:
            adapter = request.adapter
            if adapter is None:
                continue
            near = islice(fleet.expecting(adapter.digest), _NEAR_MAX)
            worker = next((w for w in near if len(w.placed) < limit), None)
            while worker is None:
                count, rank = fewest[0]
                hinted = len(hints[by_load[rank].worker_id])
                if hinted == count:
                    worker = by_load[rank]
                else:
                    heapq.heapreplace(fewest, (hinted, rank))
            chosen = hints[worker.worker_id]
            if len(chosen) < depth and not worker.ledger.uses(adapter.digest):
                chosen.setdefault(adapter.digest, adapter)
        return {worker_id: tuple(adapters.values()) for worker_id, adapters in hints.items()}


def _load(worker: Worker) -> tuple[float, int]:
    return worker.backlog_s, -worker.ledger.free_blocks
