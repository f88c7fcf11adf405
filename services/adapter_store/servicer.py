"""`AdapterStoreService`: each RPC parses, calls and serialises."""

# ruff: noqa: ARG002 - gRPC passes every method a context and a request

import base64
import binascii
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import Executor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from calumma.adapter_store.v1 import adapter_store_pb2_grpc as pb_grpc
from services.adapter_store import aliases, changes
from services.adapter_store.blobs import Blobs
from services.adapter_store.descriptions import (
    check_reason,
    check_tenant,
    checked_labels,
    checked_tenants,
)
from services.adapter_store.entries import Canary
from services.adapter_store.listing import (
    PAGE_SIZE_DEFAULT,
    PAGE_SIZE_MAX,
    Filter,
    page_of,
)
from services.adapter_store.publishing import Publisher
from services.adapter_store.references import (
    Aliased,
    Latest,
    Numbered,
    check_alias,
    check_digest,
    check_name,
    parse_reference,
)
from services.adapter_store.registry import Decide, Registry
from services.adapter_store.upload import Spool, UploadLimits, receive
from services.adapter_store.wire import (
    adapter_to_proto,
    change_to_proto,
    chunk_to_proto,
    published_to_proto,
    version_to_proto,
)
from services.common.errors import Reason, RpcError
from services.common.interceptors import annotate

LONG_LIVED: Final = frozenset({"Watch"})

Context = grpc.aio.ServicerContext[Any, Any]


