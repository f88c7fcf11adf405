"""Names of adapters, and an adapter store that comes and goes."""

from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from calumma.adapter_store.v1 import adapter_store_pb2
from calumma.common.v1 import common_pb2
from services.common.errors import Reason, RpcError
from tests.support.gateway_peers import (
    until,
)
from tests.support.gateway_suite import Suite

STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH


def versions_of(suite: Suite, name: str) -> int:
    """As the gateway's mirror has it."""
    entry = suite.gateway._registry._catalogue.find(name)
    return len(entry.versions) if entry is not None else 0


async def test_a_store_that_is_down_at_the_start_costs_only_adapters(suite: Suite) -> None:
    ref = suite.store.publish("poet")
    await suite.store.stop()
    await suite.start(ready=False)
    await suite.worker.next_opened()
    base = suite.stream("go")
    item = await suite.scheduler.next_item()
    suite.worker.send(item, 0, "x", finish=STOP)
    await base.read_all()
    await suite.is_serving(serving=False)
    code, info, retry_s = await suite.stream("go", adapter="poet").error()
    assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE)
    assert retry_s == 1

    await suite.store.start()
    await suite.is_serving()
    suite.stream("go", adapter="poet")
    assert (await suite.scheduler.next_item()).adapter == ref


async def test_known_adapters_are_served_while_the_store_is_down(suite: Suite) -> None:
    ref = suite.store.publish("poet")
    suite.store.publish("gone")
    await suite.start()
    await suite.store.stop()
    suite.stream("go", adapter="poet")
    assert (await suite.scheduler.next_item()).adapter == ref
    suite.store.delete("gone")
    await suite.store.start()
    await until(lambda: len(suite.gateway._registry) == 1)


async def test_what_was_just_published_works_at_once(suite: Suite) -> None:
    await suite.start()
    ref = suite.store.publish("poet", watch=False)
    suite.stream("go", adapter="poet@1")
    assert (await suite.scheduler.next_item()).adapter == ref
    newer = suite.store.publish("poet")
    await until(lambda: versions_of(suite, "poet") == 2)
    suite.stream("go", adapter="poet")
    assert (await suite.scheduler.next_item()).adapter == newer
    assert suite.store.questions == ["poet@1"]


