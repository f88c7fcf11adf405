"""Which adapters exist: a mirror of the adapter store, kept fresh by Watch.

While the store is down the mirror answers from its last state, and a watch that broke goes on where
it was. A name that is not in the mirror, or not for this tenant, is asked for once at the store, so
that a fresh publication works at once; what the store does not have either is remembered for a
moment, so that made-up names cost little.
"""

import asyncio
import time
from collections import OrderedDict
from typing import Final

import grpc
import structlog

from calumma.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from services.common.clients import Backoff, open_channel
from services.common.errors import Reason, RpcError
from services.common.telemetry import call_metadata
from services.gateway import wire
from services.gateway.absences import Absences
from services.gateway.catalogue import Catalogue, choose, missing
from services.gateway.types import AdapterName, AdapterRef

_QUESTIONS_MAX: Final = 32  # questions to the store at one time
_RETRY_AFTER_S: Final = 1.0
_GONE_MAX: Final = 10_000  # names that were deleted, the last ones
_NOT_FOUND: Final = (
    Reason.ADAPTER_NOT_FOUND,
    Reason.ADAPTER_VERSION_NOT_FOUND,
    Reason.ALIAS_NOT_FOUND,
)
_log = structlog.get_logger("registry")


class Registry:
    """Resolves adapter names. `changed` is set when `is_synced` becomes true."""

    def __init__(self, target: str, *, timeout_s: float, changed: asyncio.Event) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._changed = changed
        self._catalogue = Catalogue()
        self._absences = Absences()
        self._gone: OrderedDict[str, None] = OrderedDict()  # deleted, and not published since
        self._resume_token = ""
        self._questions = asyncio.Semaphore(_QUESTIONS_MAX)
        self._channel = open_channel(target)
        self._stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel)
        self.is_synced = False

    def __len__(self) -> int:
        return len(self._catalogue)

    async def resolve(self, name: AdapterName, *, tenant: str, request_id: str) -> AdapterRef:
        """The version that a name means now for this request of this tenant. Raises RpcError."""
        try:
            return self._catalogue.resolve(name, tenant=tenant, request_id=request_id)
        except RpcError:
            if self._absences.holds(tenant, name, now=time.monotonic()):
                raise
        return await self._ask(name, tenant=tenant, request_id=request_id)

    async def run(self) -> None:
        """Follow the store until cancelled."""
        backoff = Backoff()
        while True:
            try:
                await self._follow(backoff)
            except grpc.aio.AioRpcError as error:
                _log.debug("watch_failed", target=self._target, code=error.code().name)
                if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                    self._resume_token = ""  # a store that can't read it sends everything
            await asyncio.sleep(backoff.next_delay_s())

    async def close(self) -> None:
        await self._channel.close()

    async def _follow(self, backoff: Backoff) -> None:
        unseen = set(self._catalogue)  # gone, unless `synced` says that only changes were sent
        is_synced = False
        request = adapter_store_pb2.WatchRequest(resume_token=self._resume_token)
        call = self._stub.Watch(request)
        try:
            async for change in call:
                match change.WhichOneof("event"):
                    case "updated":
                        unseen.discard(change.updated.name)
                        self._gone.pop(change.updated.name, None)
                        # A store that is wiped begins again at revision 1, in a whole snapshot.
                        self._update(change.updated, may_go_back=not is_synced)
                    case "deleted":
                        self._remove(change.deleted)
                    case "synced":
                        is_synced = True
                        gone = () if change.synced.resumed else unseen
                        for name in gone:
                            self._remove(name)
                        unseen = set()
                        backoff.reset()
                        self._set_synced(resumed=change.synced.resumed)
                    case None:  # a kind of change of a newer store
                        pass
                if change.resume_token:
                    self._resume_token = change.resume_token
        finally:
            call.cancel()

    def _set_synced(self, *, resumed: bool) -> None:
        _log.info("registry_synced", adapters=len(self), resumed=resumed)
        self.is_synced = True
        self._changed.set()

    def _update(self, adapter: adapter_store_pb2.Adapter, *, may_go_back: bool) -> None:
        """Take an adapter, unless the mirror has seen a later revision of it."""
        if not may_go_back:
            known = self._catalogue.find(adapter.name)
            if known is not None and known.revision > adapter.revision:
                return
        self._catalogue.put(adapter.name, wire.pack_adapter(adapter))

    def _remove(self, name: str) -> None:
        """An adapter is gone: only the watch can say that there is one again.

        A replica that is behind may still answer that it is there.
        """
        self._catalogue.remove(name)
        self._gone[name] = None
        self._gone.move_to_end(name)
        if len(self._gone) > _GONE_MAX:
            self._gone.popitem(last=False)

    async def _ask(self, name: AdapterName, *, tenant: str, request_id: str) -> AdapterRef:
        """Ask the store about a name that the mirror does not have. Raises RpcError."""
        request = adapter_store_pb2.GetRequest(adapter=str(name), tenant=tenant)
        try:
            async with asyncio.timeout(self._timeout_s), self._questions:
                answer = await self._stub.Get(
                    request, timeout=self._timeout_s, metadata=call_metadata()
                )
        except TimeoutError as error:
            raise _unavailable() from error
        except grpc.aio.AioRpcError as error:
            refusal = RpcError.from_rpc(error)
            if refusal is None or refusal.code is grpc.StatusCode.UNAVAILABLE:
                raise _unavailable() from error
            if refusal.reason in _NOT_FOUND:
                self._absences.add(tenant, name, now=time.monotonic())
            raise missing(refusal.reason, name, refusal.message) from error
        if name.name not in self._gone:
            self._update(answer.adapter, may_go_back=False)
        entry = wire.unpack_adapter(name.name, wire.pack_adapter(answer.adapter))
        return choose(entry, name, request_id=request_id)


def _unavailable() -> RpcError:
    return RpcError(
        Reason.STORE_UNAVAILABLE,
        "the adapter is not known here and the adapter store can't be asked",
        field="adapter",
        stage="admission",
        retry_after_s=_RETRY_AFTER_S,
    )
