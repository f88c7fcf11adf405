"""A worker as the cluster machine sees it: what it was given, what it holds, whether it listens."""

from dataclasses import dataclass

from services.core.events import ResidentAdapter, RunningRequest, WorkerAttached
from services.core.ledger import Ledger, Need, need_of
from services.core.snapshots import WorkerSnapshot
from services.core.types import Adapter, AdapterDigest, Attempt, GatewayId, Request


@dataclass(slots=True)
class Placed:
    """A request at a worker. While it is aborted it still holds its memory there."""

    gateway_id: GatewayId
    need: Need
    abort_cause: str | None = None


class Worker:
    """One worker's ledger and the facts that it reported."""

    def __init__(self, event: WorkerAttached) -> None:
        self.worker_id = event.worker_id
        self.capacity = event.capacity
        self.ledger = Ledger(event.capacity)
        self.placed: dict[Attempt, Placed] = {}
        self.is_attached = True
        self.is_draining = event.draining
        self.hinted: dict[AdapterDigest, Adapter] = {}  # most urgent first
        self._resident: dict[AdapterDigest, ResidentAdapter] = {}
        self.report(event.resident, is_draining=event.draining)

    @property
    def is_open(self) -> bool:
        """True while it takes requests."""
        return self.is_attached and not self.is_draining

    def report(self, resident: tuple[ResidentAdapter, ...], *, is_draining: bool) -> None:
        """Take over what the worker says it holds."""
        self._resident = {adapter.digest: adapter for adapter in resident}
        self.is_draining = is_draining

    def start(self, attempt: Attempt) -> None:
        """A request runs its first step, so its adapter is here."""
        placed = self.placed.get(attempt)
        if placed is not None and placed.need.adapter is not None:
            digest, blocks = placed.need.adapter, placed.need.adapter_blocks
            self._resident.setdefault(digest, ResidentAdapter(digest, blocks, users=1))

    def holds(self, digest: AdapterDigest) -> bool:
        """True if the adapter is here or on its way for a request."""
        return digest in self._resident or self.ledger.uses(digest)

    def expects(self, digest: AdapterDigest) -> bool:
        """True if the adapter is here or on its way, for a request or as hinted."""
        return digest in self.hinted or self.holds(digest)

    def place(self, request: Request) -> None:
        """Charge a dispatched request."""
        self._put(request.attempt, Placed(request.gateway_id, need_of(request, self.capacity)))

    def adopt(self, running: RunningRequest) -> Placed:
        """Charge a request that the worker announced. A loading adapter's size is not known."""
        tokens = running.context_tokens + running.remaining_output_tokens
        tokens = min(tokens, self.capacity.max_context_tokens)
        digest = running.adapter_digest
        resident = self._resident.get(digest) if digest is not None else None
        need = Need(self.capacity.kv_blocks(tokens), digest, resident.blocks if resident else 0)
        return self._put(running.attempt, Placed(running.gateway_id, need))

    def keep(self, attempt: Attempt, placed: Placed) -> None:
        """Charge a request as it was charged before the worker came back."""
        self._put(attempt, placed)

    def remove(self, attempt: Attempt) -> Placed:
        """Give back what the request was charged."""
        self.ledger.release(attempt)
        return self.placed.pop(attempt)

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
        """Assert that ledger and placed requests agree."""
        self.ledger.check_integrity()
        assert len(self.ledger) == len(self.placed)
        assert all(attempt in self.ledger for attempt in self.placed)

    def _put(self, attempt: Attempt, placed: Placed) -> Placed:
        self.ledger.reserve(attempt, placed.need)
        self.placed[attempt] = placed
        return placed
