"""Any sequence of changes through two replicas gives what a dictionary would give."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from obstore.store import MemoryStore

from services.adapter_store import entries
from services.adapter_store.collect import Collector
from services.adapter_store.entries import Entry, Weights
from services.adapter_store.references import parse_reference
from services.adapter_store.registry import Registry
from services.adapter_store.storage import ObjectStorage, Timeouts
from services.common.errors import Reason, RpcError

NAMES = st.sampled_from(["a", "b"])
NUMBERS = st.integers(1, 4)
ALIASES = st.sampled_from(["x", "y"])


@dataclass
class Known:
    """What the model holds of one adapter: version to weights, alias to version."""

    versions: dict[int, int] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    next_version: int = 1


class RegistryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        storage = ObjectStorage(MemoryStore(), Timeouts())
        self.replicas = [Registry(storage, missing_ttl_s=0.0) for _ in range(2)]
        self.collector = Collector(storage, self.replicas[0], safety_age_s=0)
        self.model = {"a": Known(), "b": Known()}
        self.turn = 0
        self.sync()

    def teardown(self) -> None:
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
        decide = partial(entries.publish, weights=value, aliases=tuple(aliases), now_ns=0)
        assert self._change(name, decide) is None
        known = self.model[name]
        found = [number for number, has in known.versions.items() if has == weights]
        number = found[0] if found else known.next_version
        if not found:
            known.versions[number] = weights
            known.next_version += 1
        known.aliases.update(dict.fromkeys(aliases, number))

    @rule(name=NAMES, alias=ALIASES, number=NUMBERS)
    def set_alias(self, name: str, alias: str, number: int) -> None:
        reason = self._change(name, partial(entries.set_alias, alias=alias, number=number))
        known = self.model[name]
        if number in known.versions:
            assert reason is None
            known.aliases[alias] = number
        else:
            assert reason is self._missing(name, Reason.ADAPTER_VERSION_NOT_FOUND)

    @rule(name=NAMES, alias=ALIASES)
    def delete_alias(self, name: str, alias: str) -> None:
        reason = self._change(name, partial(entries.delete_alias, alias=alias))
        if self.model[name].aliases.pop(alias, None) is None:
            assert reason is self._missing(name, Reason.ALIAS_NOT_FOUND)

    @rule(name=NAMES, number=NUMBERS)
    def delete_version(self, name: str, number: int) -> None:
        reason = self._change(name, partial(entries.delete_version, number=number))
        known = self.model[name]
        if number not in known.versions:
            assert reason is self._missing(name, Reason.ADAPTER_VERSION_NOT_FOUND)
        elif number in known.aliases.values():
            assert reason is Reason.ADAPTER_IN_USE
        else:
            del known.versions[number]

    @precondition(lambda self: any(known.versions for known in self.model.values()))
    @rule(name=NAMES)
    def delete_all(self, name: str) -> None:
        reason = self._change(name, entries.delete_all)
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
            for alias, number in known.aliases.items():
                version, _ = self.runner.run(replica.get(parse_reference(f"{name}@{alias}")))
                assert version.number == number

    def _missing(self, name: str, reason: Reason) -> Reason:
        return reason if self.model[name].versions else Reason.ADAPTER_NOT_FOUND


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
