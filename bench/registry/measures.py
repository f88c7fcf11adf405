"""What is measured of a registry that runs: resolving names, pages, watches."""

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

from bench.registry.corpus import adapter_name
from bench.report import Row
from calumma.adapter_store.v1 import adapter_store_pb2 as pb
from calumma.adapter_store.v1 import adapter_store_pb2_grpc as pb_grpc
from services.common.clients import open_channel
from services.common.errors import Reason, RpcError
from services.gateway.registry import Registry
from services.gateway.types import AdapterName

CHANGES: Final = 10
UNKNOWN: Final = 300  # made-up names that the store is asked about
PAGES_MAX: Final = 300  # of each list
_CHUNK_BYTES: Final = 2**20
_TIMEOUT_S: Final = 60.0


async def publish(address: str, folder: Path, name: str) -> pb.AdapterVersion:
    """Publish a PEFT folder, and pin it, so that a worker has something to hold."""

    async def messages() -> AsyncIterator[pb.PublishRequest]:
        yield pb.PublishRequest(metadata=pb.PublishMetadata(name=name))
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            data = (folder / file).read_bytes()
            for start in range(0, len(data), _CHUNK_BYTES):
                part = data[start : start + _CHUNK_BYTES]
                yield pb.PublishRequest(chunk=pb.FileChunk(file=file, data=part))

    async with open_channel(address) as channel:
        stub: Any = pb_grpc.AdapterStoreServiceStub(channel)
        published = await stub.Publish(messages(), timeout=_TIMEOUT_S)
        await stub.Pin(pb.PinRequest(adapter=name, reason="benchmark"), timeout=_TIMEOUT_S)
    version: pb.AdapterVersion = published.version
    return version


async def resolving(address: str, count: int, *, questions: int) -> tuple[list[Row], Row]:
    """A gateway's registry: its first watch, then names of all kinds. Rows of both."""
    changed = asyncio.Event()
    registry = Registry(address, timeout_s=_TIMEOUT_S, changed=changed)
    began_s = time.perf_counter()
    run = asyncio.create_task(registry.run())
    try:
        await asyncio.wait_for(changed.wait(), 2 * _TIMEOUT_S)
        seconds = time.perf_counter() - began_s
        watch = _watch_row("first watch of a gateway", len(registry), seconds)
        chance = random.Random(1)
        known = [adapter_name(chance.randrange(count)) for _ in range(questions)]
        unknown = [AdapterName(f"made-up-{number}") for number in range(UNKNOWN)]
        rows = [
            await _resolve_row(registry, "name", [AdapterName(name) for name in known]),
            await _resolve_row(
                registry, "name@alias, canary", [AdapterName(name, alias="prod") for name in known]
            ),
            await _resolve_row(registry, "name@version", [AdapterName(n, 1) for n in known]),
            await _resolve_row(registry, "unknown, asked for at the store", unknown),
        ]
        again = unknown[-20:]  # asked for a moment ago
        for name in again:
            await _resolved(registry, name, "r")
        rows.append(await _resolve_row(registry, "unknown, remembered", again * 50))
        return rows, watch
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await registry.close()


async def _resolve_row(registry: Registry, what: str, names: Sequence[AdapterName]) -> Row:
    times_us: list[float] = []
    for number, name in enumerate(names):
        request_id = f"req-{number}"
        began_ns = time.perf_counter_ns()
        await _resolved(registry, name, request_id)
        times_us.append((time.perf_counter_ns() - began_ns) / 1e3)
    return {
        "resolve": what,
        "questions": len(times_us),
        "p50_us": statistics.median(times_us),
        "p99_us": _p99(times_us),
    }


async def _resolved(registry: Registry, name: AdapterName, request_id: str) -> None:
    try:
        await registry.resolve(name, tenant="default", request_id=request_id)
    except RpcError as error:
        if error.reason is not Reason.ADAPTER_NOT_FOUND:
            raise


async def listing(address: str) -> list[Row]:
    """The pages of the largest and of the default size, and of filters."""
    async with open_channel(address) as channel:
        stub: Any = pb_grpc.AdapterStoreServiceStub(channel)
        return [
            await _list_row(stub, "1,000 a page", pb.ListRequest(page_size=1000)),
            await _list_row(stub, "100 a page", pb.ListRequest()),
            await _list_row(
                stub, "a label that none has", pb.ListRequest(labels={"team": "nobody"})
            ),
            await _list_row(stub, "for a tenant", pb.ListRequest(page_size=1000, tenant="acme")),
        ]


async def _list_row(stub: Any, what: str, request: pb.ListRequest) -> Row:
    times_ms: list[float] = []
    adapters = 0
    for _ in range(PAGES_MAX):
        began_s = time.perf_counter()
        answer = await stub.List(request, timeout=_TIMEOUT_S)
        times_ms.append((time.perf_counter() - began_s) * 1e3)
        adapters += len(answer.adapters)
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token
    return {
        "list": what,
        "pages": len(times_ms),
        "adapters": adapters,
        "p50_ms": statistics.median(times_ms),
        "p99_ms": _p99(times_ms),
    }


async def watching(address: str) -> list[Row]:
    """A whole watch, one that goes on after `CHANGES` changes, and one of the pins."""
    async with open_channel(address) as channel:
        stub: Any = pb_grpc.AdapterStoreServiceStub(channel)
        whole, token = await _watch(stub, "whole watch", pb.WatchRequest())
        for number in range(CHANGES):
            name = adapter_name(number)
            change = pb.SetAliasRequest(name=name, alias="test", version=1)
            await stub.SetAlias(change, timeout=_TIMEOUT_S)
        resumed, _ = await _watch(
            stub, f"resumed after {CHANGES} changes", pb.WatchRequest(resume_token=token)
        )
        pins, _ = await _watch(stub, "pins only", pb.WatchRequest(pinned_only=True))
    return [whole, resumed, pins]


async def _watch(stub: Any, what: str, request: pb.WatchRequest) -> tuple[Row, str]:
    began_s = time.perf_counter()
    call = stub.Watch(request)
    messages = 0
    try:
        async for change in call:
            if change.WhichOneof("event") == "synced":
                seconds = time.perf_counter() - began_s
                return _watch_row(what, messages, seconds), change.resume_token
            messages += 1
    finally:
        call.cancel()
    raise RuntimeError("the watch ended before it was synced")


def _watch_row(what: str, messages: int, seconds: float) -> Row:
    return {
        "watch": what,
        "messages": messages,
        "seconds": seconds,
        "messages_per_s": messages / seconds,
    }


def _p99(values: Sequence[float]) -> float:
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[98]
