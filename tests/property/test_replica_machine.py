"""Any order of dispatches, aborts, loads, failures, hints, deadlines and steps at one worker.

Under every discipline of steps, every rule of admission and every rule of reservation.
"""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.core import decisions as do
from services.core import events as on
from services.core.costs import StepCosts
from services.core.eviction import EVICTION_NAMES
from services.core.replica import ReplicaConfig, ReplicaScheduler
from services.core.types import (
    Adapter,
    AdapterDigest,
    Attempt,
    Capacity,
    Pin,
    Request,
    RequestId,
    Reserve,
)
from tests.unit.core.core_world import CheckingEngine, adapter, request

ADAPTERS = [adapter(f"a{index}", blocks=1 + 3 * index) for index in range(6)]


class ReplicaMachine(RuleBasedStateMachine):
    """A worker with a pool that holds few requests; the engine asserts the contract."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.outputs: dict[RequestId, int] = {}
        self.dispatched: list[Attempt] = []

    @initialize(
        blocks=st.integers(20, 45),
        block_tokens=st.sampled_from([1, 10]),
        slots=st.integers(1, 6),
        num_layers=st.sampled_from([0, 1, 2, 8, 30]),
        budget=st.integers(1, 64),
        loads=st.integers(1, 3),
        near=st.frozensets(st.sampled_from([one.digest for one in ADAPTERS])),
        options=st.fixed_dictionaries(
            {
                "stepping": st.sampled_from(["target", "chunked", "whole"]),
                "admission": st.sampled_from(["promise", "slora"]),
                "admission_every_steps": st.sampled_from([1, 3, 10]),
                "reserve": st.sampled_from(Reserve),
                "keeps_idle_adapters": st.booleans(),
                "eviction": st.sampled_from(EVICTION_NAMES),
                "pin_share": st.sampled_from([0.5, 1.0]),
                "forecast_s": st.sampled_from([0.0, 4.0]),
                "overlap_min_share": st.sampled_from([0.01, 0.25, 1.0]),
                "prefix_cache": st.sampled_from([True, True, True, False]),
            }
        ),
    )
    def build(
        self,
        *,
        blocks: int,
        block_tokens: int,
        slots: int,
        num_layers: int,
        budget: int,
        loads: int,
        near: frozenset[AdapterDigest],
        options: dict[str, Any],
    ) -> None:
        config = ReplicaConfig(
            prefill_tokens_per_step=budget,
            min_prefill_tokens=min(budget, 16),
            max_loads=loads,
            max_hint_loads=min(loads, 2),
            **options,
        )
        self.start(
            config,
            Capacity(
                blocks * 10 // block_tokens,
                100 * block_tokens,
                block_tokens,
                slots,
                300,
                num_layers,
            ),
        )
        self.engine.near = near
        self.handle(on.HostCacheChanged(near))

    def start(
        self, config: ReplicaConfig, limits: Capacity, *, prior: StepCosts | None = None
    ) -> None:
        self.replica = ReplicaScheduler(config, limits, prior=prior)
        self.twin = ReplicaScheduler(config, limits, prior=prior)
        self.engine = CheckingEngine(limits, config)

    def handle(self, event: on.ReplicaEvent) -> None:
        decisions = self.replica.handle(event, now=self.now)
        assert decisions == self.twin.handle(event, now=self.now), "same events, same decisions"
        self.engine.perform(decisions)
        self.check_promises(decisions)

    def check_promises(self, decisions: list[do.ReplicaDecision]) -> None:
        """Who was promised the maximum never gives way."""
        if self.engine.config.reserve is Reserve.MAX:
            assert not any(isinstance(decision, do.PreemptRequest) for decision in decisions)

    @rule(
        name=st.integers(0, 12),
        using=st.sampled_from([None, *ADAPTERS]),
        context=st.integers(1, 120),
        predicted=st.sampled_from([1, 5, 20, 60]),
        output=st.integers(1, 60),
        patience_s=st.none() | st.none() | st.floats(0.0, 5.0),
        text=st.text("ab", max_size=6),
    )
    def dispatch(
        self,
        *,
        name: int,
        using: Adapter | None,
        context: int,
        predicted: int,
        output: int,
        patience_s: float | None,
        text: str,
    ) -> None:
        number = 1 + sum(known.request_id == f"r{name}" for known in self.dispatched)
        new = request(
            f"r{name}",
            number=number,
            using=using,
            context=context,
            output=predicted,
            output_max=60,
            deadline_s=None if patience_s is None else self.now + patience_s,
            text=text[: context // self.engine.limits.block_tokens],
        )
        self.send(new, output)

    @rule(
        name=st.integers(0, 12),
        using=st.sampled_from([None, ADAPTERS[0]]),
        text=st.sampled_from(["aaa", "aaaaaaaa", "aaab", "aaaboo", "aaaaaaaao"]),
        rest_tokens=st.integers(0, 15),
        output=st.integers(1, 30),
    )
    def talk(
        self, *, name: int, using: Adapter | None, text: str, rest_tokens: int, output: int
    ) -> None:
        """One that begins as others do, perhaps with what another one has answered."""
        new = request(
            f"r{name}",
            number=1 + sum(known.request_id == f"r{name}" for known in self.dispatched),
            using=using,
            context=len(text) * self.engine.limits.block_tokens + rest_tokens,
            output=10,
            output_max=60,
            text=text,
        )
        self.send(new, output)

    def send(self, new: Request, output: int) -> None:
        self.outputs[new.attempt.request_id] = output
        self.dispatched.append(new.attempt)
        self.engine.receive(new)
        self.handle(on.RequestDispatched(new))

    @precondition(lambda self: self.dispatched)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.handle(on.RequestAborted(data.draw(st.sampled_from(self.dispatched))))

    @rule(wanted=st.lists(st.sampled_from(ADAPTERS), unique=True, max_size=6))
    def hint(self, wanted: list[Adapter]) -> None:
        self.handle(on.AdaptersWanted(tuple(wanted)))

    @rule(pinned=st.lists(st.sampled_from(ADAPTERS), max_size=6))
    def pin(self, pinned: list[Adapter]) -> None:
        self.handle(on.PinsChanged(tuple(Pin(one, "operator") for one in pinned)))

    @rule(dropped=st.sampled_from(ADAPTERS))
    def drop(self, dropped: Adapter) -> None:
        self.engine.forget(dropped.digest)
        self.handle(on.AdapterDropped(dropped.digest))

    @rule(near=st.frozensets(st.sampled_from([one.digest for one in ADAPTERS])))
    def change_host_cache(self, near: frozenset[AdapterDigest]) -> None:
        self.engine.near = near
        self.handle(on.HostCacheChanged(near))

    @precondition(lambda self: self.engine.loading and self.engine.limits.num_layers)
    @rule(data=st.data(), share=st.floats(0.0, 1.0), after_s=st.sampled_from([0.0, 0.05, 1.0]))
    def progress_load(self, data: st.DataObject, share: float, after_s: float) -> None:
        self.now += after_s
        digest = data.draw(st.sampled_from(sorted(self.engine.loading)))
        layers = round(share * self.engine.limits.num_layers)
        self.handle(self.engine.progress(digest, layers))

    @precondition(lambda self: self.engine.loading)
    @rule(data=st.data(), fails=st.integers(0, 4))
    def end_load(self, data: st.DataObject, fails: int) -> None:
        digest = data.draw(st.sampled_from(sorted(self.engine.loading)))
        ends = self.engine.fail_load if fails == 0 else self.engine.finish_load
        self.handle(ends(digest))

    @precondition(lambda self: self.engine.step is not None)
    @rule(times=st.integers(1, 30))
    def run_steps(self, times: int) -> None:
        for _ in range(times):
            if self.engine.step is not None:
                self.now += 0.01
                self.handle(self.engine.finish_step(self.outputs))
                self.replica.check_integrity()

    @precondition(lambda self: self.engine.step is not None)
    @rule(data=st.data())
    def fail_in_step(self, data: st.DataObject) -> None:
        """One request's numbers are not finite."""
        assert self.engine.step is not None
        names = sorted({work.request_id for work in self.engine.step})
        failing = {data.draw(st.sampled_from(names))}
        self.handle(self.engine.finish_step(self.outputs, failing=failing))

    @rule(wait_s=st.floats(0.0, 2.0) | st.just(200.0))
    def wait(self, wait_s: float) -> None:
        self.now += wait_s
        decisions = self.replica.tick(now=self.now)
        assert decisions == self.twin.tick(now=self.now)
        self.engine.perform(decisions)
        self.check_promises(decisions)
        due_s = self.replica.next_deadline()
        if self.engine.step is None:
            assert due_s is None or due_s > self.now

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "replica"):
            return
        self.replica.check_integrity()
        snapshot = self.replica.snapshot()
        held = snapshot.kv_blocks + snapshot.prefix_blocks
        held += snapshot.adapter_blocks + snapshot.free_blocks
        assert held == self.engine.limits.pool_blocks
        assert self.replica.leaked_blocks == 0
        assert {a.digest for a in snapshot.resident} == set(self.engine.loaded)
        assert snapshot.running == len(self.engine.open)

    def teardown(self) -> None:
        """Whatever happened, everything that is here can end."""
        if not hasattr(self, "replica"):
            return
        for _ in range(20_000):
            if self.engine.loading:
                self.handle(self.engine.finish_load(next(iter(self.engine.loading))))
            elif self.engine.step is not None:
                self.handle(self.engine.finish_step(self.outputs))
            else:
                break
        assert not self.engine.known
        assert not self.replica.announcements()
        assert self.replica.snapshot().kv_blocks == 0
        assert set(self.engine.left) == set(self.dispatched)


