"""What a gateway can be told."""

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.common.base_model import DEFAULT_MODEL
from services.common.config import ServiceSettings


class GatewaySettings(ServiceSettings):
    """Flags, and environment variables that begin with CALUMMA_GATEWAY_."""

    model_config = SettingsConfigDict(env_prefix="CALUMMA_GATEWAY_")  # the rest is inherited

    listen: str = Field(
        default="127.0.0.1:7100",
        pattern=r"^.+:\d{1,5}$",
        description="host:port of the gRPC server; port 0 takes a free one",
    )
    scheduler: str = Field(default="127.0.0.1:7101", description="host:port of the scheduler")
    adapter_store: str = Field(
        default="127.0.0.1:7103", description="host:port of the adapter store"
    )
    model: str = Field(
        default=DEFAULT_MODEL, description="folder or hub id of the base model: its tokenizer"
    )
    tenant: str = Field(
        default="default",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="tenant of every request, as long as clients have no credentials",
    )
    max_requests: int = Field(
        default=4096, ge=1, le=1_000_000, description="requests in flight; more are refused"
    )
    max_prompt_bytes: int = Field(
        default=2**20, ge=1, le=2**30, description="longest prompt as text, before tokenising"
    )
    max_context_tokens: int | None = Field(
        default=None, ge=2, description="longest prompt plus output; default: what the model has"
    )
    default_max_tokens: int = Field(
        default=1024, ge=1, description="output limit of requests that name none"
    )
    max_request_s: float = Field(
        default=3600.0,
        gt=0,
        le=86_400,
        description="deadline of requests that have a later or none",
    )
    scheduler_wait_s: float = Field(
        default=5.0, ge=0, le=600, description="how long a new request waits for the scheduler"
    )
    scheduler_restart_s: float = Field(
        default=30.0, ge=0, le=3600, description="how long queued requests outlive the scheduler"
    )
    worker_reconnect_s: float = Field(
        default=10.0, gt=0, le=600, description="how long a token stream may be down"
    )
    store_timeout_s: float = Field(
        default=2.0, gt=0, le=60, description="limit of one question to the adapter store"
    )
    max_resubmissions: int = Field(
        default=5, ge=0, le=100, description="times that a request moves to another worker"
    )
    tokenizer_threads: int = Field(
        default=2, ge=1, le=64, description="threads that tokenise long prompts"
    )
