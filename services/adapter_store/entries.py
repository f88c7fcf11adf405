"""An adapter in the registry, and every change that can be made to it. Pure.

An `Entry` is what one revision document holds. A change takes an entry and gives the next one, or
the same one when there is nothing to change, or raises the error that the client gets. An adapter
that was deleted stays as an entry without versions, a tombstone: version numbers are never given
twice, so "name@2" can't mean other weights tomorrow.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, assert_never

from services.adapter_store.references import Aliased, Latest, Numbered, Reference
from services.common.errors import Reason, RpcError

FORMAT: Final = 1
VERSIONS_MAX: Final = 1000
ALIASES_MAX: Final = 64


class EntryError(ValueError):
    """A revision document that this release can't read."""


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
class Version:
    """One immutable version."""

    number: int
    created_ns: int
    weights: Weights


@dataclass(frozen=True, slots=True)
class Entry:
    """An adapter at one revision. Revision 0: it has never existed.

    `change_id` tells a writer that lost the answer whether the document it meets is its own.
    """

    name: str
    revision: int = 0
    versions: tuple[Version, ...] = ()
    aliases: Mapping[str, int] = field(default_factory=dict)
    next_version: int = 1
    change_id: str = ""

    @property
    def is_live(self) -> bool:
        """False for a tombstone and for what has never existed."""
        return bool(self.versions)

    def find(self, number: int) -> Version | None:
        """The version of this number, if it lives."""
        return next((item for item in self.versions if item.number == number), None)

    def with_digest(self, digest: str) -> Version | None:
        """The version that has these weights."""
        return next((item for item in self.versions if item.weights.digest == digest), None)


def resolve(entry: Entry, reference: Reference) -> Version:
    """The version that a reference means. Raises the NOT_FOUND that applies."""
    if not entry.is_live:
        raise adapter_not_found(reference.name)
    match reference.selector:
        case Latest():
            return entry.versions[-1]
        case Numbered(number):
            return _existing(entry, number)
        case Aliased(alias):
            if alias not in entry.aliases:
                raise alias_not_found(reference.name, alias)
            return _existing(entry, entry.aliases[alias])
        case _:
            assert_never(reference.selector)


def publish(entry: Entry, weights: Weights, *, aliases: tuple[str, ...], now_ns: int) -> Entry:
    """Add a version, unless one has these weights, and point aliases at it."""
    version = entry.with_digest(weights.digest)
    if version is None:
        if len(entry.versions) >= VERSIONS_MAX:
            raise RpcError(
                Reason.FIELD_LIMIT_EXCEEDED,
                f"{entry.name} has {VERSIONS_MAX} versions; delete some first",
                field="metadata.name",
            )
        version = Version(entry.next_version, now_ns, weights)
        entry = replace(entry, versions=(*entry.versions, version), next_version=version.number + 1)
    for alias in aliases:
        entry = set_alias(entry, alias, version.number)
    return entry


def set_alias(entry: Entry, alias: str, number: int) -> Entry:
    """Point an alias at a version."""
    if not entry.is_live:
        raise adapter_not_found(entry.name)
    _existing(entry, number)
    if entry.aliases.get(alias) == number:
        return entry
    if alias not in entry.aliases and len(entry.aliases) >= ALIASES_MAX:
        raise RpcError(
            Reason.FIELD_LIMIT_EXCEEDED,
            f"{entry.name} has {ALIASES_MAX} aliases; delete some first",
            field="alias",
        )
    return replace(entry, aliases={**entry.aliases, alias: number})


def delete_alias(entry: Entry, alias: str) -> Entry:
    """Remove an alias; the version stays."""
    if not entry.is_live:
        raise adapter_not_found(entry.name)
    if alias not in entry.aliases:
        raise alias_not_found(entry.name, alias)
    return replace(entry, aliases={key: n for key, n in entry.aliases.items() if key != alias})


def delete_version(entry: Entry, number: int) -> Entry:
    """Remove a version that no alias points at."""
    if not entry.is_live:
        raise adapter_not_found(entry.name)
    _existing(entry, number)
    holding = sorted(alias for alias, target in entry.aliases.items() if target == number)
    if holding:
        raise RpcError(
            Reason.ADAPTER_IN_USE,
            f"{entry.name}@{number} is what the alias {', '.join(holding)} points at; "
            "move or delete the alias first",
            field="adapter",
            resource=("alias", f"{entry.name}@{holding[0]}"),
        )
    return replace(entry, versions=tuple(item for item in entry.versions if item.number != number))


def delete_all(entry: Entry) -> Entry:
    """Remove every version and alias."""
    if not entry.is_live:
        raise adapter_not_found(entry.name)
    return replace(entry, versions=(), aliases={})


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


def _existing(entry: Entry, number: int) -> Version:
    version = entry.find(number)
    if version is None:
        raise RpcError(
            Reason.ADAPTER_VERSION_NOT_FOUND,
            f"{entry.name} has no version {number}",
            field="adapter",
            resource=("adapter_version", f"{entry.name}@{number}"),
        )
    return version


def to_json(entry: Entry) -> bytes:
    """The revision document."""
    return json.dumps({"format": FORMAT, **asdict(entry)}, separators=(",", ":")).encode()


def from_json(data: bytes, *, name: str, revision: int) -> Entry:
    """Read the revision document of this adapter and revision. Raises EntryError."""
    try:
        fields: dict[str, Any] = json.loads(data)
        if (fields.pop("format"), fields["name"], fields["revision"]) != (FORMAT, name, revision):
            raise EntryError("the document is of another format, adapter or revision")
        versions = tuple(_version(item) for item in fields.pop("versions"))
        return Entry(versions=versions, **fields)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise EntryError(f"not a revision document: {error}") from error


def _version(fields: dict[str, Any]) -> Version:
    weights: dict[str, Any] = dict(fields["weights"])
    modules = tuple(weights.pop("target_modules"))
    return Version(
        number=int(fields["number"]),
        created_ns=int(fields["created_ns"]),
        weights=Weights(target_modules=modules, **weights),
    )
