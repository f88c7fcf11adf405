"""The registry in memory: every adapter at its newest known revision, and the ways to find one.

Owns the orders and indices that reads need; what may be written is the registry's business. All
calls are short and none waits, so what one call returns is of one moment.
"""

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator
from typing import Final

from services.adapter_store.entries import Entry

_SORTED_MAX: Final = 10_000  # names of one digest that are put in order for a page


class Mirror:
    """Entries by name. Tombstones are kept too: they hold the revision."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._live: list[str] = []  # sorted names
        self._pinned: set[str] = set()
        self._by_digest: dict[str, set[str]] = {}

    def entry(self, name: str) -> Entry:
        """What is known of a name; of revision 0 when nothing is."""
        return self._entries.get(name) or Entry(name)

    def live_entry(self, name: str) -> Entry | None:
        """The adapter, if it lives."""
        entry = self._entries.get(name)
        return entry if entry is not None and entry.is_live else None

    @property
    def names(self) -> Collection[str]:
        """Of all, tombstones too. Changes with the mirror."""
        return self._entries.keys()

    @property
    def entries(self) -> Collection[Entry]:
        """All, tombstones too, in no order. Changes with the mirror."""
        return self._entries.values()

    @property
    def live_names(self) -> list[str]:
        """Sorted; a copy."""
        return list(self._live)

    @property
    def live_count(self) -> int:
        return len(self._live)

    @property
    def pinned_names(self) -> list[str]:
        """Sorted names of adapters that have pins."""
        return sorted(self._pinned)

    def pinned_sizes(self) -> dict[str, int]:
        """Bytes of each digest that pins mean now."""
        sizes: dict[str, int] = {}
        for name in self._pinned:
            entry = self._entries[name]
            for pin in entry.pins:
                version = entry.pinned(pin)
                if version is not None:
                    sizes[version.weights.digest] = version.weights.size_bytes
        return sizes

    @property
    def digests(self) -> set[str]:
        """What live versions need; a copy."""
        return set(self._by_digest)

    def page(self, *, after: str, prefix: str = "", digest: str = "") -> Iterator[Entry]:
        """Live adapters in order of name whose name begins with `prefix` and follows `after`.

        With a digest, those without it may be left out. Take them before the mirror changes.
        """
        names = self._live
        if digest and len(having := self._by_digest.get(digest, set())) <= _SORTED_MAX:
            names = sorted(having)
        start = max(bisect_left(names, prefix), bisect_left(names, after + "\0"))
        for position in range(start, len(names)):
            if not names[position].startswith(prefix):
                return
            yield self._entries[names[position]]

    def put(self, entry: Entry) -> bool:
        """Make this what is known of a name. Returns whether that is a change.

        Revision 0 forgets the name.
        """
        name = entry.name
        before = self.entry(name)
        if entry == before:
            return False
        if entry.revision == 0:
            del self._entries[name]
        else:
            self._entries[name] = entry
        if entry.is_live and not before.is_live:
            insort(self._live, name)
        elif before.is_live and not entry.is_live:
            del self._live[bisect_left(self._live, name)]
        if entry.pins:
            self._pinned.add(name)
        else:
            self._pinned.discard(name)
        self._index(before, entry)
        return True

    def _index(self, before: Entry, after: Entry) -> None:
        old = {version.weights.digest for version in before.versions}
        new = {version.weights.digest for version in after.versions}
        for digest in old - new:
            names = self._by_digest[digest]
            names.discard(after.name)
            if not names:
                del self._by_digest[digest]
        for digest in new - old:
            self._by_digest.setdefault(digest, set()).add(after.name)

    def check_integrity(self) -> None:
        """Assert what always holds between the mirror's parts."""
        live = {name: entry for name, entry in self._entries.items() if entry.is_live}
        assert self._live == sorted(live)
        assert self._pinned == {name for name, entry in live.items() if entry.pins}
        by_digest: dict[str, set[str]] = {}
        for name, entry in self._entries.items():
            assert entry.name == name
            for version in entry.versions:
                by_digest.setdefault(version.weights.digest, set()).add(name)
            _check_entry(entry)
        assert self._by_digest == by_digest


def _check_entry(entry: Entry) -> None:
    numbers = [version.number for version in entry.versions]
    assert numbers == sorted(set(numbers))
    assert all(number < entry.next_version for number in numbers)
    assert set(entry.aliases.values()) <= set(numbers)
    assert set(entry.previous_versions.values()) <= set(numbers)
    assert entry.canaries.keys() <= entry.aliases.keys()
    assert entry.previous_versions.keys() <= entry.aliases.keys()
    for alias, canary in entry.canaries.items():
        assert canary.version in numbers
        assert canary.version != entry.aliases[alias]
        assert 1 <= canary.percent <= 99
    assert all(entry.pinned(pin) is not None for pin in entry.pins)
    assert entry.is_live or not (entry.pins or entry.tenants)
