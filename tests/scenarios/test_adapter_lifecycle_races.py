"""Adapters that are deleted, hidden and unloaded under requests, in whatever stage these are.

A request ends on the weights that it was admitted with; whoever comes later is told that they are
not there; and when nobody uses them any more their bytes are free and confirmed to be.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from calumma.adapter_store.v1 import adapter_store_pb2 as store_pb
from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2
from calumma.scheduler.v1 import scheduler_pb2
from services.common.errors import Reason, RpcError
from tests.support.fault_proxy import CLEAN, Fault, FaultProxy, run_fault_proxy
from tests.support.lifecycle_parts import Clients, LifecycleParts, lifecycle_parts
from tests.support.suite_parts import LIMIT_S

TOKENS = 40
SLOW = Fault(bytes_per_s=60_000)  # the adapter has 131 kB


class Stage:
    """A suite with one request for "poet" that is held in a stage."""

    def __init__(self, parts: LifecycleParts, clients: Clients, proxy: FaultProxy) -> None:
        self.parts, self.clients, self.proxy = parts, clients, proxy
        self.digest = ""
        self.call: Any = None
        self._others: list[Any] = []

    def begin(self, adapter: str, *, prompt_tokens: int = 4, max_tokens: int = TOKENS) -> Any:
        """Start a stream; it is cancelled at the end of the test if it still runs."""
        request = gateway_pb2.GenerateStreamRequest(
            token_ids=gateway_pb2.TokenIds(ids=[1 + i % 200 for i in range(prompt_tokens)]),
            adapter=adapter,
            stopping=common_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        )
        call = self.clients.gateway.GenerateStream(request, timeout=LIMIT_S)
        self._others.append(call)
        return call

    async def reach(self, stage: str) -> None:
        """Publish the adapter, and bring a request for it into the stage."""
        folder = self.parts.folder_of(0, rank=128)
        published = await self.clients.publish(folder, "poet")
        self.digest = published.version.ref.digest
        core = self.parts.workers["worker-1"].core
        match stage:
            case "queued":
                blockers = [self.begin("", max_tokens=400) for _ in range(2)]
                for blocker in blockers:
                    await _text_of(blocker)
                self.call = self.begin("poet")
                await self._until(lambda state: len(state.queued) == 1)
                blockers[0].cancel()  # and now it may have its turn
            case "loading":
                self.proxy.set(SLOW)
                self.call = self.begin("poet")
                await _until(lambda: core.snapshot().loading == 1)
                self.proxy.set(Fault(bytes_per_s=400_000))
            case "prefill":
                self.call = self.begin("poet", prompt_tokens=400)
                await _until(lambda: bool(self.parts.engines["worker-1"].open))
                assert core.snapshot().running == 1
            case _:
                self.call = self.begin("poet")
                await _text_of(self.call)

    async def tokens(self) -> int:
        """Read the held request to its end. How many tokens came, all of them counted?"""
        count = 0
        async with asyncio.timeout(LIMIT_S):
            while (message := await self.call.read()) is not grpc.aio.EOF:
                if message.HasField("started"):
                    assert message.started.adapter.digest == self.digest
                count += len(message.chunk.token_ids)
        return count

    async def is_unknown(self) -> None:
        """Wait until the gateway, too, has heard that the adapter is not there for its tenant."""
        async with asyncio.timeout(2):
            while True:
                try:
                    await self.clients.generate("poet")
                except grpc.aio.AioRpcError as raised:
                    error = RpcError.from_rpc(raised)
                    assert error is not None
                    assert error.reason is Reason.ADAPTER_NOT_FOUND
                    return

    async def check_is_gone(self) -> None:
        """What was loaded can be had back, to the last byte."""
        self.proxy.set(CLEAN)
        answer = await self.clients.unload(self.digest)
        assert list(answer.holding_workers) == []
        for call in self._others:
            call.cancel()
        await self.parts.check_rest()
        worker = self.parts.workers["worker-1"]
        assert worker.residency.held() == {}
        state = await self.parts.worker_state()
        assert (list(state.adapters), state.adapter_blocks, state.kv_blocks) == ([], 0, 0)
        assert self.parts.engines["worker-1"].adapters == {}

    async def _until(self, holds: Callable[[Any], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while True:
                request = scheduler_pb2.GetStateRequest()
                if holds(await self.clients.scheduler.GetState(request)):
                    return
                await asyncio.sleep(0.01)


@asynccontextmanager
async def staged(folder: Path) -> AsyncGenerator[Stage]:
    """One worker for two requests at a time; what it downloads comes through a proxy."""
    async with (
        lifecycle_parts(folder) as parts,
        run_fault_proxy(f"http://{parts.store.address}") as proxy,
    ):
        await parts.start_worker(
            step_ms=20,
            max_sequences=2,
            stepping="chunked",
            prefill_tokens_per_step=16,
            store_address=proxy.url.removeprefix("http://"),
        )
        await parts.publish("other", seed=9)  # the registry can be changed from here on
        yield Stage(parts, await parts.clients(), proxy)
        await parts.stop_worker("worker-1")


async def _text_of(call: Any) -> None:
    """Read until the first tokens."""
    async with asyncio.timeout(LIMIT_S):
        while not (await call.read()).chunk.token_ids:
            pass


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("stage", ["queued", "loading", "prefill", "decode"])
async def test_a_request_whose_adapter_is_deleted_and_unloaded_ends_as_if_it_were_not(
    stage: str, tmp_path: Path
) -> None:
    async with staged(tmp_path) as it:
        await it.reach(stage)
        await it.clients.store.Delete(store_pb.DeleteRequest(adapter="poet"))
        held = await it.clients.unload(it.digest, grace_s=0.2)
        assert held.freed_bytes == 0
        assert list(held.unloaded_workers) == []

        await it.is_unknown()
        first = 1 if stage == "decode" else 0  # which was read already
        assert await it.tokens() + first == TOKENS
        await it.check_is_gone()


async def test_a_request_whose_adapter_is_hidden_while_it_loads_gets_its_answer(
    tmp_path: Path,
) -> None:
    async with staged(tmp_path) as it:
        await it.reach("loading")
        hide = store_pb.SetVisibilityRequest(name="poet", tenants=["acme"])
        await it.clients.store.SetVisibility(hide)

        await it.is_unknown()
        assert await it.tokens() == TOKENS
        show = store_pb.SetVisibilityRequest(name="poet", tenants=[])
        await it.clients.store.SetVisibility(show)
        assert (await it.clients.generate("poet")).adapter.digest == it.digest
        await it.check_is_gone()


async def test_an_adapter_that_is_unloaded_while_it_loads_for_nobody_any_more_goes(
    tmp_path: Path,
) -> None:
    async with staged(tmp_path) as it:
        await it.reach("loading")
        residency = it.parts.workers["worker-1"].residency
        it.call.cancel()
        await it.clients.unload(it.digest)
        assert [one.ready_layers is None for one in residency.held().values()] == [False]
        await _until(lambda: residency.held() == {})
        await it.check_is_gone()


async def test_a_published_name_that_was_deleted_under_a_request_is_new_weights(
    tmp_path: Path,
) -> None:
    async with staged(tmp_path) as it:
        await it.reach("decode")
        await it.clients.store.Delete(store_pb.DeleteRequest(adapter="poet"))
        again = await it.clients.publish(it.parts.folder_of(1, rank=8), "poet")
        assert again.version.ref.version == 2
        answer = await it.clients.generate("poet")
        assert answer.adapter.digest == again.version.ref.digest != it.digest
        assert await it.tokens() + 1 == TOKENS
        await it.clients.unload(again.version.ref.digest)
        await it.check_is_gone()
