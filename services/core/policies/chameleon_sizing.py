"""What Chameleon learns from its own requests: sizes, cut-offs, the queues' loads and quotas.

§4.3.1 to §4.3.3 of the paper over a window of recent requests; the formulas are in `sizes`,
`clustering` and `quotas` of `services.core`. Between two refreshes nothing changes, so that sizes
and cut-offs are always relative to the same maxima.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from services.core.bounds import require_not_negative, require_positive
from services.core.clustering import Selection, find_cutoffs
from services.core.costs import StepCosts, StepShape
from services.core.policies.ordered import BYPASSES_MAX
from services.core.quotas import Division, QueueLoad, divide
from services.core.sizes import (
    Maxima,
    SizeForm,
    SizeWeights,
    adapter_tokens,
    maxima_of,
    weighted_size,
)
from services.core.types import Request


@dataclass(frozen=True, slots=True)
class ChameleonConfig:
    """Its options. A value with a section is the paper's; the others it leaves open."""

    # Size: the form, A and B (§4.3.1), C, the least that an adapter counts, and the maxima.
    size_form: SizeForm = "degree2"
    input_weight: float = 0.4
    output_weight: float = 0.6
    adapter_weight: float = 0.5
    base_share: float = 1 / 16
    max_quantile: float = 0.999  # of recent requests, for each maximum that is not given
    max_input_tokens: float | None = None
    max_output_tokens: float | None = None
    max_adapter_bytes: float | None = None
    # Queues (§4.3.2): K_max and T_refresh are the paper's; so is the selection "paper".
    k_max: int = 4
    selection: Selection = "elbow"
    elbow: float = 0.1  # least share of the variance that one more queue must explain
    refresh_s: float = 300.0
    first_refresh_requests: int = 64
    window: int = 4096  # recent requests kept; at a refresh, those of the last `refresh_s`
    cluster_sample: int = 512  # of them, clustered
    # Quotas (§4.3.3): the SLO of §5.1, and one weight for each of the `k_max` queues.
    slo_s: float = 5.0
    weights: tuple[float, ...] | None = None
    # Bypass and squash (§4.3.4): at most 5 % of requests are squashed.
    bypass: bool = True
    bypass_scan: int = 16  # younger requests looked at
    squash_fraction: float = 0.05
    squashes_per_request: int = 1
    starvation_s: float = 60.0
    priority_lead_s: float = 30.0

    def __post_init__(self) -> None:
        for name, known in (("size_form", SizeForm), ("selection", Selection)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} must be one of {get_args(known)}")
        require_positive(
            input_weight=self.input_weight,
            output_weight=self.output_weight,
            base_share=self.base_share,
            max_quantile=self.max_quantile,
            max_input_tokens=1.0 if self.max_input_tokens is None else self.max_input_tokens,
            max_output_tokens=1.0 if self.max_output_tokens is None else self.max_output_tokens,
            max_adapter_bytes=1.0 if self.max_adapter_bytes is None else self.max_adapter_bytes,
            k_max=self.k_max,
            refresh_s=self.refresh_s,
            first_refresh_requests=self.first_refresh_requests,
            cluster_sample=self.cluster_sample,
            slo_s=self.slo_s,
            starvation_s=self.starvation_s,
            **{f"weights[{index}]": weight for index, weight in enumerate(self.weights or ())},
        )
        require_not_negative(
            adapter_weight=self.adapter_weight,
            elbow=self.elbow,
            bypass_scan=self.bypass_scan,
            squash_fraction=self.squash_fraction,
            squashes_per_request=self.squashes_per_request,
            priority_lead_s=self.priority_lead_s,
        )
        if max(self.base_share, self.max_quantile, self.squash_fraction) > 1:
            raise ValueError("base_share, max_quantile and squash_fraction are at most 1")
        if self.window < self.first_refresh_requests:
            raise ValueError("window must hold first_refresh_requests")
        if self.bypass_scan > BYPASSES_MAX:
            raise ValueError(f"bypass_scan must be at most {BYPASSES_MAX}")
        if self.weights is not None and len(self.weights) != self.k_max:
            raise ValueError(f"weights must be {self.k_max}, one for each queue")

    @property
    def size_weights(self) -> SizeWeights:
        """What sizes are weighted by."""
        return SizeWeights(
            form=self.size_form,
            input=self.input_weight,
            output=self.output_weight,
            adapter=self.adapter_weight,
            base_share=self.base_share,
        )


