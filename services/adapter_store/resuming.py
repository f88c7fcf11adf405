"""Resume tokens: where a watch goes on that broke, at any replica.

A token is the registry's id and a time T: its holder has been sent every change that this replica's
mirror had, and the mirror had read all of storage at T. The replica that gets it sends each adapter
whose newest revision was decided after T minus a margin; an adapter that was deleted has such a
revision too. No replica keeps anything per watcher.

The margin covers what T does not say. A revision is dated when it is decided and visible when it is
written, at most `CHANGE_S_MAX` later; and it is dated by its writer's clock, while T is by that of
the replica that made the token. So changes may be sent twice, and none is missed while the clocks
of the replicas differ by less than the rest of the margin, four minutes. A holder tells old from
new by `Adapter.revision`.

A watch begins anew when its token is of another registry, from the future, or not a token.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from services.adapter_store.entries import Entry

MARGIN_NS: Final = 300 * 10**9
TOKEN_CHARACTERS_MAX: Final = 128
_TOKEN = re.compile(r"1\.([0-9a-f]{32})\.([1-9]\d{0,18})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Token:
    """`until_ns`: its holder knows what was decided before this, by the clock of who made it."""

    registry_id: str
    until_ns: int

    def __str__(self) -> str:
        return f"1.{self.registry_id}.{self.until_ns}"


def read_token(text: str) -> Token | None:
    """What a client sent. None: not a token of any adapter store."""
    match = _TOKEN.fullmatch(text) if len(text) <= TOKEN_CHARACTERS_MAX else None
    return None if match is None else Token(match[1], int(match[2]))


def changed_since(entries: Iterable[Entry], until_ns: int) -> list[str]:
    """Names of adapters, deleted ones too, that the holder of such a token may not know of."""
    return [entry.name for entry in entries if entry.changed_ns > until_ns - MARGIN_NS]
