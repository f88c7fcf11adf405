"""A client of the suite that notes when each token came."""

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc

from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc

CALL_TIMEOUT_S: Final = 600.0
_FIRST_TOKEN_ID: Final = 100
_TOKEN_IDS: Final = 1000
TIERS: Final = {
    common_pb2.ADAPTER_TIER_NONE: "none",
    common_pb2.ADAPTER_TIER_DEVICE: "device",
    common_pb2.ADAPTER_TIER_HOST: "host",
    common_pb2.ADAPTER_TIER_STORE: "store",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client saw of one request, and what the suite says of it."""

    tier: str
    ttft_s: float
    queue_s: float
    load_s: float
    prefill_s: float
    token_times_s: Sequence[float]


class Client:
    """One channel to a gateway."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = gateway_pb2_grpc.InferenceServiceStub(channel)

    async def ask(self, adapter: str, *, prompt_tokens: int, max_tokens: int) -> Answer:
        """One request of exactly so many tokens, streamed to its end."""
        ids = [_FIRST_TOKEN_ID + index % _TOKEN_IDS for index in range(prompt_tokens)]
        request = gateway_pb2.GenerateStreamRequest(
            token_ids=gateway_pb2.TokenIds(ids=ids),
            adapter=adapter,
            stopping=common_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        )
        started_s = time.perf_counter()
        times_s: list[float] = []
        timings = common_pb2.RequestTimings()
        async for response in self._stub.GenerateStream(request, timeout=CALL_TIMEOUT_S):
            now_s = time.perf_counter()
            match response.WhichOneof("event"):
                case "chunk":
                    times_s += [now_s] * len(response.chunk.token_ids)
                case "finished":
                    timings = response.finished.timings
                case _:
                    pass
        return Answer(
            tier=TIERS[timings.adapter_tier],
            ttft_s=times_s[0] - started_s,
            queue_s=timings.queue_s,
            load_s=timings.adapter_load_s,
            prefill_s=timings.prefill_s,
            token_times_s=times_s,
        )


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncGenerator[Client]:
    """A client of the gateway at this address."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield Client(channel)
