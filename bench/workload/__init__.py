"""Workloads as values: who asks which adapter for what, and when.

`build(workload, seed=...)` makes a `Trace` from lengths (public traces, or generators fitted to
their published statistics where the data is absent), arrivals and adapter popularity. The simulator
and the live replay take the same traces.
"""

from bench.workload.adapters import AdapterPool, Popularity
from bench.workload.arrivals import Arrivals, FromTrace, Gamma, OnOff, Poisson
from bench.workload.build import Workload, build
from bench.workload.lengths import LENGTHS, LengthModel, load_lengths
from bench.workload.trace import Arrival, Trace, merged

__all__ = [
    "LENGTHS",
    "AdapterPool",
    "Arrival",
    "Arrivals",
    "FromTrace",
    "Gamma",
    "LengthModel",
    "OnOff",
    "Poisson",
    "Popularity",
    "Trace",
    "Workload",
    "build",
    "load_lengths",
    "merged",
]
