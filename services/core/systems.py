"""Whole systems by name: a queue policy with the admission, steps and cache that belong to it.

A policy alone is not what a paper measured: S-LoRA's order goes with worst-case reservation and an
admission every ten steps, Chameleon's queues with its adapter cache. A system is all of it, for the
cluster machine and for the replica machines, live and simulated.

Each policy is a system of its own name, on our admission and steps, so that orders can be compared
with all else equal; those of UELLM have no prefix cache, as in the paper, nor have those below.
Those that bring their own:

- `slora`: S-LoRA as coded. First come, first served at each worker; the longest output is reserved;
  admission every ten decode steps; new prompts computed whole while decodes wait; adapters dropped
  with their last user.
- `slora-strong`: the same, reserving the predicted output: with a perfect predictor the best that
  its rules allow.
- `slora-every-step`: as `slora-strong`, with admission tried at every step.
- `chameleon`: its queues and cache. A batch is formed at every step (§4.1), prompts are computed
  whole, as in S-LoRA, which it was built on. `chameleon-paced` keeps S-LoRA's ten steps: the paper
  does not say that its code gave them up. `-no-cache` and `-no-queues` leave a half out, `-lru`
  takes another eviction.
"""

from dataclasses import dataclass, field, replace
from typing import Final

from services.core.config import ClusterConfig, ReplicaConfig
from services.core.policies import POLICY_NAMES
from services.core.types import Reserve

# LightLLM, which S-LoRA is built on: a sixth of the KV tokens; 60,000 of them on the papers' card.
_BATCH_MAX_TOKENS: Final = 10_000
_UNBOUNDED_S: Final = float("inf")
_UELLM: Final = ("static", "slo_odbs", "slo_dbs", "odbs")


@dataclass(frozen=True, slots=True)
class System:
    """What both machines are built from. `policy` is a name of `services.core.policies`."""

    name: str
    policy: str
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    replica: ReplicaConfig = field(default_factory=ReplicaConfig)
    policy_config: object | None = None  # the policy's own; None: its defaults


_SLORA: Final = System(
    "slora",
    "fifo",
    ClusterConfig(reserve=Reserve.MAX, dispatches_ahead=True, prefetch_depth=0),
    ReplicaConfig(
        stepping="whole",
        admission="slora",
        admission_every_steps=10,
        reserve=Reserve.MAX,
        prefill_tokens_per_step=_BATCH_MAX_TOKENS,
        keeps_idle_adapters=False,
        prefix_cache=False,
    ),
)
_SLORA_STRONG: Final = replace(
    _SLORA,
    name="slora-strong",
    cluster=replace(_SLORA.cluster, reserve=Reserve.PREDICTED),
    replica=replace(_SLORA.replica, reserve=Reserve.PREDICTED),
)
_CHAMELEON: Final = System(
    "chameleon",
    "chameleon",
    ClusterConfig(prefill_ahead_s=_UNBOUNDED_S),
    ReplicaConfig(
        stepping="whole",
        prefill_tokens_per_step=_BATCH_MAX_TOKENS,
        eviction="chameleon",
        prefix_cache=False,
    ),
)
_BUILT: Final = (
    _SLORA,
    _SLORA_STRONG,
    replace(
        _SLORA_STRONG,
        name="slora-every-step",
        replica=replace(_SLORA_STRONG.replica, admission_every_steps=1),
    ),
    _CHAMELEON,
    replace(
        _CHAMELEON,
        name="chameleon-paced",
        replica=replace(_CHAMELEON.replica, admission_every_steps=10),
    ),
    replace(
        _CHAMELEON,
        name="chameleon-no-cache",
        replica=replace(_CHAMELEON.replica, keeps_idle_adapters=False),
    ),
    replace(_CHAMELEON, name="chameleon-no-queues", policy="fifo"),
    replace(_CHAMELEON, name="chameleon-lru", replica=replace(_CHAMELEON.replica, eviction="lru")),
)


def _replica_of(policy: str) -> ReplicaConfig:
    return ReplicaConfig(prefix_cache=policy not in _UELLM)


SYSTEMS: Final[dict[str, System]] = {
    **{name: System(name, name, replica=_replica_of(name)) for name in POLICY_NAMES},
    **{system.name: system for system in _BUILT},
}
