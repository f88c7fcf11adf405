"""Many workers, many adapters, and what goes wrong among a few."""

import time
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

from bench.policies.extent import Extent
from bench.policies.jobs import Findings, Job, Key, Results, Section
from bench.policies.world import MAIN, Run, World
from bench.report import Row, Target
from bench.sim import Fault, StoreDown, StoreSlow, WorkerLoss, WorkerSlow
from bench.workload import AdapterPool

_RPS_PER_WORKER: Final = 8.0
_FLEETS: Final = ((64, 100), (256, 100), (64, 100_000))  # workers, adapters
_FAULTY_WORKERS: Final = 4
_FAULT_SYSTEMS: Final = ("fifo", "adaptive")


@dataclass(frozen=True, slots=True)
class Timed:
    """A job: a run, and the CPU time it takes."""

    job: Run

    @property
    def cost_s(self) -> float:
        return 2 * self.job.cost_s

    def run(self) -> dict[str, Any]:
        begin_s = time.process_time()
        return self.job.run() | {"cpu_s": time.process_time() - begin_s}


def scale(extent: Extent) -> Section:
    """The default system on fleets, at the same load per worker."""
    jobs: dict[Key, Job] = {
        fleet: Timed(Run(_fleet(*fleet, extent.scale_s), "adaptive", _RPS_PER_WORKER * fleet[0]))
        for fleet in _FLEETS
    }
    return Section("scale", jobs, lambda results: Findings(_scale_rows(results)))


def faults(extent: Extent) -> Section:
    """Four workers, and one thing that goes wrong in the middle third of the run."""
    third_s = extent.fault_s / 3
    jobs: dict[Key, Job] = {
        (name, system): Run(world, system, _RPS_PER_WORKER * _FAULTY_WORKERS)
        for (name, world), system in product(_faulty(third_s).items(), _FAULT_SYSTEMS)
    }
    return Section("faults", jobs, _fault_findings)


def _fleet(workers: int, adapters: int, duration_s: float) -> World:
    seconds = duration_s / (3 if workers > 100 else 1)
    workload = replace(MAIN.workload, pool=AdapterPool(adapters))
    return replace(MAIN, workload=workload, workers=workers).lasting(seconds)


def _faulty(third_s: float) -> dict[str, World]:
    begin_s, end_s = third_s, 2 * third_s
    cases: dict[str, tuple[Fault, ...]] = {
        "none": (),
        "worker lost, back later": (WorkerLoss(0, begin_s, back_s=end_s),),
        "worker 3x slower": (WorkerSlow(0, begin_s, end_s, factor=3.0),),
        "store 20x slower": (StoreSlow(begin_s, end_s, factor=20.0),),
        "store down": (StoreDown(begin_s, end_s),),
    }
    # Adapters come from the store when first asked for.
    hardware = replace(MAIN.hardware, is_host_warm=False)
    base = replace(MAIN, workers=_FAULTY_WORKERS, hardware=hardware).lasting(3 * third_s)
    return {name: replace(base, name=name, faults=case) for name, case in cases.items()}


def _scale_rows(results: Results) -> list[Row]:
    return [
        {
            "section": "scale",
            "workers": workers,
            "adapters": adapters,
            "requests": run["requests"],
            "cpu_s": run["cpu_s"],
            "p50_ttft_s": run["p50_ttft_s"],
            "p99_ttft_s": run["p99_ttft_s"],
            "p99_tbt_s": run["p99_tbt_s"],
            "hit_rate": run["hit_rate"],
            "violations": run["violations"],
        }
        for (workers, adapters), run in results.items()
    ]


def _fault_findings(results: Results) -> Findings:
    rows: list[Row] = [
        {
            "section": "faults",
            "fault": name,
            "system": system,
            "requests": run["requests"],
            "lost": run["violations"],
            "returns": run["returns"],
            "p50_ttft_s": run["p50_ttft_s"],
            "p99_ttft_s": run["p99_ttft_s"],
            "p99_tbt_s": run["p99_tbt_s"],
            "max_gap_s": run["max_gap_s"],
        }
        for (name, system), run in results.items()
    ]
    # A store that is down is the one fault that must be told to clients: their adapter is not here.
    lost = sum(row["lost"] for row in rows if row["fault"] != "store down")
    return Findings(rows, [Target("requests lost to faults", 0, lost, "requests", is_upper=True)])
