"""Steps, loads, aborts and deadlines of the replica machine, one event at a time."""

from collections.abc import Iterable

from services.core.config import ReplicaConfig
from services.core.decisions import (
    EndRequest,
    ExpireRequest,
    FailRequest,
    LoadAdapter,
    ReplicaDecision,
    RunStep,
    StartRequest,
    StepWork,
)
from services.core.events import (
    AdapterLoaded,
    AdapterLoadFailed,
    HostCacheChanged,
    LoadFailure,
    ReplicaEvent,
    RequestAborted,
    RequestDispatched,
    RunningRequest,
    StepFinished,
)
from services.core.replica import ReplicaScheduler
from services.core.types import Request, RequestId
from tests.unit.core.core_world import GATEWAY, adapter, attempt, capacity, request, without_blocks


class Replica:
    """One worker's machine, with one call per event."""

    def __init__(
        self, *, blocks: int = 100, slots: int = 16, prefill: int = 256, max_loads: int = 4
    ) -> None:
        self.machine = ReplicaScheduler(
            ReplicaConfig(stepping="chunked", prefill_tokens_per_step=prefill, max_loads=max_loads),
            capacity(blocks, requests=slots),
        )

    def handle(self, event: ReplicaEvent, now: float = 0.0) -> list[ReplicaDecision]:
        decisions = self.machine.handle(event, now=now)
        self.machine.check_integrity()
        return without_blocks(decisions)

    def dispatch(self, new: Request, now: float = 0.0) -> list[ReplicaDecision]:
        return self.handle(RequestDispatched(new), now)

    def abort(self, name: str, number: int = 1, now: float = 0.0) -> list[ReplicaDecision]:
        return self.handle(RequestAborted(attempt(name, number)), now)

    def loaded(self, name: str) -> list[ReplicaDecision]:
        return self.handle(AdapterLoaded(adapter(name).digest))

    def step(
        self, *sampled: str, ended: Iterable[str] = (), now: float = 0.0
    ) -> list[ReplicaDecision]:
        names = tuple(RequestId(name) for name in sampled)
        return self.handle(StepFinished(names, tuple(RequestId(name) for name in ended)), now)

    def tick(self, now: float) -> list[ReplicaDecision]:
        decisions = self.machine.tick(now=now)
        self.machine.check_integrity()
        return decisions


def work(name: str, tokens: int = 1, *, samples: bool = True) -> StepWork:
    return StepWork(RequestId(name), tokens, samples)


def test_a_base_model_request_starts_at_once_and_decodes_until_it_ends() -> None:
    replica = Replica()
    assert replica.dispatch(request("a", context=5)) == [
        StartRequest(attempt("a")),
        RunStep((work("a", 5),)),
    ]
    assert replica.step("a") == [RunStep((work("a"),))]
    assert replica.step("a", ended=["a"]) == [EndRequest(attempt("a"))]
    assert replica.machine.snapshot().free_blocks == 100


def test_a_long_prompt_is_computed_in_chunks_and_samples_with_the_last() -> None:
    replica = Replica(prefill=4)
    assert replica.dispatch(request("a", context=10))[-1] == RunStep((work("a", 4, samples=False),))
    assert replica.step() == [RunStep((work("a", 4, samples=False),))]
    assert replica.step() == [RunStep((work("a", 2),))]
    assert replica.step("a") == [RunStep((work("a"),))]


def test_decodes_come_first_and_prompts_share_the_budget_in_order_of_arrival() -> None:
    replica = Replica(prefill=8)
    replica.dispatch(request("old", context=2))
    replica.dispatch(request("b", context=5))
    replica.dispatch(request("c", context=20))
    assert replica.step("old")[-1] == RunStep(
        (work("old"), work("b", 5), work("c", 3, samples=False))
    )
    assert replica.step("old", "b")[-1] == RunStep(
        (work("old"), work("b"), work("c", 8, samples=False))
    )


