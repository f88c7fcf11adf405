"""The grammar of names, aliases, digests and references such as "billing-json@3".

Nothing that comes from a client reaches object storage or the disk without passing one of these.
"""

import re
from dataclasses import dataclass

from services.common.errors import Reason, RpcError

VERSION_DIGITS_MAX = 15  # a version stays exact in a double, as JSON readers elsewhere use
VERSION_MAX = 10**VERSION_DIGITS_MAX - 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ALIAS = re.compile(r"(?!\d+\Z)[a-z0-9._-]{1,64}")
_VERSION = re.compile(rf"[1-9]\d{{0,{VERSION_DIGITS_MAX - 1}}}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Latest:
    """The newest version: the bare name."""


@dataclass(frozen=True, slots=True)
class Numbered:
    """A version by number."""

    version: int


@dataclass(frozen=True, slots=True)
class Aliased:
    """A version by alias."""

    alias: str


Selector = Latest | Numbered | Aliased


@dataclass(frozen=True, slots=True)
class Reference:
    """What a client names: an adapter and which of its versions."""

    name: str
    selector: Selector

    def __str__(self) -> str:
        match self.selector:
            case Latest():
                return self.name
            case Numbered(version):
                return f"{self.name}@{version}"
            case Aliased(alias):
                return f"{self.name}@{alias}"


def parse_reference(text: str, *, field: str = "adapter") -> Reference:
    """Read "name", "name@version" or "name@alias". Raises INVALID_FIELD."""
    name, at, suffix = text.partition("@")
    check_name(name, field=field)
    if not at:
        return Reference(name, Latest())
    if _VERSION.fullmatch(suffix):
        return Reference(name, Numbered(int(suffix)))
    check_alias(suffix, field=field)
    return Reference(name, Aliased(suffix))


def is_name(text: str) -> bool:
    """Whether this may be the name of an adapter."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str, *, field: str) -> None:
    """Raises INVALID_FIELD."""
    if not is_name(text):
        raise RpcError(
            Reason.INVALID_FIELD,
            f"{shown(text)} is not an adapter name: 1 to 64 characters of [a-z0-9._-], "
            "beginning with a letter or digit",
            field=field,
        )


def check_alias(text: str, *, field: str) -> None:
    """Raises INVALID_FIELD."""
    if _ALIAS.fullmatch(text) is None:
        raise RpcError(
            Reason.INVALID_FIELD,
            f"{shown(text)} is neither a version (1 and up) nor an alias (1 to 64 characters "
            "of [a-z0-9._-], not only digits)",
            field=field,
        )


def check_digest(text: str) -> None:
    """Raises INVALID_FIELD."""
    if _DIGEST.fullmatch(text) is None:
        raise RpcError(
            Reason.INVALID_FIELD,
            f'{shown(text)} is not "sha256:" and 64 lower-case hex digits',
            field="digest",
        )


def shown(text: str) -> str:
    """Foreign text as it may stand in an error: ASCII, and not all of a long one."""
    return ascii(text if len(text) <= 100 else f"{text[:100]}…")
