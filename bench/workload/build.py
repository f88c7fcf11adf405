"""From a description of a workload to its trace. Each aspect has its own stream of randomness, so
that changing the rate, say, leaves lengths and adapters of the n-th request as they were.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bench.workload.adapters import AdapterPool, Popularity
from bench.workload.arrivals import Arrivals, Poisson, arrival_times_s
from bench.workload.lengths import load_lengths
from bench.workload.trace import Arrival, Trace

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Workload:
    """One tenant's traffic; `merged` puts several together.

    `max_output`: what a request says it may generate: "actual" (clients that know), "trace_max"
    (the trace's longest output: clients that leave it open) or a number.
    """

    name: str = "azure-conv"
    lengths: str = "azure-conv"  # one of `LENGTHS`
    scale: float = 1.0  # of all lengths
    arrivals: Arrivals = field(default_factory=lambda: Poisson(6.0))
    duration_s: float = 900.0
    pool: AdapterPool = field(default_factory=AdapterPool)
    popularity: Popularity = field(default_factory=Popularity)
    max_output: Literal["actual", "trace_max"] | int = "trace_max"
    context_tokens_max: int = 4096  # longer requests are cut, their prompts first
    tenant: str = "default"
    priority: int = 0
    deadline_s: float | None = None


def build(workload: Workload, *, seed: int = 0) -> Trace:
    """The trace of a workload; the same for the same seed."""
    times_rng, lengths_rng, adapters_rng = (
        np.random.default_rng([seed, aspect]) for aspect in range(3)
    )
    model = load_lengths(workload.lengths, scale=workload.scale)
    times_s = arrival_times_s(workload.arrivals, workload.duration_s, times_rng)
    chosen = workload.popularity.draw(times_s, workload.pool, adapters_rng, shares=model.shares)
    prompt, output = model.draw(np.maximum(0, chosen), lengths_rng)
    limit = workload.context_tokens_max
    output = np.minimum(output, limit - 1)
    prompt = np.minimum(prompt, limit - output)
    maximum = np.clip(_max_output(workload, output), output, limit - prompt)
    adapters = workload.pool.adapters()
    columns = zip(times_s, chosen, prompt, output, maximum, strict=True)
    arrivals = tuple(
        Arrival(
            arrival_s=float(time_s),
            tenant=workload.tenant,
            adapter=adapters[index] if index >= 0 else None,
            prompt_tokens=int(prompt_tokens),
            output_tokens=int(output_tokens),
            max_output_tokens=int(max_output_tokens),
            priority=workload.priority,
            deadline_s=workload.deadline_s,
        )
        for time_s, index, prompt_tokens, output_tokens, max_output_tokens in columns
    )
    return Trace(workload.name, workload.duration_s, arrivals, adapters)


def _max_output(workload: Workload, output: Ints) -> Ints:
    match workload.max_output:
        case "actual":
            return output
        case "trace_max":
            return np.full_like(output, output.max(initial=1))
        case tokens:
            return np.full_like(output, tokens)
