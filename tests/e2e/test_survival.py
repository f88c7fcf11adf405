"""Kill what can be killed: real processes, simulated engines, streams that go on.

The simulated engine's tokens are a function of seed and position, so a stream that survived a
failure is compared with one that saw none.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.suite import Suite, running_suite
from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.common.errors import RpcError

pytestmark = [pytest.mark.model, pytest.mark.slow]
TOKENS = 120
STREAMS = 8


@pytest.fixture(scope="module")
def pair(home: Path) -> Iterator[Suite]:
    """Two simulated workers; a step takes the time it takes on a CPU."""
    env = {"CALUMMA_WORKER_PROFILE": "cpu-smollm2"}
    options = ("--home", str(home), "--engine", "simulated", "--workers", "2")
    with running_suite(*options, env=env) as suite:
        yield suite


def _request(seed: int, *, adapter: str = "") -> gateway_pb2.GenerateStreamRequest:
    return gateway_pb2.GenerateStreamRequest(
        token_ids=gateway_pb2.TokenIds(ids=[1, 2, 3, 4]),
        adapter=adapter,
        sampling=common_pb2.SamplingParams(seed=seed, temperature=1.0),
        stopping=common_pb2.StopConditions(max_tokens=TOKENS, ignore_eos=True),
    )


class _Streams:
    """Many streams at once, and what has come of each."""

    def __init__(self, gateway: str) -> None:
        self._gateway = gateway
        self.tokens: list[list[int]] = [[] for _ in range(STREAMS)]
        self.completions: list[gateway_pb2.Completion] = []

    async def run(self, disturb: Callable[[], None] | None = None) -> None:
        async with grpc.aio.insecure_channel(self._gateway) as channel:
            stub = gateway_pb2_grpc.InferenceServiceStub(channel)
            tasks = [asyncio.create_task(self._one(stub, seed)) for seed in range(STREAMS)]
            if disturb is not None:
                while min(map(len, self.tokens)) < TOKENS // 4:
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(disturb)
            await asyncio.gather(*tasks)

    async def _one(self, stub: "gateway_pb2_grpc.InferenceServiceAsyncStub", seed: int) -> None:
        async for response in stub.GenerateStream(_request(seed), timeout=120):
            match response.WhichOneof("event"):
                case "chunk":
                    self.tokens[seed] += response.chunk.token_ids
                case "finished":
                    self.completions.append(response.finished)
                case _:
                    pass


@pytest.fixture(scope="module")
def undisturbed(pair: Suite) -> list[list[int]]:
    streams = _Streams(pair.gateway)
    asyncio.run(streams.run())
    assert all(len(tokens) == TOKENS for tokens in streams.tokens)
    return streams.tokens


def test_streams_go_on_with_no_gap_and_no_duplicate_when_their_worker_is_killed(
    pair: Suite, undisturbed: list[list[int]]
) -> None:
    streams = _Streams(pair.gateway)

    asyncio.run(streams.run(disturb=lambda: pair.kill("worker-1")))

    assert streams.tokens == undisturbed
    assert sum(completion.resubmissions for completion in streams.completions) > 0
    _wait_until_served(pair)


def test_streams_do_not_notice_that_the_scheduler_is_killed(
    pair: Suite, undisturbed: list[list[int]]
) -> None:
    streams = _Streams(pair.gateway)

    asyncio.run(streams.run(disturb=lambda: pair.kill("scheduler")))

    assert streams.tokens == undisturbed
    assert sum(completion.resubmissions for completion in streams.completions) == 0
    _wait_until_served(pair)


def test_requests_sent_while_the_scheduler_is_down_are_served_when_it_is_back(
    pair: Suite, undisturbed: list[list[int]]
) -> None:
    pair.kill("scheduler")
    streams = _Streams(pair.gateway)

    asyncio.run(streams.run())

    assert streams.tokens == undisturbed


def test_the_base_and_resident_adapters_go_on_without_the_store(pair: Suite) -> None:
    warm, cold = pair.adapters[:2]
    with grpc.insecure_channel(pair.gateway) as channel:
        stub = gateway_pb2_grpc.InferenceServiceStub(channel)
        warming = [
            stub.GenerateStream(_request(seed, adapter=warm), timeout=60) for seed in range(STREAMS)
        ]
        assert all(list(stream) for stream in warming)  # both workers have it then
        before = len(pair.events)
        pair.kill("adapter_store")

        assert list(stub.GenerateStream(_request(1), timeout=60))
        assert list(stub.GenerateStream(_request(1, adapter=warm), timeout=60))

        pair.wait_for(lambda event: event.get("event") == "listening", 30, after=before)
        assert _eventually(lambda: list(stub.GenerateStream(_request(1, adapter=cold), timeout=60)))


def test_a_killed_gateway_comes_back_and_its_old_requests_are_ended(pair: Suite) -> None:
    before = len(pair.events)
    with grpc.insecure_channel(pair.gateway) as channel:
        stub = gateway_pb2_grpc.InferenceServiceStub(channel)
        stream = stub.GenerateStream(_request(1), timeout=60)
        next(stream)
        pair.kill("gateway")
        with pytest.raises(grpc.RpcError) as raised:
            list(stream)
    assert raised.value.code() == grpc.StatusCode.UNAVAILABLE

    pair.wait_for(lambda event: event.get("event") == "listening", 30, after=before)
    _wait_until_served(pair)


def _wait_until_served(suite: Suite) -> None:
    """Both workers are attached again and answer."""
    with grpc.insecure_channel(suite.gateway) as channel:
        stub = gateway_pb2_grpc.InferenceServiceStub(channel)
        assert _eventually(lambda: list(stub.GenerateStream(_request(1), timeout=60)))


def _eventually(call: Callable[[], list[Any]], *, timeout_s: float = 30.0) -> list[Any]:
    """Repeat while the answer is UNAVAILABLE, as clients are told to."""
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            details = RpcError.from_rpc(error)  # type: ignore[arg-type]
            if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > end_s:
                raise AssertionError(details.reason if details else error) from error
            time.sleep(0.1)
