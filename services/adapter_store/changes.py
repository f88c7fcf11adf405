"""Every change that can be made to an adapter. Pure.

A change takes an entry and gives the next one, or the same one when there is nothing to change, or
raises the error that the client gets. Aliases have a module of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from services.adapter_store.aliases import set_alias
from services.adapter_store.entries import (
    NOTHING,
    UNKNOWN_ORIGIN,
    Entry,
    Pin,
    Provenance,
    Version,
    Weights,
    adapter_not_found,
    existing,
    resolve,
)
from services.adapter_store.references import Latest, Numbered, Reference
from services.common.errors import Reason, RpcError

VERSIONS_MAX: Final = 1000
PINS_MAX: Final = 16
DESCRIPTION_BYTES_MAX: Final = 2**20  # labels and sources of all versions: they are in each answer


@dataclass(frozen=True, slots=True)
class Terms:
    """What a publisher asks for. `number` None: the next one. `tenants` are for a first version."""

    aliases: tuple[str, ...] = ()
    number: int | None = None
    labels: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    tenants: tuple[str, ...] = ()
    provenance: Provenance = UNKNOWN_ORIGIN


DEFAULT_TERMS: Final = Terms()


def publish(entry: Entry, weights: Weights, terms: Terms = DEFAULT_TERMS, *, now_ns: int) -> Entry:
    """Add a version, unless one has these weights, and point aliases at it.

    A version that is there stays as it is, its labels and provenance too.
    """
    check_publisher(entry, terms.provenance.publisher)
    entry = _with_tenants(entry, terms.tenants)
    version = entry.with_digest(weights.digest)
    _check_number(entry, terms.number, version)
    if version is None:
        version = Version(entry.next_version, now_ns, weights, terms.labels, terms.provenance)
        entry = replace(entry, versions=(*entry.versions, version), next_version=version.number + 1)
        _check_size(entry)
    for alias in terms.aliases:
        entry = set_alias(entry, alias, version.number)
    return entry


def check_publisher(entry: Entry, tenant: str) -> None:
    """Raises PERMISSION_DENIED for a name that belongs to others, saying nothing of the adapter."""
    if entry.is_live and not entry.is_visible_to(tenant):
        raise RpcError(
            Reason.PERMISSION_DENIED,
            f"{tenant} may not publish under this name",
            field="metadata.name",
        )


def set_visibility(entry: Entry, tenants: tuple[str, ...]) -> Entry:
    """Only these tenants may use it; none named: all may."""
    if not entry.is_live:
        raise adapter_not_found(entry.name)
    return replace(entry, tenants=tenants)


def pin(entry: Entry, reference: Reference, *, reason: str, now_ns: int) -> Entry:
    """Have workers keep what the reference means. A pin that is there gets the new reason."""
    resolve(entry, reference)
    selector = selector_text(reference)
    before = next((item for item in entry.pins if item.selector == selector), None)
    if before is not None:
        kept = replace(before, reason=reason)
        pins = tuple(kept if item is before else item for item in entry.pins)
        return replace(entry, pins=pins)
    if len(entry.pins) >= PINS_MAX:
        raise _limit(f"{entry.name} has {PINS_MAX} pins; unpin one first", field="adapter")
    return replace(entry, pins=(*entry.pins, Pin(selector, reason, now_ns)))


def unpin(entry: Entry, reference: Reference) -> Entry:
    """Remove the pin of exactly this reference."""
    if not entry.is_live:
        raise adapter_not_found(entry.name)
    pins = tuple(item for item in entry.pins if item.selector != selector_text(reference))
    if len(pins) == len(entry.pins):
        raise RpcError(
            Reason.PIN_NOT_FOUND,
            f"{reference} is not pinned",
            field="adapter",
            resource=("pin", str(reference)),
        )
    return replace(entry, pins=pins)


def selector_text(reference: Reference) -> str:
    """How a pin writes the selector of a reference."""
    match reference.selector:
        case Latest():
            return ""
        case Numbered(number):
            return str(number)
        case aliased:
            return aliased.alias


def delete_version(entry: Entry, number: int) -> Entry:
    """Remove a version that no alias, canary or pin needs."""
    if not entry.is_live:
        raise adapter_not_found(entry.name)
    version = existing(entry, number)
    needs = _needs(entry, number)
    if needs:
        raise RpcError(
            Reason.ADAPTER_IN_USE,
            f"{entry.name}@{number} is what {', '.join(text for _, text in needs)} needs; "
            "move or delete that first",
            field="adapter",
            resource=needs[0][0],
        )
    versions = tuple(item for item in entry.versions if item is not version)
    if not versions:
        return delete_all(entry)
    previous = {a: n for a, n in entry.previous_versions.items() if n != number}
    return replace(entry, versions=versions, previous_versions=previous)


def delete_all(entry: Entry) -> Entry:
    """Remove every version and all that was said of them; the numbers stay given."""
    if not entry.is_live:
        raise adapter_not_found(entry.name)
    return Entry(entry.name, revision=entry.revision, next_version=entry.next_version)


def _needs(entry: Entry, number: int) -> list[tuple[tuple[str, str], str]]:
    """What keeps a version: resource type and name, and how to say it."""
    name = entry.name
    needs = [
        (("alias", f"{name}@{alias}"), f"the alias {alias}")
        for alias, target in sorted(entry.aliases.items())
        if target == number
    ]
    needs += [
        (("alias", f"{name}@{alias}"), f"the canary of the alias {alias}")
        for alias, canary in sorted(entry.canaries.items())
        if canary.version == number
    ]
    # A pin of the newest version moves on to another one, if there is another.
    pinned = {str(number)} if len(entry.versions) > 1 else {str(number), ""}
    needs += [
        (("pin", f"{name}@{item.selector}" if item.selector else name), f"a pin ({item.reason})")
        for item in entry.pins
        if item.selector in pinned
    ]
    return needs


def _with_tenants(entry: Entry, tenants: tuple[str, ...]) -> Entry:
    if not entry.is_live:
        return replace(entry, tenants=tenants)
    if tenants and tenants != entry.tenants:
        raise RpcError(
            Reason.INVALID_FIELD,
            f"{entry.name} exists and other tenants may use it; SetVisibility changes that",
            field="metadata.tenants",
        )
    return entry


def _check_number(entry: Entry, number: int | None, version: Version | None) -> None:
    """The wanted number against the version that has these weights, None when none has."""
    if number is None or (version is not None and version.number == number):
        return
    taken = entry.find(number)
    if taken is not None:
        text = f"{entry.name}@{number} has other weights: {taken.weights.digest}"
    elif version is not None:
        text = f"these weights are {entry.name}@{version.number} already"
    elif number < entry.next_version:
        text = f"{entry.name}@{number} was deleted, and a number is never given twice"
    elif number > entry.next_version:
        raise RpcError(
            Reason.INVALID_FIELD,
            f"the next version of {entry.name} is {entry.next_version}",
            field="metadata.version",
        )
    else:
        return
    raise RpcError(
        Reason.ADAPTER_VERSION_EXISTS,
        f"{text}; the next version is {entry.next_version}",
        field="metadata.version",
        resource=("adapter_version", f"{entry.name}@{number}"),
    )


def _check_size(entry: Entry) -> None:
    if len(entry.versions) > VERSIONS_MAX:
        raise _limit(
            f"{entry.name} has {VERSIONS_MAX} versions; delete some first", field="metadata.name"
        )
    described_bytes = sum(
        len(text.encode())
        for version in entry.versions
        for text in (version.provenance.source, *version.labels.keys(), *version.labels.values())
    )
    if described_bytes > DESCRIPTION_BYTES_MAX:
        raise _limit(
            f"labels and sources of all versions of {entry.name} have {described_bytes} bytes; "
            f"at most {DESCRIPTION_BYTES_MAX}",
            field="metadata.labels",
        )


def _limit(message: str, *, field: str) -> RpcError:
    return RpcError(Reason.FIELD_LIMIT_EXCEEDED, message, field=field)
