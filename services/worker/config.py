"""The worker's settings: flags and `CALUMMA_WORKER_…` variables."""

import os
import socket
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Final, Literal, Self
from uuid import uuid4

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from services.common.base_model import DEFAULT_MODEL
from services.common.config import ServiceSettings, split_options
from services.core.config import ReplicaConfig
from services.core.eviction import EVICTION_NAMES, build_eviction
from services.core.systems import SYSTEMS
from services.core.types import Reserve

DAY_S: Final = 86_400.0
_ADDRESS = r"^.+:\d{1,5}$"
_WILDCARDS = {"0.0.0.0", "[::]", "*"}


class WorkerSettings(ServiceSettings):
    """What a worker can be told."""

    model_config = SettingsConfigDict(env_prefix="CALUMMA_WORKER_")

    listen: str = Field(
        default="127.0.0.1:7102",
        pattern=_ADDRESS,
        description="host:port of the gRPC server; port 0 takes a free one",
    )
    scheduler: str = Field(
        default="127.0.0.1:7101", pattern=_ADDRESS, description="host:port of the scheduler"
    )
    adapter_store: str = Field(
        default="127.0.0.1:7103", pattern=_ADDRESS, description="host:port of the adapter store"
    )
    advertise: str | None = Field(
        default=None,
        pattern=_ADDRESS,
        description="host:port that gateways dial; absent: the bound address",
    )
    worker_id: str = Field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}",
        min_length=1,
        max_length=256,
        description="unique per process",
    )
    model: str | None = Field(
        default=None,
        description=f"folder or hub id of the base model; absent: {DEFAULT_MODEL}, or none at all "
        "when the engine is simulated",
    )
    engine: Literal["torch", "simulated"] = "torch"
    profile: str = Field(
        default="a40-llama-7b", description="hardware profile of the simulated engine"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    tier: Literal["auto", "native", "torch"] = Field(
        default="auto",
        description="what computes on the CPU: native (compiled code, bfloat16) or torch; auto: "
        "native where it can serve, and the log says why if not",
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        le=16,
        description="devices that the model is split over; on the CPU, processes",
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="compute threads; absent: one per physical core"
    )
    max_requests: int = Field(default=32, ge=1, le=4096, description="requests that run at once")
    max_context_tokens: int | None = Field(
        default=None, ge=16, le=2**20, description="prompt plus output; absent: the model's"
    )
    memory_bytes: int | None = Field(
        default=None, ge=2**16, description="memory pool of KV cache and adapters"
    )
    block_tokens: int = Field(default=16, ge=1, le=1024, description="tokens per block of the pool")
    system: str = Field(
        default="adaptive",
        description="admission, steps and cache that belong together, by name; the scheduler's: "
        + ", ".join(SYSTEMS),
    )
    # What follows is the system's unless it is set, see `services.core.config.ReplicaConfig`.
    stepping: Literal["target", "chunked", "whole"] | None = Field(
        default=None, description="how prompts and decodes share steps; all this: absent, system's"
    )
    tbt_target_s: float | None = Field(default=None, gt=0, le=60, description="of a step")
    slack_share: float | None = Field(
        default=None, ge=0, le=1, description="of the time ahead of the target, usable by a step"
    )
    patience_s: float | None = Field(
        default=None, gt=0, le=3600, description="wait of a prompt that makes steps longer"
    )
    step_limit_s: float | None = Field(default=None, gt=0, le=60)
    step_tokens_limit: int | None = Field(default=None, ge=1, le=2**20)
    min_prefill_tokens: int | None = Field(default=None, ge=1, le=2**16)
    prefill_tokens_per_step: int | None = Field(
        default=None, ge=1, le=2**16, description="most prompt tokens of a step, unless by target"
    )
    admission: Literal["promise", "slora"] | None = Field(
        default=None, description="who may start: by the sum of promises, or by S-LoRA's peak"
    )
    admission_every_steps: int | None = Field(default=None, ge=1, le=1000)
    reserve: Reserve | None = Field(
        default=None, description="output that a request is promised memory for"
    )
    keeps_idle_adapters: bool | None = Field(
        default=None, description="keep adapters in memory after their last user"
    )
    prefix_cache: bool | None = Field(
        default=None,
        description="keep what was computed for a request for the next one of its tenant and "
        "adapter that begins alike",
    )
    eviction: str | None = Field(
        default=None, description="of idle adapters: " + ", ".join(EVICTION_NAMES)
    )
    eviction_option: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict, description="key=value of the eviction's own options; repeatable"
    )
    pin_share: float | None = Field(
        default=None, ge=0, le=1, description="of the memory pool, that pinned adapters may take"
    )
    cool_down_s: float | None = Field(
        default=None,
        ge=0,
        le=3600,
        description="before an adapter that gave way to a context is loaded ahead again",
    )
    forecast_s: float | None = Field(
        default=None,
        ge=0,
        le=3600,
        description="how far ahead of any request adapters are loaded that are likely to be asked "
        "for; 0: not at all",
    )
    forecast_chance: float | None = Field(
        default=None, gt=0, le=1, description="of such a request, for its adapter to be loaded"
    )
    host_cache_bytes: int = Field(
        default=2**30,
        ge=0,
        description="host memory for adapters, bytes; on the CPU those in use lie there, too",
    )
    adapter_loads: int = Field(default=4, ge=1, le=64, description="adapter downloads at once")
    store_read_timeout_s: float = Field(
        default=10.0, gt=0, le=600, description="silence after which a download is resumed"
    )
    follow_pins: bool = Field(
        default=True, description="keep the adapters in memory that are pinned at the store"
    )
    gateway_away_s: float = Field(
        default=15.0,
        gt=0,
        le=3600,
        description="a gateway without a token stream for so long has its requests ended",
    )
    seed: int = Field(default=0, ge=0, description="seed of the simulated engine")

    @model_validator(mode="after")
    def _check_advertise(self) -> Self:
        """Gateways elsewhere can't dial a wildcard."""
        host = self.listen.rpartition(":")[0]
        if self.advertise is None and host in _WILDCARDS:
            raise ValueError(f"a worker that listens on {host} needs advertise")
        return self

    @model_validator(mode="after")
    def _check_shards(self) -> Self:
        if self.engine == "simulated" and self.tensor_parallel > 1:
            raise ValueError("the simulated engine has one device: tensor_parallel needs a model")
        return self

    @field_validator("system")
    @classmethod
    def _check_system(cls, name: str) -> str:
        if name not in SYSTEMS:
            raise ValueError(f"no {name!r}; the systems are: {', '.join(SYSTEMS)}")
        return name

    @field_validator("eviction_option", mode="before")
    @classmethod
    def _split_options(cls, given: object) -> object:
        return split_options(given) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _check_eviction(self) -> Self:
        build_eviction(self.eviction or SYSTEMS[self.system].replica.eviction, self.eviction_option)
        return self

    @model_validator(mode="after")
    def _check_replica(self) -> Self:
        try:
            self.replica()
        except AssertionError as error:
            raise ValueError("min_prefill_tokens is above step_tokens_limit") from error
        return self

    def replica(self) -> ReplicaConfig:
        """How the core is built: the system's replica, with what was set beside it."""
        given = {name: getattr(self, name) for name in _REPLICA_FIELDS}
        return replace(
            SYSTEMS[self.system].replica,
            eviction_options=tuple(self.eviction_option.items()),
            # The core's clock is the monotonic one; a day begins at midnight UTC.
            day_offset_s=(time.time() - time.monotonic()) % DAY_S if self.forecast_s else None,
            max_loads=self.adapter_loads,
            max_hint_loads=(self.adapter_loads + 1) // 2,
            **{name: value for name, value in given.items() if value is not None},
        )

    @property
    def thread_count(self) -> int:
        """Compute threads to use."""
        return self.threads or physical_cores()


_REPLICA_FIELDS: Final = [
    field.name for field in fields(ReplicaConfig) if field.name in WorkerSettings.model_fields
]


def physical_cores() -> int:
    """Cores that this process may run on; two hardware threads of one core count once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if allowed is None:
        return os.cpu_count() or 1
    siblings = {_siblings(cpu) for cpu in allowed}
    return max(1, len(siblings))


def _siblings(cpu: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return str(cpu)
