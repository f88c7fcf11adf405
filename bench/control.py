"""How fast the scheduler's core decides: submit + dispatch + finish cycles per second.

One process, no transport: the very ClusterScheduler with many requests queued. A cycle submits one
request, reports another one finished and so lets the policy dispatch a third.
"""

import gc
import statistics
import time
from collections import deque
from typing import Final

from bench.report import Report, Row, Target
from services.core.cluster import ClusterScheduler
from services.core.config import ClusterConfig
from services.core.decisions import Dispatch
from services.core.events import (
    GatewayAttached,
    RequestFinished,
    RequestPrefilled,
    RequestStarted,
    RequestSubmitted,
    WorkerAttached,
)
from services.core.policies import POLICY_NAMES, build_policy
from services.core.types import (
    Adapter,
    AdapterDigest,
    Attempt,
    Capacity,
    GatewayId,
    Request,
    RequestId,
    TenantId,
    WorkerId,
)

_GATEWAY: Final = GatewayId("gateway")
_QUEUED: Final = (100, 10_000, 100_000)
_ADAPTERS: Final = 500
_GAP_S: Final = 1e-4  # between two arrivals
_RANKS: Final = (8, 16, 32, 64, 128)
_CAPACITY: Final = Capacity(
    pool_blocks=3750,
    block_bytes=16 * 2**19,
    block_tokens=16,
    max_requests=256,
    max_context_tokens=4096,
)


def run(*, quick: bool) -> Report:
    """Cycles per second of each policy at several queue lengths, the median of some rounds."""
    rounds, cycles = (3, 2_000) if quick else (7, 5_000)
    rows: list[Row] = []
    for policy in POLICY_NAMES:
        row: Row = {"policy": policy}
        for queued in _QUEUED:
            rates = _measure(policy, queued=queued, rounds=rounds, cycles=cycles)
            row[f"at {queued:,}"] = round(statistics.median(rates))
            row[f"spread at {queued:,}"] = f"{min(rates):.0f}-{max(rates):.0f}"
        rows.append(row)
    default = next(row for row in rows if row["policy"] == "adaptive")
    ratio = default["at 100,000"] / default["at 100"]
    return Report(
        rows,
        [
            Target("adaptive: cycles with 10,000 queued", 20_000, default["at 10,000"], "1/s"),
            Target("adaptive: rate at 100,000 queued over that at 100", 0.5, ratio, "x"),
        ],
    )


def _measure(policy: str, *, queued: int, rounds: int, cycles: int) -> list[float]:
    """Fill the queue, then run cycles at its constant length."""
    core = ClusterScheduler(ClusterConfig(queue_limit=2 * queued), build_policy(policy))
    stream = _Stream(core)
    stream.attach()
    while stream.queued < queued:
        stream.submit(stream.make())
    rates: list[float] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            requests = [stream.make() for _ in range(cycles)]  # reading them is the shell's work
            begin_s = time.perf_counter()
            for request in requests:
                stream.submit(request)
                stream.finish()
            rates.append(cycles / (time.perf_counter() - begin_s))
    finally:
        gc.enable()
    return rates


class _Stream:
    """Requests of mixed sizes, adapters and tenants, and workers that end the oldest one."""

    def __init__(self, core: ClusterScheduler) -> None:
        self._core = core
        self._made = self._count = 0
        self._ended = 0
        self._now = 0.0
        self._running: deque[tuple[WorkerId, Attempt]] = deque()
        digests = [AdapterDigest(f"sha256:{index:064x}") for index in range(_ADAPTERS)]
        self._adapters = [
            Adapter(digest, _RANKS[index % 5], _RANKS[index % 5] * 2**21)
            for index, digest in enumerate(digests)
        ]

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._count - self._ended - len(self._running)

    def attach(self) -> None:
        """Two workers and a gateway."""
        self._core.handle(GatewayAttached(_GATEWAY, ()), now=self._now)
        for name in ("worker-1", "worker-2"):
            attached = WorkerAttached(WorkerId(name), _CAPACITY, (), (), draining=False)
            self._core.handle(attached, now=self._now)

    def make(self) -> Request:
        """One more request; lengths and adapters by multiplicative hashing, the same every time."""
        self._made += 1
        mix = self._made * 2_654_435_761 % 2**32
        output_tokens = 8 + mix % 211
        return Request(
            attempt=Attempt(RequestId(f"request-{self._made}")),
            gateway_id=_GATEWAY,
            tenant_id=TenantId("default"),
            adapter=self._adapters[mix % _ADAPTERS],
            context_tokens=16 + mix % 700,
            prior_output_tokens=0,
            max_output_tokens=512,
            predicted_output_tokens=output_tokens,
            output_tokens_q90=2 * output_tokens,
            priority=0,
            arrived_s=self._made * _GAP_S,
            deadline_s=None,
        )

    def submit(self, request: Request) -> None:
        """It arrives."""
        self._count += 1
        self._now = request.arrived_s
        self._perform(RequestSubmitted(request))

    def finish(self) -> None:
        """The request that runs longest ends."""
        worker_id, attempt = self._running.popleft()
        self._ended += 1
        self._perform(RequestFinished(worker_id, attempt, output_tokens=100))

    def _perform(self, event: RequestSubmitted | RequestFinished) -> None:
        dispatched = self._core.handle(event, now=self._now)
        for decision in dispatched:
            if isinstance(decision, Dispatch):
                self._running.append((decision.worker_id, decision.attempt))
                for follow in (RequestStarted, RequestPrefilled):
                    self._perform_quietly(follow(decision.worker_id, decision.attempt))

    def _perform_quietly(self, event: RequestStarted | RequestPrefilled) -> None:
        for decision in self._core.handle(event, now=self._now):
            if isinstance(decision, Dispatch):
                self._running.append((decision.worker_id, decision.attempt))
                for follow in (RequestStarted, RequestPrefilled):
                    self._perform_quietly(follow(decision.worker_id, decision.attempt))
