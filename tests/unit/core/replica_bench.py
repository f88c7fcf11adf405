"""A worker's machine on a bench: its engine ends steps and loads when a test says so."""

from typing import TypeVar

from services.core.config import ReplicaConfig
from services.core.costs import StepCosts, StepShape
from services.core.decisions import ReplicaDecision, RunStep
from services.core.events import HostCacheChanged, ReplicaEvent, RequestDispatched
from services.core.replica import ReplicaScheduler
from services.core.types import Adapter, Capacity, Request, RequestId
from tests.unit.core.core_world import CheckingEngine, capacity, without_blocks

D = TypeVar("D", bound=ReplicaDecision)


def token_capacity(tokens: int, *, requests: int = 16) -> Capacity:
    """A worker of so many blocks of one token and 1,000 bytes, as S-LoRA's cells are."""
    return Capacity(tokens, 1000, 1, requests, 1000)


class Bench:
    """A machine, an engine that checks its orders, and a clock. Loads end at once."""

    def __init__(
        self,
        *,
        blocks: int = 100,
        slots: int = 16,
        limits: Capacity | None = None,
        config: ReplicaConfig | None = None,
        prior: StepCosts | None = None,
    ) -> None:
        limits = limits or capacity(blocks, requests=slots)
        config = config or ReplicaConfig()
        self.machine = ReplicaScheduler(config, limits, prior=prior)
        self.engine = CheckingEngine(limits, config)
        self.outputs: dict[RequestId, int] = {}
        self.log: list[ReplicaDecision] = []
        self.now = 0.0

    def handle(self, event: ReplicaEvent) -> list[ReplicaDecision]:
        decisions = self.machine.handle(event, now=self.now)
        self.machine.check_integrity()
        self.engine.perform(decisions)
        plain = without_blocks(decisions)
        self.log += plain
        self.now += 1e-6  # what comes later was used later
        return plain

    def dispatch(self, new: Request, *, output: int | None = None) -> list[ReplicaDecision]:
        self.outputs[new.attempt.request_id] = output or new.max_output_tokens
        self.engine.receive(new)
        return self.handle(RequestDispatched(new))

    def bring_near(self, *adapters: Adapter) -> None:
        """These are in host memory."""
        self.engine.near = frozenset(one.digest for one in adapters)
        self.handle(HostCacheChanged(self.engine.near))

    def progress(
        self, coming: Adapter, layers: int, *, after_s: float = 1.0
    ) -> list[ReplicaDecision]:
        """So many layers of a coming adapter can be used, that time later."""
        self.now += after_s
        return self.handle(self.engine.progress(coming.digest, layers))

    def load_all(self) -> None:
        while self.engine.loading:
            self.handle(self.engine.finish_load(next(iter(self.engine.loading))))

    def step(self, *, takes_s: float = 0.0) -> list[ReplicaDecision]:
        """The outstanding step ends."""
        self.now += takes_s
        return self.handle(self.engine.finish_step(self.outputs))

    def run(self, *, steps: int = 10_000, costs: StepCosts | None = None) -> None:
        """Until nothing is left to do. Steps take as long as `costs` say."""
        for _ in range(steps):
            self.load_all()
            if self.engine.step is None:
                return
            self.step(takes_s=costs.step_time_s(self.shape()) if costs else 0.0)

    def shape(self) -> StepShape:
        """What the outstanding step computes, counted by the engine."""
        assert self.engine.step is not None
        prefill = ranks = decodes = decode_ranks = cached = 0
        for work in self.engine.step:
            [current] = [one for one in self.engine.open if one.request_id == work.request_id]
            source, known_tokens = self.engine.known[current]
            rank = source.adapter.rank if source.adapter is not None else 0
            cached += self.engine.open[current]
            if known_tokens - self.engine.open[current] == 1:
                decodes, decode_ranks = decodes + 1, decode_ranks + rank
            else:
                prefill, ranks = prefill + work.tokens, ranks + work.tokens * rank
        return StepShape(prefill, ranks, decodes, decode_ranks, cached)

    def resident(self) -> list[str]:
        return sorted(one.digest for one in self.machine.snapshot().resident)

    def of(self, kind: type[D]) -> list[D]:
        return [decision for decision in self.log if isinstance(decision, kind)]

    def steps(self) -> list[str]:
        """Each step so far as "name:tokens …"."""
        return [
            " ".join(f"{work.request_id}:{work.tokens}" for work in step.work)
            for step in self.of(RunStep)
        ]