async def test_a_replica_that_is_behind_does_not_bring_a_deleted_adapter_back(
    suite: Suite,
) -> None:
    suite.store.publish("poet")
    await suite.start()
    before = suite.store.adapters["poet"]
    suite.store.delete("poet")
    await until(lambda: len(suite.gateway._registry) == 0)
    suite.store.adapters["poet"] = before  # as a replica has it that has not heard
    suite.stream("go", adapter="poet")
    assert (await suite.scheduler.next_item()).adapter.name == "poet"
    del suite.store.adapters["poet"]
    code, info, _ = await suite.stream("go", adapter="poet").error()
    assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, Reason.ADAPTER_NOT_FOUND)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nobody", Reason.ADAPTER_NOT_FOUND),
        ("poet@7", Reason.ADAPTER_VERSION_NOT_FOUND),
        ("poet@best", Reason.ALIAS_NOT_FOUND),
    ],
)
async def test_an_unknown_adapter_is_asked_for_once(
    suite: Suite, name: str, reason: Reason, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite.store.publish("poet")
    await suite.start()

    async def refuse(request: Any, context: Any) -> None:
        suite.store.questions.append(request.adapter)
        error = RpcError(reason, "no such", resource=("adapter", name))
        await context.abort_with_status(rpc_status.to_status(error.to_status()))

    monkeypatch.setattr("services.gateway.absences.ABSENT_S", 60.0)
    monkeypatch.setattr(suite.store, "Get", refuse)
    await suite.store.stop()
    await suite.store.start()
    await until(lambda: suite.gateway._registry._channel.get_state().name == "READY")
    for _ in range(3):
        code, info, _ = await suite.stream("go", adapter=name).error()
        assert (code, info.reason, info.metadata["field"]) == (
            grpc.StatusCode.NOT_FOUND,
            reason,
            "adapter",
        )
    assert suite.store.questions == [name]


async def test_made_up_names_take_bounded_memory(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.absences.ABSENT_MAX", 3)
    await suite.start()
    for number in range(10):
        code, _, _ = await suite.stream("go", adapter=f"made-up-{number}").error()
        assert code is grpc.StatusCode.NOT_FOUND
    assert len(suite.gateway._registry._absences) == 3
    assert len(suite.gateway._registry) == 0


async def test_a_broken_watch_goes_on_where_it_was(suite: Suite) -> None:
    ref = suite.store.publish("poet")
    suite.store.publish("gone")
    await suite.start()
    suite.store.publish("coder")
    await until(lambda: len(suite.gateway._registry) == 3)
    await suite.store.stop()
    suite.store.delete("gone")
    newer = suite.store.publish("coder")
    await suite.store.start()
    await until(lambda: len(suite.gateway._registry) == 2)
    assert suite.store.resume_tokens == ["", "3"]
    assert versions_of(suite, "coder") == 2
    for name, expected in (("poet", ref), ("coder", newer)):
        suite.stream("go", adapter=name)
        assert (await suite.scheduler.next_item()).adapter == expected


async def test_what_a_whole_snapshot_lacks_is_gone_though_a_token_was_sent(suite: Suite) -> None:
    suite.store.publish("poet")
    suite.store.publish("gone")
    await suite.start()
    await suite.store.stop()
    del suite.store.adapters["gone"]
    suite.store.resumes = False
    await suite.store.start()
    await until(lambda: len(suite.gateway._registry) == 1)
    assert suite.store.resume_tokens == ["", "2"]


async def test_a_replica_that_lags_behind_takes_nothing_back(suite: Suite) -> None:
    suite.store.publish("poet")
    await suite.start()
    old = adapter_store_pb2.Adapter()
    old.CopyFrom(suite.store.adapters["poet"])
    newer = suite.store.publish("poet")
    await until(lambda: versions_of(suite, "poet") == 2)
    suite.store._tell(adapter_store_pb2.WatchResponse(updated=old))
    suite.store.publish("coder")
    await until(lambda: len(suite.gateway._registry) == 2)
    suite.stream("go", adapter="poet")
    assert (await suite.scheduler.next_item()).adapter == newer


async def test_an_adapter_of_other_tenants_is_as_unknown_as_a_made_up_one(suite: Suite) -> None:
    suite.store.publish("secret", prod=1)
    suite.store.change("secret", tenants=["acme"])
    await suite.start(tenant="initech")
    told = []
    for name in ("secret", "made-up"):
        for selector in ("", "@1", "@prod", "@7"):
            for _ in range(2):
                code, info, retry_s = await suite.stream("go", adapter=name + selector).error()
                told.append((name, code, info.reason, dict(info.metadata), retry_s))
    secret = [answer[1:] for answer in told if answer[0] == "secret"]
    made_up = [answer[1:] for answer in told if answer[0] == "made-up"]
    assert secret == made_up
    assert {reason for _, reason, _, _ in secret} == {Reason.ADAPTER_NOT_FOUND}
    # Both took the way through the store, once each.
    asked = [question.partition("@")[0] for question in suite.store.questions]
    assert asked.count("secret") == asked.count("made-up") == 4


async def test_a_tenant_that_loses_an_adapter_is_refused_from_then_on(suite: Suite) -> None:
    ref = suite.store.publish("poet")
    await suite.start(tenant="acme")
    suite.stream("go", adapter="poet")
    item = await suite.scheduler.next_item()
    assert (item.adapter, item.tenant) == (ref, "acme")
    suite.store.change("poet", tenants=["globex"])
    await until(lambda: suite.gateway._registry._resume_token == "2")
    code, info, _ = await suite.stream("go", adapter="poet").error()
    assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, Reason.ADAPTER_NOT_FOUND)


async def test_a_resubmitted_request_keeps_the_version_that_it_was_admitted_with(
    suite: Suite,
) -> None:
    first = suite.store.publish("poet", prod=1)
    await suite.start()
    reader = suite.stream("go", adapter="poet@prod", request_id="r1")
    item = await suite.scheduler.next_item()
    suite.store.publish("poet", prod=2)
    await until(lambda: versions_of(suite, "poet") == 2)
    suite.scheduler.give_back(item, suite.worker)
    again = await suite.scheduler.next_item()
    assert (item.adapter, again.adapter) == (first, first)
    suite.worker.send(again, 0, "x", finish=STOP)
    await reader.read_all()
    suite.stream("go", adapter="poet@prod", request_id="r1")
    assert (await suite.scheduler.next_item()).adapter.version == 2
