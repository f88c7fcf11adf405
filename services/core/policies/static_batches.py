"""Static batches: who runs with whom, when all requests are there and a batch runs to its end.

UELLM's SLO-ODBS family (2409.14961) and the two it was compared with. All are next-fit: requests
are taken in order, and one that may not join the batch closes it and opens the next.

`form="published"`, as the paper is described: sorted by SLO (by length if w1 = 0); one joins while

    w1·T_l + w2·T_o <= batch_threshold
    T_l = Σ (SLO_i    + L_CM) · (|batch| + 1) · L1
    T_o = Σ (length_i + O_CM) · (|batch| + 1) · L2

with L_CM and O_CM those of the member with the largest composite metric w1·SLO + w2·length; then
the batches go by their smallest SLO. Left open there and chosen here: the sums run over the members
and the one that asks, an empty batch takes anybody, and `batch_threshold`, such that ten requests
of 150 s and 150 tokens just fill a batch: 2·10·10·1.2·(150 + 0.5·150) = 54,000.

`form="implemented"`, as the authors' code does it: sorted by the composite metric itself; one joins
while (its length - the longest in the batch)·(|batch| + 1)·L2 <= gap_threshold, its SLO in place of
its length if w2 = 0. With the code's 15,000 a batch of nine is closed by a jump of 1,250 tokens, so
in effect these are chunks of `cap` of a sorted list, which is what the published logs show.

SLO-DBS is w2 = 0, ODBS is w1 = 0. The code knows true lengths; here they are predicted ones.
S3 and Morphling are rebuilt as that experiment has them, not as their own papers do.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from services.core.bounds import require_not_negative, require_positive
from services.core.types import Request

Batch = tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class UellmConfig:
    """Weights and limits of a batch. Defaults are the code's, where it has them."""

    form: Literal["published", "implemented"] = "implemented"
    slo_weight: float = 1.0  # w1, the code's a
    length_weight: float = 0.5  # w2, the code's b; 0.3 in its UELLM-batch
    slo_overhead: float = 1.2  # L1; the code has one for both
    length_overhead: float = 1.2  # L2
    batch_threshold: float = 54_000.0  # of the published form
    gap_threshold: float = 15_000.0  # of the implemented form
    cap: int = 10  # 18 in its UELLM.py
    default_slo_s: float = 60.0  # of a request without a deadline
    # Live only, see `services.core.policies.uellm`.
    max_wait_s: float = 30.0  # who waited longer opens the next batch
    waits_for_batch: bool = False  # a batch begins when the one before has ended

    def __post_init__(self) -> None:
        require_not_negative(slo_weight=self.slo_weight, length_weight=self.length_weight)
        require_positive(
            slo_weight_plus_length_weight=self.slo_weight + self.length_weight,
            slo_overhead=self.slo_overhead,
            length_overhead=self.length_overhead,
            batch_threshold=self.batch_threshold,
            gap_threshold=self.gap_threshold,
            cap=self.cap,
            default_slo_s=self.default_slo_s,
            max_wait_s=self.max_wait_s,
        )

    @property
    def name(self) -> str:
        """Which of the family the weights make it."""
        if self.length_weight == 0:
            return "slo_dbs"
        return "odbs" if self.slo_weight == 0 else "slo_odbs"

    def slo_s(self, request: Request) -> float:
        """How long it may take from its arrival."""
        if request.deadline_s is None:
            return self.default_slo_s
        return max(0.0, request.deadline_s - request.arrived_s)

    def metric(self, request: Request) -> float:
        """The composite metric."""
        length = request.remaining_output_tokens
        return self.slo_weight * self.slo_s(request) + self.length_weight * length

    def key(self, request: Request) -> tuple[float, float, float]:
        """The order that batches are filled in: priority, then as the form says, then arrival."""
        if self.form == "implemented":
            place = self.metric(request)
        elif self.slo_weight > 0:
            place = self.slo_s(request)
        else:
            place = float(request.remaining_output_tokens)
        return (-request.priority, place, request.arrived_s)


@dataclass(slots=True)
class OpenBatch:
    """A batch that may grow, and the sums that decide it."""

    config: UellmConfig
    members: list[Request] = field(default_factory=list[Request])
    slo_sum_s: float = 0.0
    length_sum: int = 0
    slowest_s: float = 0.0
    longest: int = 0
    worst: Request | None = None  # the member with the largest composite metric

    def admits(self, request: Request) -> bool:
        """True if it may join."""
        if not self.members:
            return True
        if len(self.members) >= self.config.cap:
            return False
        if self.config.form == "implemented":
            return self._is_near(request)
        return self._is_light(request)

    def add(self, request: Request) -> None:
        """It joins."""
        self.members.append(request)
        slo_s, length = self.config.slo_s(request), request.remaining_output_tokens
        self.slo_sum_s += slo_s
        self.length_sum += length
        self.slowest_s = max(self.slowest_s, slo_s)
        self.longest = max(self.longest, length)
        if self.worst is None or self.config.metric(request) > self.config.metric(self.worst):
            self.worst = request

    def _is_near(self, request: Request) -> bool:
        config, size = self.config, len(self.members) + 1
        if config.length_weight > 0:
            gap = (request.remaining_output_tokens - self.longest) * config.length_overhead
        else:
            gap = (config.slo_s(request) - self.slowest_s) * config.slo_overhead
        return gap * size <= config.gap_threshold

    def _is_light(self, request: Request) -> bool:
        config, size, worst = self.config, len(self.members) + 1, self.worst
        assert worst is not None
        slos_s = self.slo_sum_s + config.slo_s(request) + size * config.slo_s(worst)
        lengths = self.length_sum + request.remaining_output_tokens
        lengths += size * worst.remaining_output_tokens
        cost = config.slo_weight * config.slo_overhead * slos_s
        cost += config.length_weight * config.length_overhead * lengths
        return cost * size <= config.batch_threshold


def form_batches(requests: Iterable[Request], config: UellmConfig) -> tuple[Batch, ...]:
    """UELLM's batches of requests that are all there, in the order in which they run."""
    batches: list[OpenBatch] = []
    for request in sorted(requests, key=config.key):
        if not batches or not batches[-1].admits(request):
            batches.append(OpenBatch(config))
        batches[-1].add(request)
    formed = [tuple(batch.members) for batch in batches]
    if config.form == "published" and config.slo_weight > 0:
        formed.sort(key=lambda batch: min(map(config.slo_s, batch)))
    return tuple(formed)


def s3_batches(
    requests: Iterable[Request], *, tokens: int = 1024, cap: int = 20
) -> tuple[Batch, ...]:
    """S3: by predicted length, up to so many output tokens and members to a batch."""
    ordered = sorted(requests, key=lambda request: request.remaining_output_tokens)
    return _next_fit(ordered, lambda batch: len(batch) <= cap and _length(batch) <= tokens)


def morphling_batches(requests: Sequence[Request], *, size: int = 10) -> tuple[Batch, ...]:
    """Morphling: batches of that size, as the requests come."""
    return _next_fit(requests, lambda batch: len(batch) <= size)


def _next_fit(
    ordered: Iterable[Request], may_run: Callable[[list[Request]], bool]
) -> tuple[Batch, ...]:
    batches: list[list[Request]] = []
    for request in ordered:
        if batches and may_run([*batches[-1], request]):
            batches[-1].append(request)
        else:
            batches.append([request])
    return tuple(map(tuple, batches))


def _length(batch: list[Request]) -> int:
    return sum(request.remaining_output_tokens for request in batch)
