"""What the scenarios have in common: systems by name, traffic, and what is measured."""

import math
from collections.abc import Iterable
from dataclasses import replace

from bench.sim import Hardware, Oracle, PredictorKind, RequestRecord, Result, Scenario, hardware
from bench.sim import simulate as run
from bench.sim.records import percentile
from bench.workload import AdapterPool, Poisson, Popularity, Trace, Workload, build
from services.core.systems import SYSTEMS, System
from services.core.tenants import Tenants

SERVED = ("adaptive", "chameleon", "fifo")
CARD = hardware("a40-llama-7b")


def conversations(
    rate_rps: float,
    duration_s: float,
    *,
    seed: int = 0,
    tenant: str = "default",
    pool: AdapterPool | None = None,
    popularity: Popularity | None = None,
    deadline_s: float | None = None,
) -> Trace:
    """Chats of about 300 prompt and 60 output tokens: the card bears some 7 of them a second."""
    workload = Workload(
        arrivals=Poisson(rate_rps),
        duration_s=duration_s,
        pool=pool or AdapterPool(50),
        popularity=popularity or Popularity(),
        scale=0.3,
        max_output=512,
        tenant=tenant,
        deadline_s=deadline_s,
    )
    return build(workload, seed=seed)


def system(name: str, tenants: Tenants | None = None) -> System:
    chosen = SYSTEMS[name]
    if tenants is None:
        return chosen
    return replace(chosen, cluster=replace(chosen.cluster, tenants=tenants))


def simulate(
    chosen: System | str,
    trace: Trace,
    *,
    card: Hardware = CARD,
    predictor: PredictorKind | None = None,
    **options: object,
) -> Result:
    """Run it; every machine checks itself after every event."""
    values: dict[str, object] = {
        "system": system(chosen) if isinstance(chosen, str) else chosen,
        "hardware": card,
        "trace": trace,
        "predictor": predictor or Oracle(),
        "checks_integrity": True,
        **options,
    }
    return run(Scenario(**values))  # type: ignore[arg-type]


def p99_ttft_s(records: Iterable[RequestRecord]) -> float:
    return percentile((record.ttft_s for record in records), 0.99)


def jain(shares: Iterable[float]) -> float:
    """Jain's index of fairness: 1 if all are equal, 1 / n if one has everything."""
    values = list(shares)
    return math.fsum(values) ** 2 / (len(values) * math.fsum(value**2 for value in values))
