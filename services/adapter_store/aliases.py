"""Changes of an adapter's aliases: moving, sharing with a canary, rolling back. Pure.

An alias has a main version; with a canary, a share of its requests goes to a second one. It
remembers the main version that it had before, so a rollback needs no memory but its own.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, TypeVar

from services.adapter_store.entries import (
    Canary,
    Entry,
    adapter_not_found,
    alias_not_found,
    existing,
)
from services.common.errors import Reason, RpcError

ALIASES_MAX: Final = 64
_Value = TypeVar("_Value")


def set_alias(entry: Entry, alias: str, number: int) -> Entry:
    """Point all of an alias at a version: its canary ends, what it was before is remembered."""
    if not entry.is_live:
        raise adapter_not_found(entry.name)
    existing(entry, number)
    before = entry.aliases.get(alias)
    if before is None and len(entry.aliases) >= ALIASES_MAX:
        raise RpcError(
            Reason.FIELD_LIMIT_EXCEEDED,
            f"{entry.name} has {ALIASES_MAX} aliases; delete some first",
            field="alias",
        )
    previous = entry.previous_versions
    if before is not None and before != number:
        previous = {**previous, alias: before}
    return replace(
        entry,
        aliases={**entry.aliases, alias: number},
        canaries=_without(entry.canaries, alias),
        previous_versions=previous,
    )


def set_canary(entry: Entry, alias: str, canary: Canary) -> Entry:
    """Send a share of an alias's requests to another version; the rest go where they went."""
    main = _main_version(entry, alias)
    existing(entry, canary.version)
    if main == canary.version:
        raise RpcError(
            Reason.INVALID_FIELD,
            f"{entry.name}@{alias} is version {main} already; its canary must be another",
            field="version",
        )
    return replace(entry, canaries={**entry.canaries, alias: canary})


def roll_back(entry: Entry, alias: str) -> Entry:
    """End the alias's canary if it has one; else swap its version with the one before."""
    main = _main_version(entry, alias)
    if alias in entry.canaries:
        return replace(entry, canaries=_without(entry.canaries, alias))
    previous = entry.previous_versions.get(alias)
    if previous is None:
        raise RpcError(
            Reason.ALIAS_HAS_NO_PREVIOUS,
            f"{entry.name}@{alias} has no canary, and no version before {main} that still lives",
            field="alias",
            resource=("alias", f"{entry.name}@{alias}"),
        )
    return replace(
        entry,
        aliases={**entry.aliases, alias: previous},
        previous_versions={**entry.previous_versions, alias: main},
    )


def delete_alias(entry: Entry, alias: str) -> Entry:
    """Remove an alias that no pin follows; the version stays."""
    _main_version(entry, alias)
    if any(pin.selector == alias for pin in entry.pins):
        raise RpcError(
            Reason.ADAPTER_IN_USE,
            f"a pin follows {entry.name}@{alias}; unpin it first",
            field="alias",
            resource=("pin", f"{entry.name}@{alias}"),
        )
    return replace(
        entry,
        aliases=_without(entry.aliases, alias),
        canaries=_without(entry.canaries, alias),
        previous_versions=_without(entry.previous_versions, alias),
    )


def _main_version(entry: Entry, alias: str) -> int:
    if not entry.is_live:
        raise adapter_not_found(entry.name)
    if alias not in entry.aliases:
        raise alias_not_found(entry.name, alias)
    return entry.aliases[alias]


def _without(values: Mapping[str, _Value], key: str) -> Mapping[str, _Value]:
    return {k: value for k, value in values.items() if k != key}
