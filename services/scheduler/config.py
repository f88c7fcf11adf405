"""What the scheduler can be told: `CALUMMA_SCHEDULER_…` or flags."""

from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from services.common.config import ServiceSettings, split_options
from services.core.config import ClusterConfig
from services.core.policies import POLICY_NAMES
from services.core.systems import SYSTEMS
from services.core.types import Reserve
from services.scheduler.journal import CoreRecipe
from services.scheduler.tenants import load_tenants


class SchedulerSettings(ServiceSettings):
    """Policy, limits of the queue, and how patient to be with peers."""

    model_config = SettingsConfigDict(env_prefix="CALUMMA_SCHEDULER_")

    listen: str = Field(
        default="127.0.0.1:7101",
        pattern=r"^.+:\d{1,5}$",
        description="host:port of the gRPC server; port 0 takes a free one",
    )
    system: str = Field(
        default="adaptive",
        description="policy, admission, steps and cache that belong together, by name: "
        + ", ".join(SYSTEMS),
    )
    policy: str | None = Field(
        default=None,
        description="order in which queued requests are dispatched, instead of the system's: "
        + ", ".join(POLICY_NAMES),
    )
    policy_option: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict, description="key=value of the policy's own options; repeatable"
    )
    reserve: Reserve | None = Field(
        default=None, description="output that a request is promised memory for; absent: system's"
    )
    prefill_ahead_s: float | None = Field(
        default=None, gt=0, le=60, description="prompts that may wait at a worker, in its time"
    )
    dispatches_ahead: bool | None = Field(
        default=None, description="send requests on at once, for the workers to queue"
    )
    queue_limit: int = Field(
        default=100_000, ge=1, le=10_000_000, description="requests that may wait"
    )
    worker_grace_s: float = Field(
        default=5.0, ge=0, le=600, description="time a worker has to come back with its requests"
    )
    gateway_grace_s: float = Field(
        default=10.0, ge=0, le=600, description="time a gateway has to come back for its requests"
    )
    no_worker_wait_s: float = Field(
        default=30.0, ge=0, le=3600, description="wait of a request while there is no worker at all"
    )
    hello_timeout_s: float = Field(default=10.0, gt=0, le=600)
    stall_s: float = Field(
        default=10.0, gt=0, le=600, description="a peer that reads nothing for so long is cut off"
    )
    outbox_messages: int = Field(
        default=16_384,
        ge=16,
        le=1_000_000,
        description="messages that may wait for one peer to read",
    )
    max_gateways: int = Field(default=1024, ge=1, le=100_000)
    max_workers: int = Field(default=4096, ge=1, le=100_000)
    tenants: Path | None = Field(
        default=None, description="TOML file of the tenants' weights and quotas"
    )
    record: Path | None = Field(
        default=None, description="file to append the core's events and decisions to, for replay"
    )
    record_bytes_max: int = Field(default=2**30, ge=2**16, le=2**40)

    @field_validator("policy_option", mode="before")
    @classmethod
    def _split_options(cls, given: object) -> object:
        return split_options(given) if isinstance(given, str) else given

    @field_validator("system")
    @classmethod
    def _check_system(cls, name: str) -> str:
        return _one_of("systems", name, SYSTEMS)

    @field_validator("policy")
    @classmethod
    def _check_policy(cls, name: str | None) -> str | None:
        return None if name is None else _one_of("policies", name, POLICY_NAMES)

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        self.recipe().build()
        return self

    def recipe(self) -> CoreRecipe:
        """How the core is built: the system, with what was set beside it."""
        system = SYSTEMS[self.system]
        given = {name: getattr(self, name) for name in _CLUSTER_FIELDS}
        if self.tenants is not None:
            given["tenants"] = load_tenants(self.tenants)
        cluster = replace(
            system.cluster, **{name: value for name, value in given.items() if value is not None}
        )
        return CoreRecipe(self.policy or system.policy, cluster, self.policy_option)


def _one_of(what: str, name: str, names: Collection[str]) -> str:
    if name not in names:
        raise ValueError(f"no {name!r}; the {what} are: {', '.join(names)}")
    return name


_CLUSTER_FIELDS: Final = [
    field.name for field in fields(ClusterConfig) if field.name in SchedulerSettings.model_fields
]
