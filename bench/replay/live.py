"""Plays a trace to a running suite in real time, and reports what each request saw."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import grpc

from bench.replay.lengths import LengthSeeds
from bench.workload import Arrival, Trace
from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.core.types import Adapter, AdapterDigest

IN_FLIGHT_MAX: Final = 4000  # below the gateway's own limit; an open loop does not wait for room
_WARM_UP_TIMEOUT_S: Final = 60.0
_ANSWER_TIMEOUT_S: Final = 600.0
_LEAD_S: Final = 0.5  # before the first request
_FIRST_TOKEN_ID: Final = 100
_TOKEN_IDS: Final = 1000
_Stub = Any  # the generated async stub is a type for checkers only


@dataclass(frozen=True, slots=True)
class LiveOutcome:
    """One request: how late it was sent, and its times as its gateway measured them."""

    late_s: float
    ttft_s: float
    e2e_s: float
    output_tokens: int


async def warm_up(address: str, names: Sequence[str]) -> list[Adapter]:
    """Bring each adapter to the worker, as the store registered it; no answer is waited for.

    A cancelled request teaches the gateway's predictor nothing.
    """
    async with grpc.aio.insecure_channel(address) as channel:
        stub: _Stub = gateway_pb2_grpc.InferenceServiceStub(channel)
        return [await _touch(stub, name) for name in names]


async def play(
    address: str, trace: Trace, names: Mapping[AdapterDigest, str], seeds: LengthSeeds
) -> list[LiveOutcome]:
    """Send each request at its time, whatever became of the others. A failed one raises."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: _Stub = gateway_pb2_grpc.InferenceServiceStub(channel)
        start_s = time.perf_counter() + _LEAD_S
        slots = asyncio.Semaphore(IN_FLIGHT_MAX)
        async with asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[LiveOutcome]] = []
            for arrival in trace.arrivals:
                due_s = start_s + arrival.arrival_s
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                if slots.locked():
                    raise RuntimeError(f"{IN_FLIGHT_MAX} requests are in flight: overloaded")
                await slots.acquire()
                request = _request(arrival, names, seeds)
                task = group.create_task(_answer(stub, request, due_s))
                task.add_done_callback(lambda _: slots.release())
                tasks.append(task)
        return [task.result() for task in tasks]


def possible(trace: Trace, adapters: Sequence[Adapter], seeds: LengthSeeds) -> Trace:
    """The trace with the published adapters, and with lengths that the engine can give."""
    published = dict(zip(trace.adapters, adapters, strict=True))
    arrivals = [
        replace(
            arrival,
            adapter=published[arrival.adapter] if arrival.adapter is not None else None,
            output_tokens=min(seeds.nearest(arrival.output_tokens), arrival.max_output_tokens),
        )
        for arrival in trace.arrivals
    ]
    return replace(trace, arrivals=tuple(arrivals), adapters=tuple(adapters))


async def _touch(stub: _Stub, name: str) -> Adapter:
    request = gateway_pb2.GenerateStreamRequest(
        token_ids=gateway_pb2.TokenIds(ids=[_FIRST_TOKEN_ID]), adapter=name
    )
    call = stub.GenerateStream(request, timeout=_WARM_UP_TIMEOUT_S)
    adapter: common_pb2.AdapterRef | None = None
    async for response in call:
        if response.HasField("started"):
            adapter = response.started.adapter
        if response.HasField("chunk"):
            break
    call.cancel()
    assert adapter is not None
    return Adapter(AdapterDigest(adapter.digest), adapter.rank, adapter.size_bytes)


def _request(
    arrival: Arrival, names: Mapping[AdapterDigest, str], seeds: LengthSeeds
) -> gateway_pb2.GenerateRequest:
    ids = [_FIRST_TOKEN_ID + index % _TOKEN_IDS for index in range(arrival.prompt_tokens)]
    return gateway_pb2.GenerateRequest(
        token_ids=gateway_pb2.TokenIds(ids=ids),
        adapter=names[arrival.adapter.digest] if arrival.adapter is not None else "",
        sampling=common_pb2.SamplingParams(seed=seeds.seed(arrival.output_tokens)),
        stopping=common_pb2.StopConditions(max_tokens=arrival.max_output_tokens),
        priority=arrival.priority,
    )


async def _answer(stub: _Stub, request: gateway_pb2.GenerateRequest, due_s: float) -> LiveOutcome:
    sent_s = time.perf_counter()
    response = await stub.Generate(request, timeout=_ANSWER_TIMEOUT_S)
    return LiveOutcome(
        late_s=sent_s - due_s,
        ttft_s=response.completion.time_to_first_token_s,
        e2e_s=time.perf_counter() - sent_s,
        output_tokens=response.completion.usage.output_tokens,
    )
