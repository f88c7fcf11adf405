"""What a worker had, and what a publish began, is made good after either was broken off.

The worker is a process that is killed; all else is real services in this one. Storage breaks where
it hurts most: when an adapter's bytes are there and its name is not.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from calumma.adapter_store.v1 import adapter_store_pb2 as store_pb
from calumma.common.v1 import common_pb2
from services.adapter_store.storage import ObjectStorage, unavailable
from services.common import base_model
from services.common.errors import Reason, RpcError
from tests.support.fault_proxy import Fault, run_fault_proxy
from tests.support.lifecycle_parts import Clients, LifecycleParts, lifecycle_parts
from tests.support.peft_folders import CONFIG_FILE, WEIGHTS_FILE
from tests.support.suite_parts import LIMIT_S, ResidencyWatch

DEVICE = common_pb2.ADAPTER_TIER_DEVICE
BACK_S = 10.0  # from the start of a worker's process until all that is pinned is there again
REASON = "first in every demo"


@asynccontextmanager
async def worker_process(
    parts: LifecycleParts, store_address: str = ""
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """A worker as operators run it, with the simulated engine. Killed at the end."""
    identity = {"name": "quick", "digest": "sha256:" + "0" * 64}  # the folder has no weights
    (parts.model / base_model.MODEL_FILE).write_text(json.dumps(identity), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.worker",
        "--engine=simulated",
        f"--model={parts.model}",
        "--listen=127.0.0.1:0",
        f"--scheduler={parts.scheduler.address}",
        f"--adapter-store={store_address or parts.store.address}",
        "--worker-id=worker-1",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        await kill(process)


async def kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGKILL)
    await process.wait()


def is_pinned(watch: ResidencyWatch, digest: str) -> bool:
    one = watch.find(digest)
    return one is not None and (one.tier, one.pin_reason) == (DEVICE, REASON)


async def test_a_killed_worker_has_its_pins_again_and_claims_nothing_else(tmp_path: Path) -> None:
    async with lifecycle_parts(tmp_path) as parts, AsyncExitStack() as stack:
        first = await stack.enter_async_context(worker_process(parts))
        pinned = [(await parts.publish(f"pinned-{seed}", seed=seed)).ref for seed in range(3)]
        used = (await parts.publish("used", seed=9)).ref
        clients = await parts.clients()
        for ref in pinned:
            await clients.store.Pin(store_pb.PinRequest(adapter=ref.name, reason=REASON))
        watch = await ResidencyWatch.open(parts)
        await watch.until(lambda it: all(is_pinned(it, ref.digest) for ref in pinned))
        await clients.generate("used")
        await watch.until(lambda it: it.find(used.digest) is not None)

        await kill(first)
        await watch.until(lambda it: not it.workers["worker-1"].attached)
        assert list(watch.workers["worker-1"].adapters) == []
        await stack.enter_async_context(worker_process(parts))
        async with asyncio.timeout(BACK_S):
            await watch.until(lambda it: all(is_pinned(it, ref.digest) for ref in pinned))
        assert watch.find(used.digest) is None
        answer = await clients.generate("used")
        assert answer.completion.timings.adapter_tier == common_pb2.ADAPTER_TIER_STORE
        assert (await clients.generate(pinned[0].name)).completion.timings.adapter_tier == DEVICE


async def test_a_request_whose_worker_dies_while_the_adapter_loads_is_answered_by_the_next(
    tmp_path: Path,
) -> None:
    async with (
        lifecycle_parts(tmp_path) as parts,
        run_fault_proxy(f"http://{parts.store.address}") as proxy,
        AsyncExitStack() as stack,
    ):
        first = await stack.enter_async_context(
            worker_process(parts, proxy.url.removeprefix("http://"))
        )
        await parts.publish("other", seed=9)
        clients = await parts.clients()
        folder = parts.folder_of(0, rank=128)
        ref = (await clients.publish(folder, "poet")).version.ref
        await clients.generate("other")
        proxy.set(Fault(bytes_per_s=ref.size_bytes // 20))
        running = asyncio.create_task(clients.generate("poet"))
        async with asyncio.timeout(LIMIT_S):
            while proxy.sent_bytes < ref.size_bytes // 20:
                await asyncio.sleep(0.02)
        assert not running.done()
        await kill(first)
        await stack.enter_async_context(worker_process(parts))
        answer = await running
        assert answer.adapter.digest == ref.digest
        assert answer.completion.resubmissions == 1
        assert len(answer.token_ids) == 4


async def refused(call: Any) -> RpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = RpcError.from_rpc(caught.value)
    assert error is not None, caught.value
    return error


def blobs_of(parts: LifecycleParts) -> list[Path]:
    return [it for it in (parts.folder / "store" / "blobs").rglob("*") if it.is_file()]


async def check_heals(parts: LifecycleParts, clients: Clients, folder: Path) -> None:
    """The same publish again makes the first version, of one blob, which is served at once."""
    assert list((await clients.store.List(store_pb.ListRequest(name_prefix="poet"))).adapters) == []
    published = await clients.publish(folder, "poet")
    assert (published.version.ref.version, published.already_published) == (1, False)
    again = await clients.publish(folder, "poet")
    assert (again.version.ref.version, again.already_published) == (1, True)
    assert (await clients.generate("poet")).adapter.digest == published.version.ref.digest
    hexes = [path.name for path in blobs_of(parts)]
    assert hexes.count(published.version.ref.digest.removeprefix("sha256:")) == 1
    assert len(hexes) == 2  # and that of "other"


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[LifecycleParts, Clients]]:
    async with lifecycle_parts(tmp_path) as parts:
        await parts.start_worker()
        await parts.publish("other", seed=9)
        yield parts, await parts.clients()


@pytest.mark.parametrize("broken", ["put", "create"])
async def test_a_publish_that_storage_broke_off_shows_nothing_and_heals_when_tried_again(
    served: tuple[LifecycleParts, Clients], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, clients = served
    folder = parts.folder_of(0)
    whole = getattr(ObjectStorage, broken)

    async def breaks(self: ObjectStorage, path: str, data: bytes) -> Any:
        raise unavailable("broken on purpose")

    monkeypatch.setattr(ObjectStorage, broken, breaks)
    error = await refused(clients.publish(folder, "poet"))
    assert error.reason is Reason.OBJECT_STORAGE_UNAVAILABLE
    assert error.context.retry_after_s is not None
    assert (await refused(clients.generate("poet"))).reason is Reason.ADAPTER_NOT_FOUND
    monkeypatch.setattr(ObjectStorage, broken, whole)
    await asyncio.sleep(1.1)  # for as long a gateway may remember that there is no such adapter
    await check_heals(parts, clients, folder)


def spooled_files() -> list[str]:
    """What uploads hold on disk: files without a name, open in this process."""
    links = []
    for one in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(one.readlink()))
    return [link for link in links if link.endswith("(deleted)") and "/cache/" in link]


async def test_a_publisher_that_vanishes_in_the_middle_leaves_nothing(
    served: tuple[LifecycleParts, Clients],
) -> None:
    parts, clients = served
    folder = parts.folder_of(0)
    has_begun = asyncio.Event()

    async def half() -> AsyncIterator[store_pb.PublishRequest]:
        yield store_pb.PublishRequest(metadata=store_pb.PublishMetadata(name="poet"))
        config, weights = ((folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE))
        for file, data in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights[: len(weights) // 2])):
            yield store_pb.PublishRequest(chunk=store_pb.FileChunk(file=file, data=data))
        has_begun.set()
        await asyncio.Event().wait()

    call = clients.store.Publish(half())
    await asyncio.wait_for(has_begun.wait(), LIMIT_S)
    async with asyncio.timeout(LIMIT_S):
        while len(spooled_files()) < 2:
            await asyncio.sleep(0.02)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(LIMIT_S):
        while spooled_files():
            await asyncio.sleep(0.02)
    assert len(blobs_of(parts)) == 1
    await check_heals(parts, clients, folder)
