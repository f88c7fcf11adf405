"""Names of adapters, and an adapter store that comes and goes."""

from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from calumma.common.v1 import common_pb2
from services.common.errors import Reason, RpcError
from tests.support.gateway_peers import (
    until,
)
from tests.support.gateway_suite import Suite

STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH


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
    del suite.store.adapters["gone"]
    await suite.store.start()
    await until(lambda: len(suite.gateway._registry) == 1)


async def test_what_was_just_published_works_at_once(suite: Suite) -> None:
    await suite.start()
    ref = suite.store.publish("poet", watch=False)
    suite.stream("go", adapter="poet@1")
    assert (await suite.scheduler.next_item()).adapter == ref
    newer = suite.store.publish("poet")
    await until(
        lambda: len(suite.gateway._registry._entries["poet"].versions) == 2,
    )
    suite.stream("go", adapter="poet")
    assert (await suite.scheduler.next_item()).adapter == newer
    assert suite.store.questions == ["poet@1"]


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

    monkeypatch.setattr("services.gateway.registry.ABSENT_S", 60.0)
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
    monkeypatch.setattr("services.gateway.registry.ABSENT_MAX", 3)
    await suite.start()
    for number in range(10):
        code, _, _ = await suite.stream("go", adapter=f"made-up-{number}").error()
        assert code is grpc.StatusCode.NOT_FOUND
    assert len(suite.gateway._registry._absent) == 3
    assert len(suite.gateway._registry) == 0
