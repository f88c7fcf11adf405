"""Settings of the adapter store: `CALUMMA_ADAPTER_STORE_…` or flags."""

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from services.adapter_store.storage import S3Credentials
from services.common.base_model import DEFAULT_MODEL, cache_home
from services.common.config import ServiceSettings


class AdapterStoreSettings(ServiceSettings):
    """What the adapter store can be told."""

    # Merged with the base class's.
    model_config = SettingsConfigDict(env_prefix="CALUMMA_ADAPTER_STORE_")

    listen: str = Field(
        default="127.0.0.1:7103",
        pattern=r"^.+:\d{1,5}$",
        description="host:port of the gRPC server; port 0 takes a free one",
    )
    store_url: str = Field(
        default_factory=lambda: (cache_home() / "store").absolute().as_uri(),
        description="URL (file, s3, gs or az) of the bucket or folder that holds all state",
    )
    s3_access_key_id: str | None = Field(
        default=None, description="with its secret: instead of the environment's AWS credentials"
    )
    s3_secret_access_key: SecretStr | None = None
    model: str = Field(
        default=DEFAULT_MODEL,
        description="folder or hub id of the base model that adapters are checked against",
    )
    base_names: tuple[str, ...] = Field(
        default=(),
        max_length=64,
        description="other hub ids of the same base model that an adapter may name",
    )
    cache_dir: Path = Field(
        default_factory=lambda: cache_home() / "adapter_store",
        description="folder of the disk cache; each replica has its own",
    )
    cache_bytes: int = Field(default=8 * 2**30, ge=2**20, le=2**50)
    poll_s: float = Field(
        default=2.0, gt=0, le=300, description="how often changes of other replicas are looked for"
    )
    call_timeout_s: float = Field(
        default=10.0, gt=0, le=300, description="one small read or write of object storage"
    )
    read_timeout_s: float = Field(
        default=30.0, gt=0, le=300, description="silence while an object is streamed"
    )
    publish_bytes_max: int = Field(
        default=2 * 2**30, ge=2**16, le=2**36, description="largest upload, both files together"
    )
    publishes_max: int = Field(default=8, ge=1, le=256, description="uploads at a time")
    upload_idle_s: float = Field(
        default=60.0, gt=0, le=3600, description="silence that ends an upload"
    )
    rank_max: int = Field(default=512, ge=1, le=2**16)
    adapters_max: int = Field(default=100_000, ge=1, le=10_000_000)
    pinned_adapters_max: int = Field(
        default=1000, ge=0, le=100_000, description="adapters that may have pins at a time"
    )
    pinned_bytes_max: int = Field(
        default=16 * 2**30, ge=0, le=2**50, description="adapters that pins mean, all together"
    )
    watchers_max: int = Field(default=1000, ge=1, le=100_000)
    collect_every_s: float = Field(
        default=600.0, gt=0, le=86_400, description="how often unused objects are looked for"
    )
    safety_age_s: float = Field(
        default=3600.0,
        ge=0,
        le=30 * 86_400,
        description="age below which an unused object is never deleted",
    )

    @property
    def s3_credentials(self) -> S3Credentials | None:
        """The key pair, when both parts are given."""
        if self.s3_access_key_id is None or self.s3_secret_access_key is None:
            return None
        secret = self.s3_secret_access_key.get_secret_value()
        return S3Credentials(self.s3_access_key_id.strip(), secret.strip())