def test_no_second_step_is_begun_while_one_is_outstanding() -> None:
    replica = Replica()
    replica.dispatch(request("a"))
    assert replica.dispatch(request("b")) == []
    assert replica.tick(1.0) == []


def test_an_adapter_is_loaded_once_for_all_that_wait_for_it_and_others_go_on_meanwhile() -> None:
    replica = Replica()
    assert replica.dispatch(request("a", using=adapter("x"))) == [LoadAdapter(adapter("x"))]
    assert replica.dispatch(request("b", using=adapter("x"))) == []
    assert replica.dispatch(request("base", context=3))[-1] == RunStep((work("base", 3),))
    assert replica.loaded("x") == []
    assert replica.step("base")[:2] == [StartRequest(attempt("a")), StartRequest(attempt("b"))]


def test_a_failed_load_fails_everyone_who_waits_for_it_and_nobody_else() -> None:
    replica = Replica()
    replica.dispatch(request("a", using=adapter("x")))
    replica.dispatch(request("b", using=adapter("x")))
    replica.dispatch(request("c", using=adapter("y")))
    event = AdapterLoadFailed(adapter("x").digest, LoadFailure.CORRUPT, "digest differs")
    assert replica.handle(event) == [
        FailRequest(attempt("a"), LoadFailure.CORRUPT, "digest differs"),
        FailRequest(attempt("b"), LoadFailure.CORRUPT, "digest differs"),
    ]
    assert replica.loaded("y")[0] == StartRequest(attempt("c"))
    assert replica.machine.snapshot().adapter_blocks == 2


def test_a_failed_adapter_is_asked_for_again_by_the_next_request() -> None:
    replica = Replica()
    replica.dispatch(request("a", using=adapter("x")))
    replica.handle(AdapterLoadFailed(adapter("x").digest, LoadFailure.UNAVAILABLE, ""))
    assert replica.dispatch(request("b", using=adapter("x"))) == [LoadAdapter(adapter("x"))]


def test_only_so_many_adapters_load_at_once_and_the_rest_follow_in_order() -> None:
    replica = Replica(max_loads=2)
    for name in ("a", "b", "c", "d"):
        replica.dispatch(request(name, using=adapter(name)))
    assert replica.machine.snapshot().loading == 4
    assert replica.loaded("b")[0] == LoadAdapter(adapter("c"))


def test_a_request_that_waits_for_its_turn_to_load_holds_nobody_back() -> None:
    replica = Replica(max_loads=1)
    replica.dispatch(request("a", using=adapter("a")))
    replica.dispatch(request("b", using=adapter("b")))
    assert replica.dispatch(request("base", context=3))[-1] == RunStep((work("base", 3),))


def test_an_adapter_in_host_memory_does_not_wait_for_downloads() -> None:
    replica = Replica(max_loads=1)
    near, far = adapter("near"), adapter("far")
    replica.handle(HostCacheChanged(frozenset({near.digest})))
    replica.dispatch(request("a", using=adapter("slow")))
    assert replica.dispatch(request("b", using=far)) == []
    assert replica.dispatch(request("c", using=near)) == [LoadAdapter(near)]
    assert replica.dispatch(request("d", using=far)) == []
    assert replica.loaded("near")[0] == StartRequest(attempt("c"))
    assert LoadAdapter(far) in replica.loaded("slow")


def test_reports_of_unknown_loads_are_ignored() -> None:
    replica = Replica()
    assert replica.loaded("ghost") == []
    event = AdapterLoadFailed(adapter("ghost").digest, LoadFailure.NOT_FOUND, "")
    assert replica.handle(event) == []


def test_an_abort_during_its_step_takes_effect_when_the_step_has_ended() -> None:
    replica = Replica()
    replica.dispatch(request("a"))
    assert replica.abort("a") == []
    assert replica.abort("a") == []
    assert replica.step("a") == [EndRequest(attempt("a"))]


def test_an_abort_of_a_request_outside_the_step_takes_effect_at_once() -> None:
    replica = Replica()
    replica.dispatch(request("a"))
    replica.dispatch(request("b"))
    assert replica.abort("b") == [EndRequest(attempt("b"))]
    assert replica.abort("ghost") == []


