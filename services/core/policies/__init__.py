"""Queue policies, by name. Each module holds one policy, or a family, and its configuration."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from services.core.policies.adaptive import Adaptive, AdaptiveConfig
from services.core.policies.chameleon import Chameleon
from services.core.policies.chameleon_sizing import ChameleonConfig
from services.core.policies.edf import Edf, EdfConfig
from services.core.policies.fifo import Fifo, FifoConfig
from services.core.policies.sjf import AgedSjf, AgedSjfConfig, Sjf, SjfConfig
from services.core.policies.static import StaticConfig, StaticQueues
from services.core.policies.static_batches import UellmConfig
from services.core.policies.uellm import Uellm
from services.core.policies.vtc import Vtc, VtcConfig
from services.core.queues import QueuePolicy
from services.core.tenants import Tenants


@dataclass(frozen=True, slots=True)
class PolicyKind:
    """How a policy is built: by `build`, from a `config()` that may have fields replaced."""

    config: Callable[[], Any]
    build: Callable[[Any, Tenants], QueuePolicy]


def _deaf(build: Callable[[Any], QueuePolicy]) -> Callable[[Any, Tenants], QueuePolicy]:
    """Of a policy that knows no tenants."""
    return lambda config, _: build(config)


def _vtc(config: VtcConfig, tenants: Tenants) -> QueuePolicy:
    weights = {tenant_id: limits.weight for tenant_id, limits in tenants.named.items()}
    default_weight = tenants.default.weight
    return Vtc(
        replace(config, weights={**weights, **config.weights}, default_weight=default_weight)
    )


POLICIES: Final[dict[str, PolicyKind]] = {
    "adaptive": PolicyKind(
        AdaptiveConfig, lambda config, tenants: Adaptive(config, tenants=tenants)
    ),
    "chameleon": PolicyKind(ChameleonConfig, _deaf(Chameleon)),
    "fifo": PolicyKind(FifoConfig, _deaf(Fifo)),
    "sjf": PolicyKind(SjfConfig, _deaf(Sjf)),
    "aged_sjf": PolicyKind(AgedSjfConfig, _deaf(AgedSjf)),
    "edf": PolicyKind(EdfConfig, _deaf(Edf)),
    "static": PolicyKind(StaticConfig, _deaf(StaticQueues)),
    "vtc": PolicyKind(VtcConfig, _vtc),
    "slo_odbs": PolicyKind(UellmConfig, _deaf(Uellm)),
    "slo_dbs": PolicyKind(lambda: UellmConfig(length_weight=0.0), _deaf(Uellm)),
    "odbs": PolicyKind(lambda: UellmConfig(slo_weight=0.0), _deaf(Uellm)),
}
POLICY_NAMES: Final = tuple(POLICIES)


def build_policy(
    name: str, config: object | None = None, *, tenants: Tenants | None = None
) -> QueuePolicy:
    """The policy of that name, with its default configuration if none is given.

    Raises ValueError for an unknown name.
    """
    kind = POLICIES.get(name)
    if kind is None:
        raise ValueError(f"unknown queue policy {name!r}, have {', '.join(POLICY_NAMES)}")
    default = kind.config()
    assert config is None or isinstance(config, type(default))
    return kind.build(default if config is None else config, tenants or Tenants())