class OverlapMachine(ReplicaMachine):
    """Slow loads, whose layers are used as they come: steps here take next to nothing."""

    @initialize(
        blocks=st.integers(20, 60),
        num_layers=st.sampled_from([2, 8, 30]),
        target_s=st.sampled_from([0.001, 0.01, 0.1]),
        options=st.fixed_dictionaries(
            {
                "stepping": st.sampled_from(["target", "chunked"]),
                "prefill_tokens_per_step": st.sampled_from([8, 64, 1000]),
                "min_prefill_tokens": st.sampled_from([1, 16]),
                "admission": st.sampled_from(["promise", "promise", "slora"]),
                "reserve": st.sampled_from([Reserve.MAX, Reserve.PREDICTED]),
                "keeps_idle_adapters": st.booleans(),
                "overlap_min_share": st.sampled_from([0.01, 0.25, 0.25, 1.0]),
            }
        ),
    )
    def build(
        self, *, blocks: int, num_layers: int, target_s: float, options: dict[str, Any]
    ) -> None:
        config = ReplicaConfig(tbt_target_s=target_s, step_limit_s=10 * target_s, **options)
        prior = StepCosts(step_s=0.0, prefill_token_s=1e-4, prefill_rank_token_s=0.0)
        self.start(config, Capacity(blocks, 1000, 10, 6, 300, num_layers), prior=prior)

    @precondition(lambda self: self.engine.loading)
    @rule(data=st.data(), steps=st.lists(st.booleans(), min_size=1, max_size=5))
    def load_by_layers(self, data: st.DataObject, steps: list[bool]) -> None:
        """In as many parts as there are steps to end, or not, after them."""
        digest = data.draw(st.sampled_from(sorted(self.engine.loading)))
        for index, ends_step in enumerate(steps, start=1):
            self.now += 1.0
            had_layers = self.engine.ready.get(digest, 0)
            layers = index * self.engine.limits.num_layers // (len(steps) + 1)
            self.handle(self.engine.progress(digest, layers))
            if layers > had_layers:
                self.uses_what_came(digest)
            if ends_step and self.engine.step is not None:
                self.handle(self.engine.finish_step(self.outputs))

    def uses_what_came(self, digest: AdapterDigest) -> None:
        """Where nothing else runs, a prompt that has begun goes on as far as it can."""
        if self.engine.step is not None:
            return
        for current, (_, passed) in self.engine.parts.items():
            using = self.engine.known[current][0].adapter
            assert using is None or using.digest != digest or passed == self.engine.ready[digest]


MACHINE = settings(max_examples=300, stateful_step_count=40, deadline=None, derandomize=True)
ReplicaMachine.TestCase.settings = MACHINE
OverlapMachine.TestCase.settings = MACHINE
TestReplicaMachine = ReplicaMachine.TestCase
TestOverlapMachine = OverlapMachine.TestCase
