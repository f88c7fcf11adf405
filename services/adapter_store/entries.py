"""An adapter in the registry: its versions, and which of them a reference means. Pure.

An `Entry` is what one revision document holds (`documents`); `changes` has what can be done to it.
An adapter that was deleted stays as an entry without versions, a tombstone: version numbers are
never given twice, so "name@2" can't mean other weights tomorrow, and who was away is told that the
adapter is gone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, assert_never

from services.adapter_store.references import Aliased, Latest, Numbered, Reference
from services.common.errors import Reason, RpcError

# Shared by all that have none: a registry has a hundred thousand of them.
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Weights:
    """What a version is, apart from its number and date."""

    digest: str
    rank: int
    size_bytes: int
    target_modules: tuple[str, ...]
    dtype: str
    base_model: str
    parameters: int


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a version came from. Empty: not known."""

    source: str = ""
    publisher: str = ""
    peft_version: str = ""
    config_sha256: str = ""
    weights_sha256: str = ""


UNKNOWN_ORIGIN: Final = Provenance()


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version."""

    number: int
    created_ns: int
    weights: Weights
    labels: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    provenance: Provenance = UNKNOWN_ORIGIN


@dataclass(frozen=True, slots=True)
class Canary:
    """`percent` (1 to 99) of an alias's requests go to `version`."""

    version: int
    percent: int


@dataclass(frozen=True, slots=True)
class Pin:
    """Workers keep the version that `selector` means: "" the newest, else a number or an alias."""

    selector: str
    reason: str
    created_ns: int


@dataclass(frozen=True, slots=True)
class Entry:
    """An adapter at one revision. Revision 0: it has never existed.

    `change_id` tells a writer that lost the answer whether the document it meets is its own.
    `changed_ns` is when this revision was decided, by its writer's clock; 0 in documents that are
    older than this field. `previous_versions` is where each alias pointed before. `tenants` may use
    it; when there are none, all may.
    """

    name: str
    revision: int = 0
    versions: tuple[Version, ...] = ()
    aliases: Mapping[str, int] = field(default_factory=lambda: NOTHING)
    next_version: int = 1
    change_id: str = ""
    changed_ns: int = 0
    canaries: Mapping[str, Canary] = field(default_factory=lambda: NOTHING)
    previous_versions: Mapping[str, int] = field(default_factory=lambda: NOTHING)
    tenants: tuple[str, ...] = ()
    pins: tuple[Pin, ...] = ()

    @property
    def is_live(self) -> bool:
        """False for a tombstone and for what has never existed."""
        return bool(self.versions)

    def is_visible_to(self, tenant: str) -> bool:
        """Whether this tenant may know of it. "" is the operator, who sees all."""
        return not tenant or not self.tenants or tenant in self.tenants

    def find(self, number: int) -> Version | None:
        """The version of this number, if it lives."""
        return next((item for item in self.versions if item.number == number), None)

    def with_digest(self, digest: str) -> Version | None:
        """The version that has these weights."""
        return next((item for item in self.versions if item.weights.digest == digest), None)

    def pinned(self, pin: Pin) -> Version | None:
        """The version that a pin means now."""
        if not self.versions:
            return None
        if not pin.selector:
            return self.versions[-1]
        number = int(pin.selector) if pin.selector.isdecimal() else self.aliases.get(pin.selector)
        return None if number is None else self.find(number)


def resolve(entry: Entry, reference: Reference) -> Version:
    """The version that a reference means. Raises the NOT_FOUND that applies."""
    if not entry.is_live:
        raise adapter_not_found(reference.name)
    match reference.selector:
        case Latest():
            return entry.versions[-1]
        case Numbered(number):
            return existing(entry, number)
        case Aliased(alias):
            if alias not in entry.aliases:
                raise alias_not_found(reference.name, alias)
            return existing(entry, entry.aliases[alias])
        case _:
            assert_never(reference.selector)


def existing(entry: Entry, number: int) -> Version:
    """The version of this number. Raises ADAPTER_VERSION_NOT_FOUND."""
    version = entry.find(number)
    if version is None:
        raise RpcError(
            Reason.ADAPTER_VERSION_NOT_FOUND,
            f"{entry.name} has no version {number}",
            field="adapter",
            resource=("adapter_version", f"{entry.name}@{number}"),
        )
    return version


def adapter_not_found(name: str) -> RpcError:
    """The error for a name without live versions."""
    return RpcError(
        Reason.ADAPTER_NOT_FOUND,
        f"no adapter is named {name}",
        field="adapter",
        resource=("adapter", name),
    )


def alias_not_found(name: str, alias: str) -> RpcError:
    """The error for an alias that a live adapter does not have."""
    return RpcError(
        Reason.ALIAS_NOT_FOUND,
        f"{name} has no alias {alias}",
        field="adapter",
        resource=("alias", f"{name}@{alias}"),
    )
