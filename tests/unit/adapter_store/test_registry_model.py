"""Any sequence of changes through two replicas gives what a dictionary would give."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from obstore.store import MemoryStore

from services.adapter_store import aliases, changes
from services.adapter_store.changes import Terms
from services.adapter_store.collect import Collector
from services.adapter_store.entries import Canary, Entry, Weights
from services.adapter_store.references import Reference, parse_reference
from services.adapter_store.registry import Registry
from services.adapter_store.storage import ObjectStorage, Timeouts
from services.adapter_store.watching import Deleted, Synced, Updated
from services.common.errors import Reason, RpcError

NAMES = st.sampled_from(["a", "b"])
NUMBERS = st.integers(1, 4)
ALIASES = st.sampled_from(["x", "y"])
SELECTORS = st.sampled_from(["", "1", "2", "x", "y"])


@dataclass
class Known:
    """What the model holds of one adapter: version to weights, alias to version, and so on."""

    versions: dict[int, int] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    canaries: dict[str, tuple[int, int]] = field(default_factory=dict)
    previous: dict[str, int] = field(default_factory=dict)
    tenants: tuple[str, ...] = ()
    pins: set[str] = field(default_factory=set)
    next_version: int = 1

    def point(self, alias: str, number: int) -> None:
        before = self.aliases.get(alias, number)
        if before != number:
            self.previous[alias] = before
        self.aliases[alias] = number
        self.canaries.pop(alias, None)

    def needs(self, number: int) -> bool:
        newest_is_last = "" in self.pins and len(self.versions) == 1
        return (
            number in self.aliases.values()
            or any(number == version for version, _ in self.canaries.values())
            or str(number) in self.pins
            or newest_is_last
        )


class RegistryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        # All happens within the margin; without it a resumed watch sends only what it must.
        self.margin = patch("services.adapter_store.resuming.MARGIN_NS", 0)
        self.margin.start()
        storage = ObjectStorage(MemoryStore(), Timeouts())
        self.replicas = [Registry(storage, missing_ttl_s=0.0) for _ in range(2)]
        self.collector = Collector(storage, self.replicas[0], safety_age_s=0)
        self.model = {"a": Known(), "b": Known()}
        self.turn = 0
        self.watched: dict[str, Entry] = {}
        self.token = ""
        self.sync()

    def teardown(self) -> None:
        self.margin.stop()
        self.runner.close()

    def _change(self, name: str, decide: Callable[[Entry], Entry]) -> Reason | None:
        self.turn += 1
        try:
            self.runner.run(self.replicas[self.turn % 2].change(name, decide))
        except RpcError as error:
            return error.reason
        return None

    @rule(name=NAMES, weights=st.integers(1, 5), aliases=st.lists(ALIASES, max_size=2))
    def publish(self, name: str, weights: int, aliases: list[str]) -> None:
        value = Weights(f"sha256:{weights:064x}", 1, 1, ("q_proj",), "BF16", "", 1)
        decide = partial(changes.publish, weights=value, terms=Terms(tuple(aliases)), now_ns=0)
        assert self._change(name, decide) is None
        known = self.model[name]
        found = [number for number, has in known.versions.items() if has == weights]
        number = found[0] if found else known.next_version
        if not found:
            known.versions[number] = weights
            known.next_version += 1
        for alias in aliases:
            known.point(alias, number)

    @rule(name=NAMES, alias=ALIASES, number=NUMBERS)
    def set_alias(self, name: str, alias: str, number: int) -> None:
        reason = self._change(name, partial(aliases.set_alias, alias=alias, number=number))
        known = self.model[name]
        if number in known.versions:
            assert reason is None
            known.point(alias, number)
        else:
            assert reason is self._missing(name, Reason.ADAPTER_VERSION_NOT_FOUND)

    @rule(name=NAMES, alias=ALIASES, number=NUMBERS, percent=st.integers(1, 99))
    def set_canary(self, name: str, alias: str, number: int, percent: int) -> None:
        canary = Canary(number, percent)
        reason = self._change(name, partial(aliases.set_canary, alias=alias, canary=canary))
        known = self.model[name]
        if alias not in known.aliases:
            assert reason is self._missing(name, Reason.ALIAS_NOT_FOUND)
        elif number not in known.versions:
            assert reason is Reason.ADAPTER_VERSION_NOT_FOUND
        elif known.aliases[alias] == number:
            assert reason is Reason.INVALID_FIELD
        else:
            assert reason is None
            known.canaries[alias] = (number, percent)

    @rule(name=NAMES, alias=ALIASES)
    def roll_back(self, name: str, alias: str) -> None:
        reason = self._change(name, partial(aliases.roll_back, alias=alias))
        known = self.model[name]
        if alias not in known.aliases:
            assert reason is self._missing(name, Reason.ALIAS_NOT_FOUND)
        elif known.canaries.pop(alias, None):
            assert reason is None
        elif alias not in known.previous:
            assert reason is Reason.ALIAS_HAS_NO_PREVIOUS
        else:
            assert reason is None
            known.aliases[alias], known.previous[alias] = (
                known.previous[alias],
                known.aliases[alias],
            )

    @rule(name=NAMES, alias=ALIASES)
    def delete_alias(self, name: str, alias: str) -> None:
        reason = self._change(name, partial(aliases.delete_alias, alias=alias))
        known = self.model[name]
        if alias not in known.aliases:
            assert reason is self._missing(name, Reason.ALIAS_NOT_FOUND)
        elif alias in known.pins:
            assert reason is Reason.ADAPTER_IN_USE
        else:
            assert reason is None
            for values in (known.aliases, known.canaries, known.previous):
                values.pop(alias, None)

    @rule(name=NAMES, tenants=st.sampled_from([(), ("t1",), ("t1", "t2")]))
    def set_visibility(self, name: str, tenants: tuple[str, ...]) -> None:
        reason = self._change(name, partial(changes.set_visibility, tenants=tenants))
        known = self.model[name]
        assert reason is (None if known.versions else Reason.ADAPTER_NOT_FOUND)
        known.tenants = tenants if known.versions else ()

    @rule(name=NAMES, selector=SELECTORS)
    def pin(self, name: str, selector: str) -> None:
        reference = _reference(name, selector)
        reason = self._change(
            name, partial(changes.pin, reference=reference, reason="busy", now_ns=0)
        )
        known = self.model[name]
        if selector.isdecimal() and int(selector) not in known.versions:
            assert reason is self._missing(name, Reason.ADAPTER_VERSION_NOT_FOUND)
        elif selector.isalpha() and selector not in known.aliases:
            assert reason is self._missing(name, Reason.ALIAS_NOT_FOUND)
        elif not known.versions:
            assert reason is Reason.ADAPTER_NOT_FOUND
        else:
            assert reason is None
            known.pins.add(selector)

    @rule(name=NAMES, selector=SELECTORS)
    def unpin(self, name: str, selector: str) -> None:
        reference = _reference(name, selector)
        reason = self._change(name, partial(changes.unpin, reference=reference))
        known = self.model[name]
        if selector in known.pins:
            assert reason is None
            known.pins.remove(selector)
        else:
            assert reason is self._missing(name, Reason.PIN_NOT_FOUND)

    @rule(name=NAMES, number=NUMBERS)
    def delete_version(self, name: str, number: int) -> None:
        reason = self._change(name, partial(changes.delete_version, number=number))
        known = self.model[name]
        if number not in known.versions:
            assert reason is self._missing(name, Reason.ADAPTER_VERSION_NOT_FOUND)
        elif known.needs(number):
            assert reason is Reason.ADAPTER_IN_USE
        else:
            del known.versions[number]
            known.previous = {a: n for a, n in known.previous.items() if n != number}
            if not known.versions:
                self.model[name] = Known(next_version=known.next_version)

    @precondition(lambda self: any(known.versions for known in self.model.values()))
    @rule(name=NAMES)
    def delete_all(self, name: str) -> None:
        reason = self._change(name, changes.delete_all)
        known = self.model[name]
        assert (reason is None) == bool(known.versions)
        self.model[name] = Known(next_version=known.next_version)

    @rule()
    def sync(self) -> None:
        for replica in self.replicas:
            self.runner.run(replica.sync())

    @rule()
    def collect(self) -> None:
        self.runner.run(self.collector.collect())

    @rule(replica=st.integers(0, 1))
    def watch_again(self, replica: int) -> None:
        """A client whose watch breaks again and again, at any replica, knows all that lives."""
        self.runner.run(self.replicas[replica].sync())
        self.runner.run(self._watch(self.replicas[replica]))
        live = {name: entry for name in self.model if (entry := self._live(replica, name))}
        assert self.watched == live

    async def _watch(self, replica: Registry) -> None:
        seen: set[str] = set()
        async with aclosing(replica.watch(self.token)) as told:
            async for message in told:
                match message.change:
                    case Updated(entry):
                        self.watched[entry.name] = entry
                        seen.add(entry.name)
                    case Deleted(name):
                        self.watched.pop(name, None)
                    case Synced(resumed):
                        assert message.until_ns is not None
                        self.token = replica.token(message.until_ns)
                        if not resumed:
                            self.watched = {name: self.watched[name] for name in seen}
                        return

    def _live(self, replica: int, name: str) -> Entry | None:
        return self.replicas[replica].live_entry(name)

    @invariant()
    def newest_replica_agrees(self) -> None:
        replica = self.replicas[self.turn % 2]
        replica.check_integrity()
        self.runner.run(replica.sync())
        for name, known in self.model.items():
            entry = replica.live_entry(name) or Entry(name)
            digests = {item.number: int(item.weights.digest[7:], 16) for item in entry.versions}
            assert digests == known.versions
            assert dict(entry.aliases) == known.aliases
            canaries = {a: (item.version, item.percent) for a, item in entry.canaries.items()}
            assert canaries == known.canaries
            assert dict(entry.previous_versions) == known.previous
            assert entry.tenants == known.tenants
            assert {pin.selector for pin in entry.pins} == known.pins
            assert replica.entry(name).next_version == known.next_version
            for alias, number in known.aliases.items():
                version, _ = self.runner.run(replica.get(parse_reference(f"{name}@{alias}")))
                assert version.number == number

    def _missing(self, name: str, reason: Reason) -> Reason:
        return reason if self.model[name].versions else Reason.ADAPTER_NOT_FOUND


def _reference(name: str, selector: str) -> Reference:
    return parse_reference(f"{name}@{selector}" if selector else name)


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
