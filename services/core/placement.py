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

import math
from collections.abc import Iterable, Sequence

from services.core.config import ClusterConfig
from services.core.ledger import Fit, Need, need_of
from services.core.types import Adapter, AdapterDigest, Capacity, Request, RequestId, WorkerId
from services.core.workers import Worker


class Placement:
    """Affinity with bounded load. It is the `Placer` that policies see."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._workers: Sequence[Worker] = ()
        self._now = 0.0
        self._refused: dict[RequestId, Fit] = {}
        self._needs: dict[RequestId, tuple[Capacity, Need]] = {}  # of those that were refused
        self.version = 0
        self.chosen: tuple[Worker, Need] | None = None

    def open_to(self, workers: Sequence[Worker]) -> None:
        """These workers take requests from now on."""
        self._workers = workers
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
        most = 0
        for worker in self._workers:
            tokens = worker.ledger.free_blocks * worker.capacity.block_tokens
            most = max(most, tokens)
        return most

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
        return adapter is None or any(w.expects(adapter.digest) for w in self._workers)

    def free_in_s(self, request: Request) -> float:
        """Predicted seconds until some worker's memory suffices for it; inf if that is unknown."""
        return min(
            (w.free_in_s(self.need(request, w.capacity), now=self._now) for w in self._workers),
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
        if self._config.dispatches_ahead and self._workers:
            return self._shortest_queue(request)
        digest = request.adapter.digest if request.adapter is not None else None
        capacity, need = self._needs.get(request.attempt.request_id, _UNKNOWN)
        worst = Fit.BATCH_SLOTS
        fitting: list[tuple[Worker, Need]] = []
        for worker in self._workers:
            if self.has_enough(worker):
                worst = Fit.PREFILL if worst is Fit.BATCH_SLOTS else worst
                continue
            if worker.capacity is not capacity:
                capacity = worker.capacity
                need = self.need(request, capacity)
            fit = worker.ledger.fit(need)
            if fit is Fit.FITS:
                fitting.append((worker, need))
            elif _HARDNESS[fit] > _HARDNESS[worst]:
                worst = fit
        if not fitting:
            if worst is Fit.MEMORY or worst is Fit.ADAPTER:
                self._needs[request.attempt.request_id] = (capacity, need)
            return worst
        self.chosen = fitting[0] if len(fitting) == 1 else self._prefer(fitting, digest)
        return Fit.FITS

    def _prefer(
        self, fitting: list[tuple[Worker, Need]], digest: AdapterDigest | None
    ) -> tuple[Worker, Need]:
        if digest is not None:
            limit = self._load_limit()
            near = [one for one in fitting if one[0].expects(digest)]
            fitting = [one for one in near if len(one[0].ledger) < limit] or fitting
        return min(fitting, key=lambda one: (one[0].backlog_s, -one[0].ledger.free_blocks))

    def _shortest_queue(self, request: Request) -> Fit:
        worker = min(self._workers, key=lambda w: len(w.ledger))
        self.chosen = worker, self.need(request, worker.capacity)
        return Fit.FITS

    def _load_limit(self) -> int:
        """Requests that a worker may have after taking one more for its adapter's sake."""
        total = 1 + sum(len(worker.ledger) for worker in self._workers)
        return math.ceil(self._config.load_bound * total / len(self._workers))

    # --- hints ----------------------------------------------------------------------------------

    def plan_hints(self, upcoming: Iterable[Request]) -> dict[WorkerId, tuple[Adapter, ...]]:
        """Adapters that each worker should load for the queue: those it does not hold."""
        workers, depth = self._workers, self._config.prefetch_depth
        hints: dict[WorkerId, dict[AdapterDigest, Adapter]] = {w.worker_id: {} for w in workers}
        limit = self._load_limit()
        for request in upcoming:
            adapter = request.adapter
            if adapter is None:
                continue
            near = [w for w in workers if w.expects(adapter.digest) and len(w.ledger) < limit]
            worker = min(
                near or workers,
                key=lambda w: (len(hints[w.worker_id]), w.backlog_s, -w.ledger.free_blocks),
            )
            chosen = hints[worker.worker_id]
            if len(chosen) < depth and not worker.holds(adapter.digest):
                chosen.setdefault(adapter.digest, adapter)
        return {worker_id: tuple(adapters.values()) for worker_id, adapters in hints.items()}


_UNKNOWN: tuple[Capacity, Need] = (Capacity(0, 1, 1, 0, 0), Need(0, None, 0))  # no worker's

# Of two reasons at different workers the one that says more about the request itself is told.
_HARDNESS = {Fit.BATCH_SLOTS: 0, Fit.PREFILL: 1, Fit.MEMORY: 2, Fit.ADAPTER: 3, Fit.FITS: 4}
