"""The gateway's mirror of real adapter stores: aliases, tenants, and watches that go on."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from calumma.adapter_store.v1 import adapter_store_pb2_grpc as pb_grpc
from services.adapter_store.config import AdapterStoreSettings
from services.adapter_store.service import AdapterStore, start
from services.common.clients import open_channel
from services.common.errors import Reason, RpcError
from services.gateway.parse import adapter_name
from services.gateway.registry import Registry
from services.gateway.types import AdapterRef
from tests.support.peft_folders import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    write_peft_folder,
    write_tiny_model,
)

WAIT_S = 15.0


class World:
    """Stores on one folder, and the registries of gateways."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self._folder = folder
        self._shapes = write_tiny_model(folder / "model")
        self._stack = stack
        self._replicas = 0

    async def store(self, listen: str = "127.0.0.1:0") -> AdapterStore:
        self._replicas += 1
        store = await start(
            AdapterStoreSettings(
                listen=listen,
                store_url=(self._folder / "store").as_uri(),
                model=str(self._folder / "model"),
                cache_dir=self._folder / f"cache-{self._replicas}",
                poll_s=0.05,
            )
        )
        self._stack.push_async_callback(store.stop, 0)
        return store

    async def stub(self, store: AdapterStore) -> Any:
        channel = await self._stack.enter_async_context(open_channel(store.address))
        return pb_grpc.AdapterStoreServiceStub(channel)

    async def publish(self, stub: Any, name: str, *, seed: int = 0, **metadata: Any) -> AdapterRef:
        folder = self._folder / f"{name}-{seed}"
        write_peft_folder(folder, shapes=self._shapes, num_layers=2, seed=seed)

        async def messages() -> AsyncIterator[pb.PublishRequest]:
            yield pb.PublishRequest(metadata=pb.PublishMetadata(name=name, **metadata))
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                chunk = pb.FileChunk(file=file, data=(folder / file).read_bytes())
                yield pb.PublishRequest(chunk=chunk)

        ref = (await answered(lambda: stub.Publish(messages(), timeout=10))).version.ref
        return AdapterRef(ref.digest, ref.name, ref.version, ref.rank, ref.size_bytes)

    @asynccontextmanager
    async def registry(self, address: str) -> AsyncGenerator[Registry]:
        changed = asyncio.Event()
        registry = Registry(address, timeout_s=2.0, changed=changed)
        run = asyncio.create_task(registry.run())
        try:
            await asyncio.wait_for(changed.wait(), WAIT_S)
            yield registry
        finally:
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
            await registry.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(tmp_path, stack)


async def answered(call: Callable[[], Any]) -> Any:
    """Ask again while the store is not ready."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.05)


async def resolve(
    registry: Registry, text: str, *, tenant: str = "default", request_id: str = "r"
) -> AdapterRef:
    return await registry.resolve(adapter_name(text), tenant=tenant, request_id=request_id)


async def refusal(registry: Registry, text: str, tenant: str) -> tuple[Reason, str]:
    with pytest.raises(RpcError) as caught:
        await resolve(registry, text, tenant=tenant)
    return caught.value.reason, caught.value.message


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():
            await asyncio.sleep(0.02)


async def test_a_canary_takes_its_part_of_the_requests_until_it_is_rolled_back(
    world: World,
) -> None:
    store = await world.store()
    stub = await world.stub(store)
    old = await world.publish(stub, "poet", aliases=["prod"])
    new = await world.publish(stub, "poet", seed=1)
    async with world.registry(store.address) as registry:

        async def share() -> float:
            ids = [f"req-{number}" for number in range(2000)]
            taken = [await resolve(registry, "poet@prod", request_id=one) for one in ids]
            assert set(taken) <= {old, new}
            return taken.count(new) / len(taken)

        assert await share() == 0
        canary = pb.SetAliasRequest(name="poet", alias="prod", version=2, canary_percent=30)
        await stub.SetAlias(canary, timeout=5)

        async def has_canary() -> bool:
            return await share() > 0

        await until(has_canary)
        assert abs(await share() - 0.3) < 0.04
        await stub.RollbackAlias(pb.RollbackAliasRequest(name="poet", alias="prod"), timeout=5)

        async def is_back() -> bool:
            return await share() == 0

        await until(is_back)
        await stub.SetAlias(pb.SetAliasRequest(name="poet", alias="prod", version=2), timeout=5)

        async def is_moved() -> bool:
            return await share() == 1

        await until(is_moved)


async def test_visibility_holds_for_what_is_mirrored_and_for_what_is_asked_for(
    world: World,
) -> None:
    store = await world.store()
    stub = await world.stub(store)
    ref = await world.publish(stub, "secret", tenants=["acme"], aliases=["prod"])
    async with world.registry(store.address) as registry:
        assert await resolve(registry, "secret@prod", tenant="acme") == ref
        for selector in ("", "@1", "@prod", "@9", "@nothing"):
            told = await refusal(registry, f"secret{selector}", "globex")
            made_up = await refusal(registry, f"made-up{selector}", "globex")
            assert told[0] is made_up[0] is Reason.ADAPTER_NOT_FOUND
            assert told[1].replace("secret", "made-up") == made_up[1]
        await stub.SetVisibility(
            pb.SetVisibilityRequest(name="secret", tenants=["globex"]), timeout=5
        )

        async def is_globexs() -> bool:
            try:
                return await resolve(registry, "secret", tenant="globex") == ref
            except RpcError:
                return False

        await until(is_globexs)
        assert (await refusal(registry, "secret", "acme"))[0] is Reason.ADAPTER_NOT_FOUND


async def test_a_registry_goes_on_at_another_replica_where_it_was(world: World) -> None:
    first = await world.store()
    address = first.address
    stub = await world.stub(first)
    refs = {name: await world.publish(stub, name) for name in ("a", "b", "c")}
    async with world.registry(address) as registry:
        await until_known(registry, 3)
        await first.stop(0)
        assert await resolve(registry, "a") == refs["a"]  # the store is away
        second = await world.store()
        other = await world.stub(second)
        await answered(lambda: other.Delete(pb.DeleteRequest(adapter="b"), timeout=5))
        newer = await world.publish(other, "c", seed=1)
        added = await world.publish(other, "d", seed=2)
        await world.store(address)  # another replica, at the address that the gateway knows

        async def is_caught_up() -> bool:
            return await resolve(registry, "c") == newer and len(registry) == 3

        await until(is_caught_up)
        assert await resolve(registry, "a") == refs["a"]
        assert await resolve(registry, "d") == added
        assert (await refusal(registry, "b", "default"))[0] is Reason.ADAPTER_NOT_FOUND


async def until_known(registry: Registry, count: int) -> None:
    async def is_known() -> bool:
        return len(registry) == count

    await until(is_known)


async def test_what_another_replica_published_works_before_the_watch_tells_it(
    world: World,
) -> None:
    first, second = await world.store(), await world.store()
    stub = await world.stub(second)
    await world.publish(await world.stub(first), "early")
    async with world.registry(first.address) as registry:
        ref = await world.publish(stub, "poet", tenants=["acme"])
        assert await resolve(registry, "poet", tenant="acme") == ref
        assert (await refusal(registry, "poet", "globex"))[0] is Reason.ADAPTER_NOT_FOUND
