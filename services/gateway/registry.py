"""Which adapters exist: a mirror of the adapter store, kept fresh by Watch.

While the store is down the mirror answers from its last state. A name that is not in it is asked
for once at the store, so that a fresh publication works at once; what the store does not have
either is remembered for a moment, in bounded memory, so that made-up names cost little.
"""

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import grpc
import structlog

from calumma.adapter_store.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from services.common.clients import Backoff, open_channel
from services.common.errors import Reason, RpcError
from services.common.telemetry import call_metadata
from services.gateway import wire
from services.gateway.types import AdapterName, AdapterRef

ABSENT_MAX: Final = 10_000
ABSENT_S: Final = 1.0
_QUESTIONS_MAX: Final = 32  # questions to the store at one time
_RETRY_AFTER_S: Final = 1.0
_NOT_FOUND: Final = (
    Reason.ADAPTER_NOT_FOUND,
    Reason.ADAPTER_VERSION_NOT_FOUND,
    Reason.ALIAS_NOT_FOUND,
)
_log = structlog.get_logger("registry")


@dataclass(frozen=True, slots=True)
class _Entry:
    versions: dict[int, AdapterRef]  # oldest first
    aliases: dict[str, int]
    revision: int


class Registry:
    """Resolves adapter names. `changed` is set when `is_synced` becomes true."""

    def __init__(self, target: str, *, timeout_s: float, changed: asyncio.Event) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._changed = changed
        self._entries: dict[str, _Entry] = {}
        self._absent: OrderedDict[AdapterName, float] = OrderedDict()  # until when, monotonic
        self._questions = asyncio.Semaphore(_QUESTIONS_MAX)
        self._channel = open_channel(target)
        self._stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel)
        self.is_synced = False

    def __len__(self) -> int:
        return len(self._entries)

    async def resolve(self, name: AdapterName) -> AdapterRef:
        """The version that a name means now. Raises RpcError."""
        try:
            return self._look_up(name)
        except RpcError:
            if time.monotonic() < self._absent.get(name, 0.0):
                raise
        return await self._ask(name)

    async def run(self) -> None:
        """Follow the store until cancelled."""
        backoff = Backoff()
        while True:
            try:
                await self._follow(backoff)
            except grpc.aio.AioRpcError as error:
                _log.debug("watch_failed", target=self._target, code=error.code().name)
            await asyncio.sleep(backoff.next_delay_s())

    async def close(self) -> None:
        await self._channel.close()

    async def _follow(self, backoff: Backoff) -> None:
        unseen = set(self._entries)  # gone, unless the new watch sends them before `synced`
        call = self._stub.Watch(adapter_store_pb2.WatchRequest())
        try:
            async for change in call:
                match change.WhichOneof("event"):
                    case "updated":
                        unseen.discard(change.updated.name)
                        self._update(change.updated)
                    case "deleted":
                        self._entries.pop(change.deleted, None)
                    case "synced":
                        for name in unseen:
                            self._entries.pop(name, None)
                        unseen.clear()
                        backoff.reset()
                        self._set_synced()
                    case None:  # a kind of change of a newer store
                        continue
        finally:
            call.cancel()

    def _set_synced(self) -> None:
        _log.info("registry_synced", adapters=len(self._entries))
        self.is_synced = True
        self._changed.set()

    def _update(self, adapter: adapter_store_pb2.Adapter) -> None:
        self._entries[adapter.name] = _Entry(
            wire.read_versions(adapter), dict(adapter.aliases), adapter.revision
        )

    def _look_up(self, name: AdapterName) -> AdapterRef:
        entry = self._entries.get(name.name)
        if entry is None or not entry.versions:
            raise _missing(Reason.ADAPTER_NOT_FOUND, name, f"no adapter {name.name}")
        version = name.version
        if name.alias is not None:
            version = entry.aliases.get(name.alias)
            if version is None:
                raise _missing(Reason.ALIAS_NOT_FOUND, name, f"{name.name} has no such alias")
        if version is None:
            return next(reversed(entry.versions.values()))
        if version not in entry.versions:
            raise _missing(
                Reason.ADAPTER_VERSION_NOT_FOUND, name, f"{name.name} has no version {version}"
            )
        return entry.versions[version]

    async def _ask(self, name: AdapterName) -> AdapterRef:
        """Ask the store about a name that the mirror does not have. Raises RpcError."""
        request = adapter_store_pb2.GetRequest(adapter=str(name))
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
                self._remember_absent(name)
            raise _missing(refusal.reason, name, refusal.message) from error
        known = self._entries.get(name.name)
        if known is None or answer.adapter.revision > known.revision:
            self._update(answer.adapter)
        return wire.read_adapter_ref(answer.version.ref)

    def _remember_absent(self, name: AdapterName) -> None:
        self._absent[name] = time.monotonic() + ABSENT_S
        self._absent.move_to_end(name)
        if len(self._absent) > ABSENT_MAX:
            self._absent.popitem(last=False)


def _missing(reason: Reason, name: AdapterName, message: str) -> RpcError:
    return RpcError(reason, message, field="adapter", resource=("adapter", str(name)))


def _unavailable() -> RpcError:
    return RpcError(
        Reason.STORE_UNAVAILABLE,
        "the adapter is not known here and the adapter store can't be asked",
        field="adapter",
        stage="admission",
        retry_after_s=_RETRY_AFTER_S,
    )
