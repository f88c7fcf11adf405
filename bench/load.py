"""Drives a running suite: many concurrent streams from one client, and what each of them saw."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc

CALL_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Job:
    """One request. `adapter` "" is the base model; `exact_tokens` makes it run past its end."""

    prompt: str
    adapter: str
    max_tokens: int
    exact_tokens: bool = False
    system: str = ""

    @property
    def messages(self) -> list[gateway_pb2.ChatMessage]:
        """The conversation that is sent."""
        turns = [("system", self.system)] if self.system else []
        return [
            gateway_pb2.ChatMessage(role=role, content=content)
            for role, content in [*turns, ("user", self.prompt)]
        ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the client saw of one request."""

    text: str
    output_tokens: int
    ttft_s: float
    duration_s: float


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All outcomes, in the order of the jobs, and the time from first send to last token."""

    outcomes: Sequence[Outcome]
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second over the whole run."""
        return sum(outcome.output_tokens for outcome in self.outcomes) / self.wall_s


async def run_jobs(address: str, jobs: Sequence[Job], *, concurrency: int) -> LoadResult:
    """Send all jobs, at most `concurrency` at once. A failed call raises."""
    slots = asyncio.Semaphore(concurrency)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = gateway_pb2_grpc.InferenceServiceStub(channel)

        async def one(job: Job) -> Outcome:
            async with slots:
                return await _stream(stub, job)

        started_s = time.perf_counter()
        outcomes = await asyncio.gather(*(one(job) for job in jobs))
        return LoadResult(outcomes, time.perf_counter() - started_s)


async def _stream(stub: "gateway_pb2_grpc.InferenceServiceAsyncStub", job: Job) -> Outcome:
    request = gateway_pb2.GenerateStreamRequest(
        chat=gateway_pb2.ChatMessages(messages=job.messages),
        adapter=job.adapter,
        stopping=common_pb2.StopConditions(max_tokens=job.max_tokens, ignore_eos=job.exact_tokens),
    )
    started_s = time.perf_counter()
    first_s: float | None = None
    text: list[str] = []
    output_tokens = 0
    async for response in stub.GenerateStream(request, timeout=CALL_TIMEOUT_S):
        match response.WhichOneof("event"):
            case "chunk":
                if first_s is None and response.chunk.token_ids:
                    first_s = time.perf_counter()
                text.append(response.chunk.text)
            case "finished":
                output_tokens = response.finished.usage.output_tokens
            case _:
                pass
    ended_s = time.perf_counter()
    return Outcome(
        "".join(text), output_tokens, (first_s or ended_s) - started_s, ended_s - started_s
    )
