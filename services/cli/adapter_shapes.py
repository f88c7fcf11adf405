"""The shapes that `calumma adapters … --json` prints. See `shapes` for what holds of all."""

from dataclasses import dataclass
from datetime import UTC

from google.protobuf import timestamp_pb2

from calumma.adapter_store.v1 import adapter_store_pb2


@dataclass(frozen=True, slots=True)
class ProvenanceShape:
    """Where a version came from; null where it is not known."""

    source: str | None
    publisher: str | None
    peft_version: str | None
    config_sha256: str | None
    weights_sha256: str | None

    @classmethod
    def of(cls, provenance: adapter_store_pb2.Provenance) -> "ProvenanceShape":
        return cls(
            source=provenance.source or None,
            publisher=provenance.publisher or None,
            peft_version=provenance.peft_version or None,
            config_sha256=provenance.config_sha256 or None,
            weights_sha256=provenance.weights_sha256 or None,
        )


@dataclass(frozen=True, slots=True)
class VersionShape:
    """One immutable version of an adapter."""

    name: str
    version: int
    digest: str
    rank: int
    size_bytes: int
    dtype: str
    target_modules: tuple[str, ...]
    parameters: int
    base_model: str
    created: str
    labels: dict[str, str]
    provenance: ProvenanceShape

    @classmethod
    def of(cls, version: adapter_store_pb2.AdapterVersion) -> "VersionShape":
        return cls(
            name=version.ref.name,
            version=version.ref.version,
            digest=version.ref.digest,
            rank=version.ref.rank,
            size_bytes=version.ref.size_bytes,
            dtype=version.dtype,
            target_modules=tuple(version.target_modules),
            parameters=version.parameters,
            base_model=version.base_model,
            created=_date(version.create_time) if version.HasField("create_time") else "",
            labels=dict(sorted(version.labels.items())),
            provenance=ProvenanceShape.of(version.provenance),
        )


@dataclass(frozen=True, slots=True)
class CanaryShape:
    """A share of an alias's requests goes to another version."""

    version: int
    percent: int


@dataclass(frozen=True, slots=True)
class PinShape:
    """What workers keep: `selector` is null for the newest version, else a version or an alias."""

    selector: str | None
    reason: str
    created: str


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """A registered adapter, oldest version first. `adapters list` prints {"adapters": […]}."""

    name: str
    revision: int
    aliases: dict[str, int]
    versions: tuple[VersionShape, ...]
    canaries: dict[str, CanaryShape]
    previous_versions: dict[str, int]  # of aliases, for `adapters rollback`
    tenants: tuple[str, ...]  # empty: all
    pins: tuple[PinShape, ...]
    changed: str | None

    @classmethod
    def of(cls, adapter: adapter_store_pb2.Adapter) -> "AdapterShape":
        return cls(
            name=adapter.name,
            revision=adapter.revision,
            aliases=dict(sorted(adapter.aliases.items())),
            versions=tuple(VersionShape.of(version) for version in adapter.versions),
            canaries={
                alias: CanaryShape(canary.version, canary.percent)
                for alias, canary in sorted(adapter.canaries.items())
            },
            previous_versions=dict(sorted(adapter.previous_versions.items())),
            tenants=tuple(adapter.tenants),
            pins=tuple(
                PinShape(pin.selector or None, pin.reason, _date(pin.create_time))
                for pin in adapter.pins
            ),
            changed=_date(adapter.change_time) if adapter.HasField("change_time") else None,
        )


@dataclass(frozen=True, slots=True)
class UnloadShape:
    """What `adapters unload` freed. `failure`: why the scheduler could not be asked."""

    freed_bytes: int = 0
    unloaded_workers: tuple[str, ...] = ()
    holding_workers: tuple[str, ...] = ()
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class DeleteShape:
    """What `adapters delete` did. `digests`: those that no adapter has any more."""

    deleted: str
    digests: tuple[str, ...]
    unload: UnloadShape


@dataclass(frozen=True, slots=True)
class BindingShape:
    """A module that an adapter changes, and how."""

    module: str
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class PublishShape:
    """What `adapters publish` did."""

    dry_run: bool
    already_published: bool
    version: VersionShape
    bindings: tuple[BindingShape, ...]

    @classmethod
    def of(cls, response: adapter_store_pb2.PublishResponse, *, dry_run: bool) -> "PublishShape":
        bindings = tuple(BindingShape(b.module, b.rank, b.scale) for b in response.bindings)
        version = VersionShape.of(response.version)
        return cls(dry_run, response.already_published, version, bindings)


def _date(time: timestamp_pb2.Timestamp) -> str:
    return time.ToDatetime(tzinfo=UTC).isoformat(timespec="seconds")
