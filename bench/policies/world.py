"""The worlds that policies are compared in: calibration, traffic, card, and one run in them.

Calibration: Llama-7B on the A40 profile (60,000 KV tokens), 100 adapters of ranks 8 to 128,
lengths of the Azure conversation trace times one constant, Poisson arrivals. The paper scales
lengths to its card too, but gives no constant. Here it is the one at which S-LoRA as coded has its
TTFT knee where the paper has it, at 8.6 requests/s. That constant depends on what clients let their
requests generate, because S-LoRA reserves it; so there are three calibrations:

- `main`: 1,000 tokens, the trace's own cap (its longest output is exactly that).
- `context`: 2,048 tokens, Llama-7B's context window: clients that set no limit.
- `scaled`: the cap is scaled with the lengths. Reservation then does not bind.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from bench.sim import (
    Fault,
    Hardware,
    Oracle,
    PredictorKind,
    Result,
    Scenario,
    Window,
    hardware,
    simulate,
)
from bench.sim.records import percentile
from bench.workload import Poisson, Workload, build
from services.core.systems import SYSTEMS, System

CARD: Final = "a40-llama-7b"
SMALL_CARD: Final = "a40-24g-llama-7b"
_RUNS_PER_CPU_S: Final = 3000.0  # requests, about


@dataclass(frozen=True, slots=True)
class World:
    """All of a run but system, rate and seed."""

    name: str
    workload: Workload
    hardware: Hardware = field(default_factory=lambda: hardware(CARD))
    predictor: PredictorKind = field(default_factory=Oracle)
    workers: int = 1
    faults: tuple[Fault, ...] = ()
    warmup_s: float = 60.0
    drain_s: float = 300.0

    def lasting(self, duration_s: float) -> "World":
        """The same for so long; short ones warm up for a tenth of it."""
        workload = replace(self.workload, duration_s=duration_s)
        return replace(self, workload=workload, warmup_s=min(60.0, duration_s / 10))

    def scenario(
        self, system: System, rate_rps: float, seed: int, *, sample_s: float | None = None
    ) -> Scenario:
        """One run. The rate is that of all workers together."""
        workload = replace(
            self.workload, arrivals=replace(self.workload.arrivals, rate_rps=rate_rps)
        )
        return Scenario(
            system=system,
            hardware=self.hardware,
            trace=build(workload, seed=seed),
            workers=self.workers,
            predictor=self.predictor,
            faults=self.faults,
            seed=seed,
            window=Window(self.warmup_s, self.drain_s),
            sample_s=sample_s,
        )


def _calibration(name: str, scale: float, max_output: Literal["trace_max"] | int) -> World:
    workload = Workload(arrivals=Poisson(6.0), scale=scale, max_output=max_output)
    return World(name, workload)


MAIN: Final = _calibration("main", 0.195, 1000)
CONTEXT: Final = _calibration("context", 0.16, 2048)
SCALED: Final = _calibration("scaled", 0.225, "trace_max")
CALIBRATIONS: Final = (MAIN, CONTEXT, SCALED)


@dataclass(frozen=True, slots=True)
class Run:
    """A job: one run, summed up."""

    world: World
    system: str | System
    rate_rps: float
    seed: int = 0

    @property
    def cost_s(self) -> float:
        return self.rate_rps * self.world.workload.duration_s / _RUNS_PER_CPU_S

    def run(self) -> dict[str, Any]:
        """The run's summary, and a few figures more."""
        result = simulate(self.world.scenario(system_of(self.system), self.rate_rps, self.seed))
        return result.summary() | _more(result)


def system_of(system: str | System) -> System:
    """A system by its name, or as it is."""
    return SYSTEMS[system] if isinstance(system, str) else system


def _more(result: Result) -> dict[str, float]:
    """Times to first token if every request were alone, its adapter loaded; mean step."""
    alone_s = [record.isolated_warm_s for record in result.measured]
    busy_s = sum(worker.busy_s for worker in result.workers)
    return {
        "p50_alone_s": percentile(alone_s, 0.5),
        "p99_alone_s": percentile(alone_s, 0.99),
        "mean_step_s": busy_s / max(1, sum(worker.steps for worker in result.workers)),
    }
