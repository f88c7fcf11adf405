"""The worker's settings: flags and `CALUMMA_WORKER_…` variables."""

import os
import socket
from pathlib import Path
from typing import Literal, Self
from uuid import uuid4

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from services.common.base_model import DEFAULT_MODEL
from services.common.config import ServiceSettings

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
    prefill_tokens_per_step: int = Field(
        default=256, ge=1, le=2**16, description="most prompt tokens computed in one step"
    )
    host_cache_bytes: int = Field(
        default=2**30, ge=0, description="adapters kept in host memory, bytes"
    )
    adapter_loads: int = Field(default=4, ge=1, le=64, description="adapter downloads at once")
    store_read_timeout_s: float = Field(
        default=10.0, gt=0, le=600, description="silence after which a download is resumed"
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

    @property
    def thread_count(self) -> int:
        """Compute threads to use."""
        return self.threads or physical_cores()


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