class AdapterStoreServicer(pb_grpc.AdapterStoreServiceServicer):
    """The RPCs. `threads` write uploads to disk."""

    def __init__(
        self,
        registry: Registry,
        blobs: Blobs,
        publisher: Publisher,
        *,
        limits: UploadLimits,
        spool_dir: Path,
        threads: Executor,
    ) -> None:
        self._registry = registry
        self._blobs = blobs
        self._publisher = publisher
        self._limits = limits
        self._spool_dir = spool_dir
        self._threads = threads
        self._uploads = 0

    async def Publish(
        self, request_iterator: AsyncIterator[pb.PublishRequest], context: Context
    ) -> pb.PublishResponse:
        if self._uploads >= self._limits.uploads_max:
            raise RpcError(
                Reason.TOO_MANY_REQUESTS, f"{self._uploads} uploads are running", retry_after_s=5.0
            )
        spool = Spool(self._spool_dir, bytes_max=self._limits.bytes_max)
        self._uploads += 1
        try:
            metadata = await receive(
                request_iterator, spool, idle_s=self._limits.idle_s, threads=self._threads
            )
            annotate(adapter=metadata.name, dry_run=metadata.dry_run)
            published = await self._publisher.publish(metadata, spool)
        finally:
            self._uploads -= 1
            spool.close()
        weights = published.version.weights
        annotate(
            adapter=f"{published.name}@{published.version.number}",
            digest=weights.digest,
            bytes=weights.size_bytes,
        )
        return published_to_proto(published)

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        reference = parse_reference(request.adapter)
        annotate(adapter=str(reference))
        tenant = _tenant(request.tenant)
        version, entry = await self._registry.get(reference, tenant=tenant)
        annotate(digest=version.weights.digest)
        return pb.GetResponse(
            version=version_to_proto(entry.name, version), adapter=adapter_to_proto(entry)
        )

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        if not 0 <= request.page_size <= PAGE_SIZE_MAX:
            raise RpcError(
                Reason.INVALID_FIELD, f"page_size must be 1 to {PAGE_SIZE_MAX}", field="page_size"
            )
        digest = request.digest
        if digest:
            check_digest(digest)
        wanted = Filter(
            labels=checked_labels(request.labels, field="labels"),
            base_model=request.base_model,
            digest=digest,
            tenant=_tenant(request.tenant),
        )
        entries = self._registry.page(
            after=_after(request.page_token), prefix=request.name_prefix, digest=digest
        )
        size = request.page_size or PAGE_SIZE_DEFAULT
        page = page_of(entries, wanted, size=size, write=adapter_to_proto)
        token = "" if page.last is None else _page_token(page.last)
        return pb.ListResponse(adapters=page.adapters, next_page_token=token)

    async def Watch(
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncGenerator[pb.WatchResponse]:
        watch = self._registry.watch(request.resume_token, pinned_only=request.pinned_only)
        async with aclosing(watch) as messages:
            async for told in messages:
                token = "" if told.until_ns is None else self._registry.token(told.until_ns)
                yield change_to_proto(told.change, token=token)

    async def Download(
        self, request: pb.DownloadRequest, context: Context
    ) -> AsyncGenerator[pb.DownloadResponse]:
        check_digest(request.digest)
        annotate(digest=request.digest, offset=request.offset)
        sent_bytes = 0
        async with aclosing(self._blobs.read(request.digest, offset=request.offset)) as chunks:
            async for chunk in chunks:
                yield chunk_to_proto(chunk)
                sent_bytes += len(chunk.data)
                annotate(bytes=sent_bytes)

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse:
        reference = parse_reference(request.adapter)
        annotate(adapter=str(reference))
        match reference.selector:
            case Latest():
                await self._registry.change(reference.name, changes.delete_all)
            case Numbered(version):
                decide = partial(changes.delete_version, number=version)
                await self._registry.change(reference.name, decide)
            case Aliased():
                raise RpcError(
                    Reason.INVALID_FIELD,
                    f'{reference}: name the version, or use "DeleteAlias"',
                    field="adapter",
                )
        return pb.DeleteResponse()

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        _check_alias_of(request.name, request.alias)
        if request.version < 1:
            raise RpcError(Reason.INVALID_FIELD, "version must be 1 and up", field="version")
        percent = request.canary_percent
        if not 0 <= percent <= 99:
            raise RpcError(
                Reason.INVALID_FIELD,
                "canary_percent must be 1 to 99, or 0 for all of the alias",
                field="canary_percent",
            )
        annotate(version=request.version, canary_percent=percent)
        if percent:
            canary = Canary(request.version, percent)
            decide = partial(aliases.set_canary, alias=request.alias, canary=canary)
        else:
            decide = partial(aliases.set_alias, alias=request.alias, number=request.version)
        return pb.SetAliasResponse(adapter=await self._changed(request.name, decide))

    async def RollbackAlias(
        self, request: pb.RollbackAliasRequest, context: Context
    ) -> pb.RollbackAliasResponse:
        _check_alias_of(request.name, request.alias)
        decide = partial(aliases.roll_back, alias=request.alias)
        return pb.RollbackAliasResponse(adapter=await self._changed(request.name, decide))

    async def DeleteAlias(
        self, request: pb.DeleteAliasRequest, context: Context
    ) -> pb.DeleteAliasResponse:
        _check_alias_of(request.name, request.alias)
        decide = partial(aliases.delete_alias, alias=request.alias)
        return pb.DeleteAliasResponse(adapter=await self._changed(request.name, decide))

    async def SetVisibility(
        self, request: pb.SetVisibilityRequest, context: Context
    ) -> pb.SetVisibilityResponse:
        check_name(request.name, field="name")
        tenants = checked_tenants(request.tenants, field="tenants")
        annotate(adapter=request.name, tenants=len(tenants))
        decide = partial(changes.set_visibility, tenants=tenants)
        return pb.SetVisibilityResponse(adapter=await self._changed(request.name, decide))

    async def Pin(self, request: pb.PinRequest, context: Context) -> pb.PinResponse:
        reference = parse_reference(request.adapter)
        annotate(adapter=str(reference))
        check_reason(request.reason, field="reason")
        version, _ = await self._registry.get(reference)
        self._registry.check_room_for_pin(reference.name, version.weights)
        decide = partial(
            changes.pin, reference=reference, reason=request.reason, now_ns=time.time_ns()
        )
        return pb.PinResponse(adapter=await self._changed(reference.name, decide))

    async def Unpin(self, request: pb.UnpinRequest, context: Context) -> pb.UnpinResponse:
        reference = parse_reference(request.adapter)
        annotate(adapter=str(reference))
        decide = partial(changes.unpin, reference=reference)
        return pb.UnpinResponse(adapter=await self._changed(reference.name, decide))

    async def _changed(self, name: str, decide: Decide) -> pb.Adapter:
        return adapter_to_proto(await self._registry.change(name, decide))


def _check_alias_of(name: str, alias: str) -> None:
    check_name(name, field="name")
    check_alias(alias, field="alias")
    annotate(adapter=f"{name}@{alias}")


def _tenant(tenant: str) -> str:
    """A tenant, or "" for the operator."""
    if tenant:
        check_tenant(tenant, field="tenant")
    return tenant


def _page_token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _after(page_token: str) -> str:
    """The last name of the page before."""
    try:
        name = base64.b64decode(page_token.encode(), b"-_", validate=True).decode()
        if name:
            check_name(name, field="page_token")
    except (binascii.Error, UnicodeError) as error:
        raise RpcError(
            Reason.INVALID_FIELD, "not a token of this service", field="page_token"
        ) from error
    return name
