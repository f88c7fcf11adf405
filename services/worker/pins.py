"""Which adapters are pinned: a watch of the adapter store that tells of those with pins only.

Pins are desired state: whatever the store has is what the worker wants, at its start and after
every break, so nothing is acknowledged and nothing can be missed. While the store is away the last
pins stay. A pin's selector is resolved against the adapter's message that carries it.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import structlog

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from calumma.adapter_store.v1 import adapter_store_pb2_grpc as pb_grpc
from services.common.clients import Backoff
from services.common.errors import RpcError
from services.core.types import Pin
from services.worker import wire

PINS_MAX: Final = 1000  # that are told; the oldest ones count
_log = structlog.get_logger("pins")


@dataclass(frozen=True, slots=True, order=True)
class _Pinned:
    """Ordered by age, then name, so that every worker has the same order."""

    created_ns: int
    name: str
    selector: str
    pin: Pin = field(compare=False)


class PinWatch:
    """Follows the store's pins. `set_pins` gets all of them, the oldest first, when they change."""

    def __init__(
        self, channel: grpc.aio.Channel, set_pins: Callable[[tuple[Pin, ...]], None]
    ) -> None:
        self._stub = pb_grpc.AdapterStoreServiceStub(channel)
        self._set_pins = set_pins
        self._pinned: dict[str, tuple[_Pinned, ...]] = {}  # by adapter name
        self._resume_token = ""
        self._told: tuple[Pin, ...] = ()
        self._is_synced = False

    async def run(self) -> None:
        """Until cancelled."""
        backoff = Backoff()
        while True:
            try:
                await self._follow(backoff)
            except grpc.aio.AioRpcError as error:
                _log.debug("watch_failed", code=error.code().name)
                if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                    self._resume_token = ""  # a store that can't read it sends everything
            await asyncio.sleep(backoff.next_delay_s())

    async def _follow(self, backoff: Backoff) -> None:
        unseen = set(self._pinned)  # without pins, unless `synced` says that only changes were sent
        request = pb.WatchRequest(resume_token=self._resume_token, pinned_only=True)
        call: Any = self._stub.Watch(request)
        try:
            async for change in call:
                self._take(change, unseen)
                if change.resume_token:
                    self._resume_token = change.resume_token
                if change.HasField("synced"):
                    backoff.reset()
                    self._is_synced = True
                if self._is_synced:  # before that, what is known is a part
                    self._tell()
        finally:
            call.cancel()

    def _take(self, change: pb.WatchResponse, unseen: set[str]) -> None:
        match change.WhichOneof("event"):
            case "updated":
                unseen.discard(change.updated.name)
                pinned = tuple(_read_pins(change.updated))
                self._pinned[change.updated.name] = pinned
            case "deleted":
                self._pinned.pop(change.deleted, None)
            case "synced":
                if not change.synced.resumed:
                    for name in unseen:
                        del self._pinned[name]
                unseen.clear()
            case None:  # a kind of change of a newer store
                pass

    def _tell(self) -> None:
        pins: dict[str, Pin] = {}
        for pinned in sorted(one for pins_of in self._pinned.values() for one in pins_of):
            pins.setdefault(pinned.pin.adapter.digest, pinned.pin)
        told = tuple(pins.values())[:PINS_MAX]
        if told != self._told:
            self._told = told
            _log.info("pins_changed", pins=len(told))
            self._set_pins(told)


def _read_pins(adapter: pb.Adapter) -> Iterator[_Pinned]:
    """What the adapter's pins mean now; one that means nothing, or can't be read, is none."""
    versions = {version.ref.version: version.ref for version in adapter.versions}
    for pinned in adapter.pins:
        ref = versions.get(_number(adapter, pinned.selector))
        if ref is None:
            continue
        try:
            pin = Pin(wire.adapter_from(ref), pinned.reason)
        except RpcError as error:
            _log.warning("bad_pin", adapter=adapter.name, message=error.message)
            continue
        created_ns = pinned.create_time.ToNanoseconds()
        yield _Pinned(created_ns, adapter.name, pinned.selector, pin)


def _number(adapter: pb.Adapter, selector: str) -> int:
    """The version that a selector means; 0, which no version has, when it means none."""
    if not selector:
        return adapter.versions[-1].ref.version if adapter.versions else 0
    if selector.isascii() and selector.isdigit():
        return int(selector)
    return adapter.aliases.get(selector, 0)
