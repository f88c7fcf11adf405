"""Between the registry's values and the messages of adapter_store.proto, nothing else."""

from typing import assert_never

from google.protobuf import timestamp_pb2

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from calumma.common.v1 import common_pb2
from services.adapter_store.blobs import Chunk
from services.adapter_store.entries import UNKNOWN_ORIGIN, Entry, Version
from services.adapter_store.publishing import Published
from services.adapter_store.watching import Change, Deleted, Synced, Updated


def version_to_proto(name: str, version: Version) -> pb.AdapterVersion:
    """One version."""
    weights, origin = version.weights, version.provenance
    message = pb.AdapterVersion(
        ref=common_pb2.AdapterRef(
            digest=weights.digest,
            name=name,
            version=version.number,
            rank=weights.rank,
            size_bytes=weights.size_bytes,
        ),
        create_time=_time(version.created_ns),
        target_modules=weights.target_modules,
        dtype=weights.dtype,
        base_model=weights.base_model,
        parameters=weights.parameters,
        labels=dict(version.labels),
    )
    if origin != UNKNOWN_ORIGIN:
        message.provenance.CopyFrom(
            pb.Provenance(
                source=origin.source,
                publisher=origin.publisher,
                peft_version=origin.peft_version,
                config_sha256=origin.config_sha256,
                weights_sha256=origin.weights_sha256,
            )
        )
    return message


def adapter_to_proto(entry: Entry) -> pb.Adapter:
    """An adapter with its versions."""
    return pb.Adapter(
        name=entry.name,
        versions=[version_to_proto(entry.name, version) for version in entry.versions],
        aliases=dict(entry.aliases),
        revision=entry.revision,
        canaries={
            alias: pb.Canary(version=canary.version, percent=canary.percent)
            for alias, canary in entry.canaries.items()
        },
        previous_versions=dict(entry.previous_versions),
        tenants=entry.tenants,
        pins=[
            pb.Pinned(selector=pin.selector, reason=pin.reason, create_time=_time(pin.created_ns))
            for pin in entry.pins
        ],
        change_time=_time(entry.changed_ns) if entry.changed_ns else None,
    )


def published_to_proto(published: Published) -> pb.PublishResponse:
    """The answer to an upload."""
    return pb.PublishResponse(
        version=version_to_proto(published.name, published.version),
        bindings=[
            pb.BoundModule(module=bound.module.path, rank=bound.rank, scale=bound.scale)
            for bound in published.bindings
        ],
        already_published=published.already_published,
    )


def change_to_proto(change: Change, *, token: str) -> pb.WatchResponse:
    """One message of a watch."""
    match change:
        case Updated(entry):
            return pb.WatchResponse(updated=adapter_to_proto(entry), resume_token=token)
        case Deleted(name):
            return pb.WatchResponse(deleted=name, resume_token=token)
        case Synced(resumed):
            return pb.WatchResponse(synced=pb.WatchSynced(resumed=resumed), resume_token=token)
        case _:
            assert_never(change)


def chunk_to_proto(chunk: Chunk) -> pb.DownloadResponse:
    """One message of a download."""
    return pb.DownloadResponse(offset=chunk.offset, data=chunk.data, total_bytes=chunk.total_bytes)


def _time(time_ns: int) -> timestamp_pb2.Timestamp:
    seconds, nanos = divmod(time_ns, 10**9)
    return timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos)
