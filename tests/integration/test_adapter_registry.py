"""The registry over real gRPC, two replicas on one folder: what one does, the other answers."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from services.adapter_store.service import start
from services.common.clients import open_channel
from services.common.errors import Reason
from tests.support.peft_folders import write_tiny_model
from tests.support.store_suite import Client, World, error_of, next_of


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, (tmp_path / "store").as_uri(), write_tiny_model(tmp_path / "model"))


@pytest.fixture
async def pair(world: World) -> AsyncIterator[tuple[Client, Client]]:
    async with world.replica() as here, world.replica() as there:
        yield here, there


def _small(world: World, seed: int = 0, **options: Any) -> Path:
    return world.adapter(seed, target_modules=("q_proj",), rank=2, **options)


async def _publish_versions(client: Client, world: World, count: int, **metadata: Any) -> None:
    for seed in range(count):
        await client.publish(_small(world, seed), **metadata)


async def _adapter(client: Client, name: str = "a") -> pb.Adapter:
    answer: pb.GetResponse = await client.stub.Get(pb.GetRequest(adapter=name), timeout=5)
    return answer.adapter


async def _until(client: Client, revision: int, name: str = "a") -> pb.Adapter:
    """What a replica says of an adapter once it knows of this revision."""
    async with asyncio.timeout(10):
        while (adapter := await _adapter(client, name)).revision < revision:
            await asyncio.sleep(0.02)
    return adapter


async def _until_synced(
    client: Client, token: str = "", *, pinned_only: bool = False
) -> tuple[list[str], str]:
    request = pb.WatchRequest(resume_token=token, pinned_only=pinned_only)
    watch = client.stub.Watch(request, timeout=20)
    words: list[str] = []
    while True:
        _, message = await next_of(watch)
        match message.WhichOneof("event"):
            case "updated":
                words.append(f"+{message.updated.name}")
            case "deleted":
                words.append(f"-{message.deleted}")
            case _:
                watch.cancel()
                words.append("resumed" if message.synced.resumed else "synced")
                return words, message.resume_token


async def test_a_version_carries_its_labels_and_where_it_came_from(
    pair: tuple[Client, Client], world: World
) -> None:
    here, there = pair
    await here.publish(
        _small(world),
        labels={"team": "search", "stage/eval": "passed"},
        source="https://example.org/runs/7",
        tenants=["acme", "beta"],
        tenant="acme",
    )
    request = pb.GetRequest(adapter="a@1", tenant="beta")
    answer = await there.stub.Get(request, timeout=5)
    assert dict(answer.version.labels) == {"team": "search", "stage/eval": "passed"}
    provenance = answer.version.provenance
    assert (provenance.source, provenance.publisher) == ("https://example.org/runs/7", "acme")
    assert len(provenance.config_sha256) == len(provenance.weights_sha256) == 64
    assert list(answer.adapter.tenants) == ["acme", "beta"]
    assert answer.adapter.HasField("change_time")


async def test_a_canary_begins_ends_and_is_rolled_back(
    pair: tuple[Client, Client], world: World
) -> None:
    here, there = pair
    await _publish_versions(here, world, 3)
    await here.stub.SetAlias(pb.SetAliasRequest(name="a", alias="prod", version=1))
    request = pb.SetAliasRequest(name="a", alias="prod", version=2, canary_percent=5)
    changed = (await there.stub.SetAlias(request)).adapter
    assert dict(changed.aliases) == {"prod": 1}
    assert changed.canaries["prod"] == pb.Canary(version=2, percent=5)
    answer = await there.stub.Get(pb.GetRequest(adapter="a@prod"))
    assert answer.version.ref.version == 1  # the main version
    rollback = pb.RollbackAliasRequest(name="a", alias="prod")
    changed = (await here.stub.RollbackAlias(rollback)).adapter
    assert (dict(changed.aliases), len(changed.canaries)) == ({"prod": 1}, 0)
    await here.stub.SetAlias(pb.SetAliasRequest(name="a", alias="prod", version=3))
    changed = (await there.stub.RollbackAlias(rollback)).adapter
    assert dict(changed.aliases) == {"prod": 1}
    assert dict(changed.previous_versions) == {"prod": 3}
    assert await _until(here, changed.revision) == changed


async def test_a_watcher_sees_an_alias_move_in_one_step(
    pair: tuple[Client, Client], world: World
) -> None:
    here, there = pair
    await _publish_versions(here, world, 2, aliases=["prod"])
    await _until(there, 2)
    watch = there.stub.Watch(pb.WatchRequest())
    while (await next_of(watch))[0] != "synced":
        pass
    await here.stub.RollbackAlias(pb.RollbackAliasRequest(name="a", alias="prod"))
    _, message = await next_of(watch)
    assert dict(message.updated.aliases) == {"prod": 1}
    assert dict(message.updated.previous_versions) == {"prod": 2}
    assert message.resume_token
    watch.cancel()


async def test_a_wanted_number_is_kept_to(pair: tuple[Client, Client], world: World) -> None:
    here, there = pair
    first = await here.publish(_small(world, 0), version=1)
    again = await there.publish(_small(world, 0), version=1)
    assert again.already_published
    error = await error_of(there.publish(_small(world, 1), version=1))
    assert (error.reason, error.code) == (
        Reason.ADAPTER_VERSION_EXISTS,
        grpc.StatusCode.ALREADY_EXISTS,
    )
    assert first.version.ref.digest in error.message
    error = await error_of(there.publish(_small(world, 1), version=3))
    assert (error.reason, error.context.field) == (Reason.INVALID_FIELD, "metadata.version")
    assert "is 2" in error.message
    assert (await there.publish(_small(world, 1), version=2)).version.ref.version == 2


async def test_of_replicas_that_race_for_a_number_one_gets_it(
    pair: tuple[Client, Client], world: World
) -> None:
    folders = [_small(world, seed) for seed in range(6)]
    outcomes = await asyncio.gather(
        *(pair[i % 2].publish(folder, version=1) for i, folder in enumerate(folders)),
        return_exceptions=True,
    )
    won = [item for item in outcomes if isinstance(item, pb.PublishResponse)]
    lost = [item for item in outcomes if isinstance(item, grpc.aio.AioRpcError)]
    assert (len(won), len(lost)) == (1, 5)
    assert {item.code() for item in lost} == {grpc.StatusCode.ALREADY_EXISTS}
    for client in pair:
        digests = [item.ref.digest for item in (await _adapter(client)).versions]
        assert digests == [won[0].version.ref.digest]


async def test_what_a_tenant_may_not_see_is_as_if_it_were_not_there(
    pair: tuple[Client, Client], world: World
) -> None:
    here, there = pair
    await here.publish(_small(world), "hidden", tenants=["acme"])
    await here.publish(_small(world), "open")
    await _until(there, 1, "open")
    for client in pair:
        answers = []
        for name in ("hidden", "absent"):
            error = await error_of(client.stub.Get(pb.GetRequest(adapter=name, tenant="other")))
            answers.append((error.reason, error.message.replace(name, "-"), error.context.field))
        assert answers[0] == answers[1]
        assert answers[0][0] is Reason.ADAPTER_NOT_FOUND
    error = await error_of(there.publish(_small(world, 1), "hidden", tenant="other"))
    assert (error.reason, error.code) == (
        Reason.PERMISSION_DENIED,
        grpc.StatusCode.PERMISSION_DENIED,
    )
    names = [a.name for a in (await here.stub.List(pb.ListRequest(tenant="other"))).adapters]
    assert names == ["open"]
    shown = await there.stub.SetVisibility(pb.SetVisibilityRequest(name="hidden"))
    assert not shown.adapter.tenants
    assert await there.stub.Get(pb.GetRequest(adapter="hidden", tenant="other"))


async def test_lists_are_narrowed_by_what_versions_are(
    pair: tuple[Client, Client], world: World
) -> None:
    here, there = pair
    first = await here.publish(_small(world, 1), "a", labels={"team": "x"})
    await here.publish(_small(world, 1, base_model="acme/tiny-base"), "b")
    await here.publish(_small(world, 2), "c", labels={"team": "x", "lang": "de"})
    for name in ("a", "b", "c"):
        await _until(there, 1, name)

    async def names(**wanted: Any) -> list[str]:
        page = await there.stub.List(pb.ListRequest(**wanted), timeout=5)
        assert not page.next_page_token
        return [adapter.name for adapter in page.adapters]

    assert await names(labels={"team": "x"}) == ["a", "c"]
    assert await names(labels={"team": "x", "lang": "de"}) == ["c"]
    assert await names(digest=first.version.ref.digest) == ["a", "b"]
    assert await names(base_model="acme/tiny-base") == ["b"]
    assert await names(base_model="acme/tiny-base", name_prefix="a") == []
    assert await names(base_model="acme/none") == []


async def test_a_pin_reaches_watchers_of_pins_and_no_one_can_delete_under_it(
    pair: tuple[Client, Client], world: World
) -> None:
    here, there = pair
    await _publish_versions(here, world, 2)
    await here.publish(_small(world), "b")
    await _until(there, 2)
    watch = there.stub.Watch(pb.WatchRequest(pinned_only=True))
    assert (await next_of(watch))[0] == "synced"
    pinned = (await here.stub.Pin(pb.PinRequest(adapter="a@1", reason="demo day"))).adapter
    assert [(pin.selector, pin.reason) for pin in pinned.pins] == [("1", "demo day")]
    _, message = await next_of(watch)
    assert message.updated == pinned
    error = await error_of(there.stub.Delete(pb.DeleteRequest(adapter="a@1")))
    assert error.reason is Reason.ADAPTER_IN_USE
    assert "demo day" in error.message
    await there.stub.Unpin(pb.UnpinRequest(adapter="a@1"))
    assert (await next_of(watch))[0] == "a"
    await there.stub.Delete(pb.DeleteRequest(adapter="a@1"))
    watch.cancel()


async def test_pins_of_a_registry_have_a_limit(world: World) -> None:
    async with world.replica(pinned_adapters_max=1) as client:
        for name in ("a", "b"):
            await client.publish(_small(world), name)
        await client.stub.Pin(pb.PinRequest(adapter="a", reason="x"))
        error = await error_of(client.stub.Pin(pb.PinRequest(adapter="b", reason="x")))
        assert error.reason is Reason.FIELD_LIMIT_EXCEEDED


async def test_a_watch_goes_on_at_another_replica_and_after_a_restart(world: World) -> None:
    async with world.replica() as here:
        await here.publish(_small(world), "a")
        await here.publish(_small(world), "b")
        words, token = await _until_synced(here)
        assert words == ["+a", "+b", "synced"]
        await here.stub.Delete(pb.DeleteRequest(adapter="b"))
        await here.publish(_small(world), "c")
    async with world.replica() as there:
        words, token = await _until_synced(there, token)
        assert words[-1] == "resumed"
        assert {"+c", "-b"} <= set(words)
        assert token
        assert (await _until_synced(there, "garbage"))[0] == ["+a", "+c", "synced"]


async def test_a_deleted_adapter_is_unknown_at_once_and_its_numbers_stay_given(
    pair: tuple[Client, Client], world: World
) -> None:
    here, there = pair
    await _publish_versions(here, world, 2, aliases=["prod"])
    await here.stub.Pin(pb.PinRequest(adapter="a@prod", reason="x"))
    await here.stub.Delete(pb.DeleteRequest(adapter="a"))
    for reference in ("a", "a@1", "a@prod"):
        error = await error_of(here.stub.Get(pb.GetRequest(adapter=reference)))
        assert error.reason is Reason.ADAPTER_NOT_FOUND
    published = await there.publish(_small(world, 1), tenants=["acme"])
    assert published.version.ref.version == 3
    adapter = await _adapter(there)
    assert (dict(adapter.aliases), list(adapter.pins)) == ({}, [])


async def test_a_replica_that_starts_takes_no_token_before_it_knows_the_registry(
    world: World,
) -> None:
    async with world.replica() as here:
        await here.publish(_small(world), "a")
        _, token = await _until_synced(here)
    service = await start(world.settings())
    channel = open_channel(service.address)
    try:
        client = Client(service, channel)
        await client.until_serving()
        assert (await _until_synced(client, token))[0] == ["+a", "resumed"]
    finally:
        await channel.close()
        await service.stop(0)