class Sizing:
    """Which queue a request belongs to, what queues may have out, how long requests take."""

    def __init__(self, config: ChameleonConfig) -> None:
        self.cutoffs: tuple[float, ...] = ()
        self.refresh_due_s = float("inf")
        self._config = config
        self._weights = config.size_weights
        self._maxima = Maxima(1.0, 1.0, 1.0)
        self._loads = [QueueLoad()]
        self._arrivals: deque[tuple[Request, float]] = deque(maxlen=config.window)  # and when
        self._ended: deque[tuple[Request, float]] = deque(maxlen=config.window)  # and their time
        self._is_refreshed = False
        self.learn(StepCosts())

    @property
    def queues(self) -> int:
        """How many there are."""
        return len(self._loads)

    def learn(self, costs: StepCosts) -> None:
        """What work costs now."""
        self._costs = costs
        self._step_s = costs.step_time_s(StepShape(decode_sequences=round(costs.batch)))

    def arrive(self, request: Request, *, now: float) -> None:
        """Count a request that is queued."""
        config = self._config
        if not self._arrivals:
            self.refresh_due_s = now + config.refresh_s
        self._arrivals.append((request, now))
        if not self._is_refreshed and len(self._arrivals) >= config.first_refresh_requests:
            self.refresh_due_s = now

    def end(self, request: Request, *, time_s: float) -> None:
        """Count a request that ended, so long after its dispatch."""
        self._ended.append((request, time_s))

    def queue_of(self, request: Request) -> int:
        """boundary[i-1] ≤ WRS < boundary[i]; queue 0 has the smallest."""
        if not self.cutoffs:
            return 0
        return bisect_right(self.cutoffs, weighted_size(request, self._maxima, self._weights))

    def time_s(self, request: Request, *, is_near: bool) -> float:
        """Predicted seconds from dispatch to end: load, prompt, and its output at usual steps."""
        adapter, costs = request.adapter, self._costs
        load_s = 0.0 if is_near or adapter is None else costs.load_s(adapter)
        rank = 0 if adapter is None else adapter.rank
        prompt_s = costs.prompt_s(request.context_tokens, rank)
        return load_s + prompt_s + self._step_s * request.remaining_output_tokens

    def divide(self, pool_tokens: int) -> Division:
        """The queues' quotas."""
        config = self._config
        weights = None if config.weights is None else config.weights[: self.queues]
        return divide(pool_tokens, self._loads, slo_s=config.slo_s, weights=weights)

    def refresh(self, *, token_bytes: float, now: float) -> None:
        """New maxima, cut-offs and loads."""
        config, arrivals = self._config, self._arrivals
        self.refresh_due_s, self._is_refreshed = now + config.refresh_s, True
        while len(arrivals) > config.first_refresh_requests:
            if arrivals[0][1] >= now - config.refresh_s:
                break
            arrivals.popleft()
        seen = maxima_of((request for request, _ in arrivals), config.max_quantile)
        self._maxima = Maxima(
            config.max_input_tokens or seen.input_tokens,
            config.max_output_tokens or seen.output_tokens,
            config.max_adapter_bytes or seen.adapter_bytes,
        )
        self.cutoffs = find_cutoffs(
            [weighted_size(request, self._maxima, self._weights) for request, _ in arrivals],
            k_max=config.k_max,
            selection=config.selection,
            elbow=config.elbow,
            sample=config.cluster_sample,
        )
        self._loads = self._measure_loads(token_bytes, now=now)

    def _measure_loads(self, token_bytes: float, *, now: float) -> list[QueueLoad]:
        """S and λ of each queue by those that came, D by those that ended, else as predicted.

        A rate is measured over one SLO at least: a burst at one instant has none.
        """
        came: list[list[Request]] = [[] for _ in range(len(self.cutoffs) + 1)]
        measured_s: list[list[float]] = [[] for _ in came]
        for request, _ in self._arrivals:
            came[self.queue_of(request)].append(request)
        for request, time_s in self._ended:
            measured_s[self.queue_of(request)].append(time_s)
        span_s = max(now - self._arrivals[0][1], self._config.slo_s)
        return [
            QueueLoad(
                max((_all_tokens(one, token_bytes) for one in requests), default=0),
                _mean(times_s or [self.time_s(one, is_near=False) for one in requests]),
                len(requests) / span_s,
            )
            for requests, times_s in zip(came, measured_s, strict=True)
        ]


def kv_tokens(request: Request) -> int:
    """KV cache that this attempt is expected to fill: its context and predicted output."""
    return request.context_tokens + request.remaining_output_tokens


def _all_tokens(request: Request, token_bytes: float) -> int:
    return kv_tokens(request) + adapter_tokens(request.adapter, token_bytes)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
