"""The simulated engine of one worker: what a step computes, how long it takes, what it gives.

Work per step is one pass over what the step computes, to sum its load, and one to hand out tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench.sim.clients import Work
from bench.sim.hardware import Hardware
from services.core.decisions import StepWork
from services.core.types import Attempt, RequestId
from services.worker.engine.profiles import PartLoad, StepLoad


@dataclass(slots=True, eq=False)
class Live:
    """A request at a worker. Known tokens are computed by steps; the last one gives another."""

    work: Work
    rank: int
    known: int
    position: int  # output tokens, all attempts counted
    computed: int = 0
    passed_layers: int = 0  # by the chunk that comes next
    is_announced: bool = False
    has_token: bool = False  # of this attempt
    is_ended: bool = False  # complete, or not wanted any more

    @property
    def attempt(self) -> Attempt:
        return self.work.request.attempt


def live_of(work: Work) -> Live:
    """A request that has just come."""
    request = work.request
    return Live(
        work,
        rank=request.adapter.rank if request.adapter is not None else 0,
        known=request.context_tokens,
        position=request.prior_output_tokens,
    )


@dataclass(frozen=True, slots=True)
class StepResult:
    """Who got a token, and who leaves: complete, or not wanted any more."""

    sampled: tuple[RequestId, ...]
    ended: tuple[RequestId, ...]
    tokens: tuple[Live, ...]  # as `sampled`, without those not wanted any more
    first_tokens: tuple[Live, ...]  # those among them that had none of this attempt


class Engine:
    """Open sequences and the one step that runs."""

    def __init__(self, hardware: Hardware, *, seed: str) -> None:
        self._hardware = hardware
        self._rng = random.Random(seed)
        self._open: dict[RequestId, Live] = {}
        self._step: list[tuple[Live, StepWork]] = []

    def open(self, live: Live, *, computed_tokens: int = 0) -> None:
        """`computed_tokens`: that a cached prefix has."""
        request_id = live.attempt.request_id
        assert request_id not in self._open
        live.computed, live.passed_layers = computed_tokens, 0
        self._open[request_id] = live

    def close(self, live: Live) -> None:
        """Give up its KV cache, if it has one."""
        if self._open.get(live.attempt.request_id) is live:
            del self._open[live.attempt.request_id]

    def begin_step(self, work: Sequence[StepWork]) -> float:
        """Seconds that the step takes."""
        assert not self._step
        self._step = [(self._open[item.request_id], item) for item in work]
        parts = [self._part(live, item) for live, item in self._step if not _is_whole(live, item)]
        whole = self._step
        if parts:
            whole = [(live, item) for live, item in self._step if _is_whole(live, item)]
        load = _load_of(whole) if whole else None
        return self._hardware.step_s(load, self._rng, parts=parts)

    def _part(self, live: Live, item: StepWork) -> PartLoad:
        num_layers = self._hardware.profile.num_layers
        layers = (item.until_layer or num_layers) - live.passed_layers
        assert layers > 0
        return PartLoad(item.tokens, live.rank, layers / num_layers)

    def end_step(self) -> StepResult:
        """Hand out its tokens."""
        step, self._step = self._step, []
        sampled: list[RequestId] = []
        ended: list[RequestId] = []
        tokens: list[Live] = []
        first_tokens: list[Live] = []
        for live, item in step:
            if item.until_layer is not None:
                live.passed_layers = item.until_layer
                if live.is_ended:
                    ended.append(item.request_id)
                continue
            live.passed_layers = 0
            live.computed += item.tokens
            assert (live.computed == live.known) == item.samples
            if item.samples:
                live.known += 1
                sampled.append(item.request_id)
                if not live.is_ended:
                    live.position += 1
                    tokens.append(live)
                    if not live.has_token:
                        live.has_token = True
                        first_tokens.append(live)
                    live.is_ended = live.position >= live.work.client.output_tokens
            if live.is_ended:
                ended.append(item.request_id)
        return StepResult(tuple(sampled), tuple(ended), tuple(tokens), tuple(first_tokens))


def _is_whole(live: Live, item: StepWork) -> bool:
    """True if it passes all layers in this step."""
    return item.until_layer is None and not live.passed_layers


def _load_of(step: Sequence[tuple[Live, StepWork]]) -> StepLoad:
    """One token is a decode, as for the live engine."""
    prefill_tokens = prefill_rank_tokens = decodes = decode_ranks = cached_tokens = 0
    has_adapters = False
    for live, item in step:
        cached_tokens += live.computed
        rank = live.rank
        if rank:
            has_adapters = True
        if item.tokens == 1:
            decodes += 1
            decode_ranks += rank
        else:
            prefill_tokens += item.tokens
            prefill_rank_tokens += item.tokens * rank
    return StepLoad(
        prefill_tokens, prefill_rank_tokens, decodes, decode_ranks, cached_tokens, has_adapters
    )
