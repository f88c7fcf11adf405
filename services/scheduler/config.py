"""What the scheduler can be told: `CALUMMA_SCHEDULER_…` or flags."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.common.config import ServiceSettings
from services.core.config import ClusterConfig
from services.scheduler.journal import CoreRecipe


class SchedulerSettings(ServiceSettings):
    """Policy, limits of the queue, and how patient to be with peers."""

    model_config = SettingsConfigDict(env_prefix="CALUMMA_SCHEDULER_")

    listen: str = Field(
        default="127.0.0.1:7101",
        pattern=r"^.+:\d{1,5}$",
        description="host:port of the gRPC server; port 0 takes a free one",
    )
    policy: Literal["multilevel", "fifo"] = Field(
        default="multilevel", description="order in which queued requests are dispatched"
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
    record: Path | None = Field(
        default=None, description="file to append the core's events to, for replay"
    )
    record_bytes_max: int = Field(default=2**30, ge=2**16, le=2**40)

    def recipe(self) -> CoreRecipe:
        """How the core is built."""
        cluster = ClusterConfig(
            queue_limit=self.queue_limit,
            worker_grace_s=self.worker_grace_s,
            gateway_grace_s=self.gateway_grace_s,
            no_worker_wait_s=self.no_worker_wait_s,
        )
        return CoreRecipe(self.policy, cluster)
