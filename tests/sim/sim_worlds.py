"""Small worlds for the simulator's tests."""

from bench.sim import Hardware, Scenario, hardware
from bench.workload import AdapterPool, Arrival, Poisson, Trace, Workload, build
from services.core.config import ClusterConfig, ReplicaConfig
from services.core.systems import System
from services.core.types import Adapter

POOL = AdapterPool(10)
WHOLE = ReplicaConfig(stepping="whole", prefill_tokens_per_step=8192)


def system(
    policy: str = "fifo",
    *,
    cluster: ClusterConfig | None = None,
    replica: ReplicaConfig | None = None,
) -> System:
    return System(policy, policy, cluster or ClusterConfig(), replica or ReplicaConfig())


def card(pool_tokens: int | None = None) -> Hardware:
    found = hardware("a40-llama-7b")
    return found if pool_tokens is None else found.with_pool_tokens(pool_tokens)


def arrival(
    arrival_s: float,
    *,
    adapter: Adapter | None = None,
    prompt_tokens: int = 300,
    output_tokens: int = 20,
    deadline_s: float | None = None,
) -> Arrival:
    return Arrival(
        arrival_s=arrival_s,
        tenant="default",
        adapter=adapter,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_output_tokens=output_tokens,
        deadline_s=deadline_s,
    )


def trace(*arrivals: Arrival) -> Trace:
    return Trace("by hand", arrivals[-1].arrival_s + 1.0, tuple(arrivals), POOL.adapters())


def conversations(rate_rps: float = 3.0, duration_s: float = 30.0, seed: int = 0) -> Trace:
    workload = Workload(
        arrivals=Poisson(rate_rps), duration_s=duration_s, pool=POOL, scale=0.3, max_output=512
    )
    return build(workload, seed=seed)


def scenario(world: Trace, **changes: object) -> Scenario:
    values: dict[str, object] = {
        "system": system(),
        "hardware": card(),
        "trace": world,
        "checks_integrity": True,
        **changes,
    }
    return Scenario(**values)  # type: ignore[arg-type]
