"""A simulator around the very objects that decide live: `ClusterScheduler` and `ReplicaScheduler`.

`simulate(Scenario(...))` runs a trace in virtual time on modelled hardware with true costs of its
own, and returns what every request, worker and queue went through. `knees` searches for the load
that a system bears.
"""

from bench.sim.faults import Fault, StoreDown, StoreSlow, WorkerLoss, WorkerSlow
from bench.sim.hardware import Hardware, hardware
from bench.sim.knee import Knee, Slo, knees
from bench.sim.predictors import (
    Accurate,
    Adversarial,
    Broken,
    Constant,
    Learned,
    Oracle,
    PredictorKind,
)
from bench.sim.records import RequestRecord, Result, Sample, WorkerRecord
from bench.sim.simulation import Scenario, Window, simulate

__all__ = [
    "Accurate",
    "Adversarial",
    "Broken",
    "Constant",
    "Fault",
    "Hardware",
    "Knee",
    "Learned",
    "Oracle",
    "PredictorKind",
    "RequestRecord",
    "Result",
    "Sample",
    "Scenario",
    "Slo",
    "StoreDown",
    "StoreSlow",
    "Window",
    "WorkerLoss",
    "WorkerRecord",
    "WorkerSlow",
    "hardware",
    "knees",
    "simulate",
]
