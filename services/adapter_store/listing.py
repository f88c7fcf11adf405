"""A page of a list: adapters by name that pass a filter, at a bounded cost per page.

A page ends when it is full, when it is large, or when enough versions have been looked at. So a
page may hold few adapters, or none, and still have a next one: only an absent token is the end.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

from services.adapter_store.entries import NOTHING, Entry

PAGE_SIZE_DEFAULT: Final = 100
PAGE_SIZE_MAX: Final = 1000
PAGE_BYTES_MAX: Final = 2 * 2**20  # a page ends early rather than grow past a message's limit
LOOKED_AT_MAX: Final = 5000  # versions; some milliseconds


class Sized(Protocol):
    """A message."""

    def ByteSize(self) -> int:
        """Bytes on the wire."""
        ...


Message = TypeVar("Message", bound=Sized)


@dataclass(frozen=True, slots=True)
class Filter:
    """What is empty lets all pass."""

    labels: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    base_model: str = ""
    digest: str = ""
    tenant: str = ""

    def passes(self, entry: Entry) -> bool:
        """Whether one of the entry's versions has each thing that is asked for."""
        return (
            entry.is_visible_to(self.tenant)
            and (not self.digest or entry.with_digest(self.digest) is not None)
            and (
                not self.base_model
                or any(v.weights.base_model == self.base_model for v in entry.versions)
            )
            and (
                not self.labels
                or any(self.labels.items() <= v.labels.items() for v in entry.versions)
            )
        )


@dataclass(frozen=True, slots=True)
class Page(Generic[Message]):
    """`last`: the name after which the next page begins. None: there is none."""

    adapters: list[Message]
    last: str | None


def page_of(
    entries: Iterable[Entry],
    wanted: Filter,
    *,
    size: int,
    write: Callable[[Entry], Message],
) -> Page[Message]:
    """The first of `entries`, which are in order of name. `write` makes the message of one."""
    page: list[Message] = []
    page_bytes = looked_at = 0
    last: str | None = None
    for entry in entries:
        if len(page) == size or page_bytes > PAGE_BYTES_MAX or looked_at > LOOKED_AT_MAX:
            return Page(page, last)
        looked_at += len(entry.versions)
        last = entry.name
        if wanted.passes(entry):
            page.append(write(entry))
            page_bytes += page[-1].ByteSize()
    return Page(page, None)
