"""A worker as the cluster machine sees it: what it was given, what it holds, whether it listens."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from services.core.costs import StepCosts
from services.core.events import ResidentAdapter, RunningRequest, WorkerAttached
from services.core.ledger import Ledger, Need
from services.core.snapshots import WorkerSnapshot
from services.core.types import Adapter, AdapterDigest, Attempt, Capacity, GatewayId, Request

_PACE_WEIGHT = 0.1  # of the last request in the mean seconds per output token


@dataclass(slots=True)
class Placed:
    """A request at a worker. While it is aborted it still holds its memory there."""

    gateway_id: GatewayId
    need: Need
    output_tokens: int = 1  # expected of this attempt
    since_s: float = 0.0
    prompt_s: float = 0.0  # of the worker's time, until its prompt is computed; then 0
    is_computing: bool = False  # its prompt is among those that the worker has to compute
    abort_cause: str | None = None


class Watcher(Protocol):
    """Is told what changes at a worker."""

    def note_load(self, worker: "Worker") -> None:
        """Its requests, backlog or promised memory."""
        ...

    def note_adapter(self, worker: "Worker", digest: AdapterDigest) -> None:
        """Whether it expects an adapter."""
        ...


class Worker:
    """One worker's ledger and the facts that it reported."""

    def __init__(self, event: WorkerAttached, watcher: Watcher) -> None:
        self.worker_id = event.worker_id
        self.capacity: Capacity = event.capacity
        self.ledger = Ledger(event.capacity)
        self.placed: dict[Attempt, Placed] = {}
        self.is_attached = True
        self.is_draining = event.draining
        self.hinted: dict[AdapterDigest, Adapter] = {}  # most urgent first
        self._watcher = watcher
        self.costs = StepCosts()
        self.backlog_s = 0.0  # prompts here that wait to be computed, in seconds of its time
        self._computing = 0  # how many they are
        self._pace_s = self.costs.step_s  # per output token, of requests that have ended
        self._resident: dict[AdapterDigest, ResidentAdapter] = {}
        self.report(event.resident, is_draining=event.draining)

    @property
    def is_open(self) -> bool:
        """True while it takes requests."""
        return self.is_attached and not self.is_draining

    def report(
        self,
        resident: tuple[ResidentAdapter, ...],
        *,
        is_draining: bool,
        costs: StepCosts | None = None,
    ) -> None:
        """Take over what the worker says it holds and measured."""
        before, self._resident = self._resident, {one.digest: one for one in resident}
        self.is_draining = is_draining
        self.costs = costs or self.costs
        for digest in before.keys() ^ self._resident.keys():
            self._watcher.note_adapter(self, digest)

    def hint(self, adapters: Iterable[Adapter]) -> None:
        """It was told to expect these, most urgent first, and no others."""
        before, self.hinted = self.hinted, {adapter.digest: adapter for adapter in adapters}
        for digest in before.keys() ^ self.hinted.keys():
            self._watcher.note_adapter(self, digest)

    def expects(self, digest: AdapterDigest) -> bool:
        """True if the adapter is here or on its way, for a request or as hinted."""
        return digest in self._resident or self.ledger.uses(digest) or digest in self.hinted

    def expected(self) -> set[AdapterDigest]:
        """All adapters that `expects` is true of."""
        charged = (placed.need.adapter for placed in self.placed.values())
        used = {digest for digest in charged if digest is not None}
        return used | self._resident.keys() | self.hinted.keys()

    # --- the life of a request here -------------------------------------------------------------

    def place(self, request: Request, need: Need, *, now: float) -> None:
        """Charge a dispatched request. A prompt counts as backlog once its adapter is here."""
        adapter = request.adapter
        rank = adapter.rank if adapter is not None else 0
        token_s = self.costs.prefill_token_s + self.costs.prefill_rank_token_s * rank
        placed = Placed(
            request.gateway_id,
            need,
            request.remaining_output_tokens,
            now,
            token_s * request.context_tokens,
        )
        if adapter is None or adapter.digest in self._resident:
            self._count(placed)
        self._put(request.attempt, placed)

    def start(self, attempt: Attempt) -> None:
        """A request runs its first step, so its adapter is here."""
        placed = self.placed.get(attempt)
        if placed is None:
            return
        if placed.prompt_s and not placed.is_computing:
            self._count(placed)
            self._watcher.note_load(self)
        if (digest := placed.need.adapter) is not None:
            blocks = placed.need.adapter_blocks
            self._resident.setdefault(digest, ResidentAdapter(digest, blocks, users=1))

    def end_prefill(self, attempt: Attempt) -> None:
        """A request's prompt is computed."""
        placed = self.placed.get(attempt)
        if placed is not None:
            self._uncount(placed)
            placed.prompt_s = 0.0
            self._watcher.note_load(self)

    def adopt(self, running: RunningRequest) -> Placed:
        """Charge a request that the worker announced. A loading adapter's size is not known."""
        tokens = running.context_tokens + running.remaining_output_tokens
        tokens = min(tokens, self.capacity.max_context_tokens)
        digest = running.adapter_digest
        resident = self._resident.get(digest) if digest is not None else None
        need = Need(self.capacity.kv_blocks(tokens), digest, resident.blocks if resident else 0)
        placed = Placed(running.gateway_id, need, running.remaining_output_tokens)
        return self._put(running.attempt, placed)

    def keep(self, attempt: Attempt, placed: Placed) -> None:
        """Charge a request as it was charged before the worker came back; its prompt is done."""
        placed.prompt_s, placed.is_computing = 0.0, False
        self._put(attempt, placed)

    def remove(self, attempt: Attempt) -> Placed:
        """Give back what the request was charged."""
        self.ledger.release(attempt)
        placed = self.placed.pop(attempt)
        self._uncount(placed)
        self._tell(placed)
        return placed

    def measure(self, attempt: Attempt, output_tokens: int, *, now: float) -> None:
        """A request has ended: learn how long an output token takes here."""
        placed = self.placed.get(attempt)
        if placed is not None and output_tokens > 1 and placed.since_s > 0.0:
            pace_s = max(0.0, now - placed.since_s) / output_tokens
            self._pace_s += _PACE_WEIGHT * (min(pace_s, 4 * self._pace_s) - self._pace_s)

    def free_in_s(self, need: Need, *, now: float) -> float:
        """Predicted seconds until it has memory for the need, if nothing else comes."""
        uncharged = 0 if need.adapter is None or self.ledger.uses(need.adapter) else 1
        short_blocks = need.kv_blocks + uncharged * need.adapter_blocks - self.ledger.free_blocks
        if short_blocks <= 0:
            return 0.0
        ends = sorted(
            (placed.since_s + placed.prompt_s + placed.output_tokens * self._pace_s, index)
            for index, placed in enumerate(self.placed.values())
        )
        blocks = [placed.need.kv_blocks for placed in self.placed.values()]
        for end_s, index in ends:
            short_blocks -= blocks[index]
            if short_blocks <= 0:
                return max(0.0, end_s - now)
        return float("inf")

    def snapshot(self) -> WorkerSnapshot:
        """The present state, for reports."""
        return WorkerSnapshot(
            worker_id=self.worker_id,
            capacity=self.capacity,
            dispatched=len(self.placed),
            reserved_blocks=self.ledger.reserved_blocks,
            attached=self.is_attached,
            draining=self.is_draining,
            resident=tuple(self._resident.values()),
        )

    def check_integrity(self) -> None:
        """Assert that ledger, backlog and placed requests agree."""
        self.ledger.check_integrity()
        assert len(self.ledger) == len(self.placed)
        assert all(attempt in self.ledger for attempt in self.placed)
        computing = [placed.prompt_s for placed in self.placed.values() if placed.is_computing]
        assert len(computing) == self._computing
        assert abs(sum(computing) - self.backlog_s) <= 1e-6 * (1.0 + self.backlog_s)

    def _put(self, attempt: Attempt, placed: Placed) -> Placed:
        self.ledger.reserve(attempt, placed.need)
        self.placed[attempt] = placed
        self._tell(placed)
        return placed

    def _tell(self, placed: Placed) -> None:
        """A request has come or gone."""
        self._watcher.note_load(self)
        if placed.need.adapter is not None:
            self._watcher.note_adapter(self, placed.need.adapter)

    def _count(self, placed: Placed) -> None:
        placed.is_computing = True
        self._computing += 1
        self.backlog_s += placed.prompt_s

    def _uncount(self, placed: Placed) -> None:
        if placed.is_computing:
            placed.is_computing = False
            self._computing -= 1
            # Exactly zero when nothing is left: rounding must not pile up.
            self.backlog_s = self.backlog_s - placed.prompt_s if self._computing else 0.0
