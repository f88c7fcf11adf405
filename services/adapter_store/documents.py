"""The revision document: an entry as JSON. Pure.

What is empty is left out, so most documents are a few hundred bytes. A document of format 1 has
none of the fields that came later, and they are empty in its entry. A format that this release does
not know is refused: what its fields mean can't be guessed.
"""

import json
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from services.adapter_store.entries import (
    NOTHING,
    UNKNOWN_ORIGIN,
    Canary,
    Entry,
    Pin,
    Provenance,
    Version,
    Weights,
)

FORMAT: Final = 2
_READABLE: Final = (1, FORMAT)
_WEIGHTS: Final = ("digest", "rank", "size_bytes", "dtype", "base_model", "parameters")
_ORIGIN: Final = ("source", "publisher", "peft_version", "config_sha256", "weights_sha256")


class EntryError(ValueError):
    """A revision document that this release can't read."""


def to_json(entry: Entry) -> bytes:
    """The revision document."""
    fields: dict[str, Any] = {
        "format": FORMAT,
        "name": entry.name,
        "revision": entry.revision,
        "versions": [_version_fields(version) for version in entry.versions],
        "aliases": dict(entry.aliases),
        "next_version": entry.next_version,
        "change_id": entry.change_id,
        "changed_ns": entry.changed_ns,
    }
    later: dict[str, Any] = {
        "canaries": {
            alias: {"version": canary.version, "percent": canary.percent}
            for alias, canary in entry.canaries.items()
        },
        "previous_versions": dict(entry.previous_versions),
        "tenants": entry.tenants,
        "pins": [
            {"selector": pin.selector, "reason": pin.reason, "created_ns": pin.created_ns}
            for pin in entry.pins
        ],
    }
    fields |= {key: value for key, value in later.items() if value}
    return json.dumps(fields, separators=(",", ":")).encode()


def from_json(data: bytes, *, name: str, revision: int) -> Entry:
    """Read the revision document of this adapter and revision. Raises EntryError."""
    try:
        fields: dict[str, Any] = json.loads(data)
        known = (fields.pop("format"), fields["name"], fields["revision"])
        if known[0] not in _READABLE or known[1:] != (name, revision):
            raise EntryError("the document is of another format, adapter or revision")
        return _entry(fields)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise EntryError(f"not a revision document: {error}") from error


def _entry(fields: dict[str, Any]) -> Entry:
    """Raises KeyError for what is missing, TypeError for what is unknown."""
    canaries = {
        alias: Canary(int(item["version"]), int(item["percent"]))
        for alias, item in fields.pop("canaries", NOTHING).items()
    }
    return Entry(
        name=fields.pop("name"),
        revision=int(fields.pop("revision")),
        versions=tuple(_version(item) for item in fields.pop("versions")),
        aliases=_numbers(fields.pop("aliases")),
        next_version=int(fields.pop("next_version")),
        canaries=canaries or NOTHING,
        previous_versions=_numbers(fields.pop("previous_versions", NOTHING)),
        tenants=tuple(sys.intern(tenant) for tenant in fields.pop("tenants", ())),
        pins=tuple(Pin(**item) for item in fields.pop("pins", ())),
        **fields,  # change_id and changed_ns
    )


def _version_fields(version: Version) -> dict[str, Any]:
    weights, origin = version.weights, version.provenance
    fields: dict[str, Any] = {
        "number": version.number,
        "created_ns": version.created_ns,
        "weights": {
            **{key: getattr(weights, key) for key in _WEIGHTS},
            "target_modules": weights.target_modules,
        },
    }
    if version.labels:
        fields["labels"] = dict(version.labels)
    if origin != UNKNOWN_ORIGIN:
        fields["provenance"] = {key: getattr(origin, key) for key in _ORIGIN}
    return fields


def _version(fields: dict[str, Any]) -> Version:
    weights: dict[str, Any] = dict(fields["weights"])
    weights["target_modules"] = _shared_modules(tuple(weights["target_modules"]))
    for key in ("dtype", "base_model"):
        weights[key] = sys.intern(weights[key])
    for key in ("rank", "size_bytes", "parameters"):
        weights[key] = int(weights[key])
    origin = fields.get("provenance")
    return Version(
        number=int(fields["number"]),
        created_ns=int(fields["created_ns"]),
        weights=Weights(**weights),
        labels=_labels(fields.get("labels", NOTHING)),
        provenance=Provenance(**origin) if origin else UNKNOWN_ORIGIN,
    )


def _numbers(values: Mapping[str, Any]) -> Mapping[str, int]:
    return {alias: int(number) for alias, number in values.items()} or NOTHING


def _labels(values: Mapping[str, Any]) -> Mapping[str, str]:
    """Shared texts, because many adapters have the same labels. Raises TypeError for others."""
    return {sys.intern(key): sys.intern(value) for key, value in values.items()} or NOTHING


@lru_cache(maxsize=1024)
def _shared_modules(modules: tuple[str, ...]) -> tuple[str, ...]:
    """One tuple for all adapters that change the same modules."""
    return tuple(sys.intern(module) for module in modules)