def test_a_request_aborted_while_its_adapter_loads_leaves_and_the_adapter_stays() -> None:
    replica = Replica()
    replica.dispatch(request("a", using=adapter("x")))
    assert replica.abort("a") == [EndRequest(attempt("a"))]
    assert replica.loaded("x") == []
    assert [a.digest for a in replica.machine.snapshot().resident] == ["x"]
    assert replica.dispatch(request("b", using=adapter("x")))[0] == StartRequest(attempt("b"))


def test_a_request_that_fails_in_the_engine_leaves_like_one_that_ended() -> None:
    replica = Replica()
    replica.dispatch(request("a", context=3))
    assert replica.step(ended=["a"]) == [EndRequest(attempt("a"))]


def test_a_deadline_ends_a_request_with_a_decision_of_its_own() -> None:
    replica = Replica()
    replica.dispatch(request("a", using=adapter("x"), deadline_s=2.0))
    assert replica.machine.next_deadline() == 2.0
    assert replica.tick(2.0) == [ExpireRequest(attempt("a"))]
    assert replica.machine.next_deadline() is None


def test_a_deadline_during_its_step_takes_effect_when_the_step_has_ended() -> None:
    replica = Replica()
    replica.dispatch(request("a", deadline_s=2.0))
    assert replica.tick(2.0) == []
    assert replica.step("a", now=2.1) == [ExpireRequest(attempt("a"))]


def test_a_request_that_ends_in_the_step_of_its_deadline_has_ended() -> None:
    replica = Replica()
    replica.dispatch(request("a", deadline_s=2.0))
    replica.tick(2.0)
    assert replica.step("a", ended=["a"], now=2.1) == [EndRequest(attempt("a"))]


def test_a_later_attempt_replaces_an_earlier_one_after_its_step() -> None:
    replica = Replica()
    replica.dispatch(request("a", context=4))
    assert replica.dispatch(request("a", number=2, context=5)) == []
    assert replica.step("a") == [
        EndRequest(attempt("a", 1)),
        StartRequest(attempt("a", 2)),
        RunStep((work("a", 5),)),
    ]


def test_known_and_older_attempts_are_ignored() -> None:
    replica = Replica()
    replica.dispatch(request("a", number=2))
    assert replica.dispatch(request("a", number=2)) == []
    assert replica.dispatch(request("a", number=1)) == []
    assert len(replica.machine.announcements()) == 1


def test_an_attempt_in_a_step_is_known_after_its_successor_has_left() -> None:
    replica = Replica()
    replica.dispatch(request("a"))
    replica.dispatch(request("a", number=2))
    assert replica.abort("a", 2) == [EndRequest(attempt("a", 2))]
    assert replica.dispatch(request("a")) == []
    assert replica.step("a") == [EndRequest(attempt("a"))]


def test_a_request_larger_than_the_worker_fails_at_once() -> None:
    replica = Replica(blocks=10)
    [failure] = replica.dispatch(request("a", using=adapter(blocks=9), context=20))
    assert isinstance(failure, FailRequest)
    assert failure.failure is LoadFailure.TOO_LARGE
    assert replica.dispatch(request("b", context=50))[0] == StartRequest(attempt("b"))


def test_the_snapshot_announces_every_request_with_what_is_known_of_it() -> None:
    replica = Replica()
    replica.dispatch(request("a", context=10, output=8))
    replica.step("a")
    replica.dispatch(request("b", using=adapter("x"), context=7, output=3))
    snapshot = replica.machine.snapshot()
    assert replica.machine.announcements() == (
        RunningRequest(attempt("a"), GATEWAY, None, 11, 7),
        RunningRequest(attempt("b"), GATEWAY, adapter("x").digest, 7, 3),
    )
    assert (snapshot.running, snapshot.loading) == (1, 1)
    assert (snapshot.kv_blocks, snapshot.adapter_blocks, snapshot.free_blocks) == (2, 2, 96)
