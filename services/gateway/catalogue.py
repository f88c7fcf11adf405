"""What the registry holds, and which version a name means for one request. No I/O, no clock.

Rules:

- An adapter that a tenant may not use is unknown to it: same error, whatever follows the name.
- Of an alias with a canary, `percent` in 100 requests get the canary's version. Which ones, a hash
  of alias and request id says, so a request that comes again stays where it was, and those of a
  small percentage are among those of a larger one.
- An adapter costs a few hundred bytes, in one object that the garbage collector never looks at;
  it is unpacked when it is asked for, and the last ones that were stay unpacked.
"""

from collections import OrderedDict
from collections.abc import Iterator
from hashlib import blake2b
from typing import Final

from services.common.errors import Reason, RpcError
from services.gateway import wire
from services.gateway.types import AdapterEntry, AdapterName, AdapterRef

UNPACKED_MAX: Final = 1024


class Catalogue:
    """All adapters by name, as `wire.pack_adapter` makes them."""

    def __init__(self) -> None:
        self._packed: dict[str, bytes] = {}
        self._unpacked: OrderedDict[str, AdapterEntry] = OrderedDict()  # last used last

    def __len__(self) -> int:
        return len(self._packed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def put(self, name: str, packed: bytes) -> None:
        """An adapter is new or has changed."""
        self._packed[name] = packed
        self._unpacked.pop(name, None)

    def remove(self, name: str) -> None:
        """An adapter is gone. Nothing happens if it was not here."""
        self._packed.pop(name, None)
        self._unpacked.pop(name, None)

    def find(self, name: str) -> AdapterEntry | None:
        """An adapter, or None."""
        entry = self._unpacked.get(name)
        if entry is not None:
            self._unpacked.move_to_end(name)
            return entry
        packed = self._packed.get(name)
        if packed is None:
            return None
        entry = self._unpacked[name] = wire.unpack_adapter(name, packed)
        if len(self._unpacked) > UNPACKED_MAX:
            self._unpacked.popitem(last=False)
        return entry

    def resolve(self, name: AdapterName, *, tenant: str, request_id: str) -> AdapterRef:
        """The version that a name means for this request. Raises RpcError."""
        entry = self.find(name.name)
        if entry is None or (entry.tenants and tenant not in entry.tenants):
            raise missing(Reason.ADAPTER_NOT_FOUND, name, f"no adapter is named {name.name}")
        return choose(entry, name, request_id=request_id)


def choose(entry: AdapterEntry, name: AdapterName, *, request_id: str) -> AdapterRef:
    """The version of an adapter that the tenant may use. Raises RpcError."""
    if not entry.versions:
        raise missing(Reason.ADAPTER_NOT_FOUND, name, f"no adapter is named {name.name}")
    version = name.version
    if name.alias is not None:
        version = _aliased(entry, name.alias, request_id)
        if version is None:
            message = f"{name.name} has no alias {name.alias}"
            raise missing(Reason.ALIAS_NOT_FOUND, name, message)
    if version is None:
        return next(reversed(entry.versions.values()))
    if version not in entry.versions:
        message = f"{name.name} has no version {version}"
        raise missing(Reason.ADAPTER_VERSION_NOT_FOUND, name, message)
    return entry.versions[version]


def missing(reason: Reason, name: AdapterName, message: str) -> RpcError:
    """The error for a name that means nothing."""
    return RpcError(reason, message, field="adapter", resource=("adapter", str(name)))


def _aliased(entry: AdapterEntry, alias: str, request_id: str) -> int | None:
    canary = entry.canaries.get(alias)
    if canary is not None and canary.version in entry.versions:
        key = f"{entry.name}@{alias}\n{request_id}".encode()
        share = int.from_bytes(blake2b(key, digest_size=8).digest()) / 2**64  # in [0, 1)
        if share < canary.percent / 100:
            return canary.version
    return entry.aliases.get(alias)
