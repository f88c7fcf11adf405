"""Mixed requests through the whole suite: gRPC in, tokens out, against the bare engine.

Closed loop with 32 requests in flight on either side: a client of the gateway here, a loop around
`step` there, in turns. Both compute the same prompts with the same adapters on the same model with
the tier that a worker chooses. Client, gateway, scheduler and worker share the engine's cores.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from bench.engine import models, tables
from bench.engine.measures import OUTPUT_TOKENS, Measure, median
from bench.engine.models import Subject
from bench.engine.systems import MAX_REQUESTS, ours
from bench.peers.lines import PeerError
from bench.report import Report, Row, Target
from bench.suite import Suite, running_suite
from calumma.common.v1 import common_pb2
from calumma.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.common.base_model import BaseModelError

SHARE_MIN: Final = 0.85
_PART_S_MAX: Final = 75.0
_CALL_S_MAX: Final = 120.0
_BARE_S_MAX: Final = 240.0


def run(*, quick: bool) -> Report:
    """Both models, one after the other."""
    turns, requests = (1, 64) if quick else (5, 96)
    began_s = time.monotonic()
    results: list[Through] = []
    absent: list[tuple[str, str, str]] = []
    for number, find in enumerate((models.small, models.smol), start=1):
        result = Through(find.__name__)
        results.append(result)  # if it stays empty its target is missed
        end_s = began_s + number * _PART_S_MAX
        try:
            _alternate(result, find(), turns=turns, requests=requests, end_s=end_s)
        except (BaseModelError, PeerError, TimeoutError, grpc.RpcError) as error:
            absent.append((result.subject, "suite", str(error)))
            print(f"{result.subject}: {error}", flush=True)
    return Report([*_rows(results), *tables.absent_rows(absent)], _targets(results))


@dataclass(slots=True)
class Through:
    """Output tokens per second of either, turn by turn. `engine`: what computes."""

    subject: str
    engine: str = ""
    suite_tokens_per_s: list[float] = field(default_factory=list[float])
    bare_tokens_per_s: list[float] = field(default_factory=list[float])

    @property
    def share(self) -> float:
        """Median over turns."""
        pairs = zip(self.suite_tokens_per_s, self.bare_tokens_per_s, strict=True)
        return median(suite / bare for suite, bare in pairs)


def _alternate(
    found: Through, subject: Subject, *, turns: int, requests: int, end_s: float
) -> None:
    """No turn but the first begins after `end_s` (monotonic clock).

    Raises TimeoutError, PeerError and grpc.RpcError; what was found until then stays.
    """
    measure = Measure("waves", requests, mixed=True)
    names = [path.name for path in subject.adapters]
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        options = ["--home", home, "--model", str(subject.folder)]
        options += ["--adapters", str(subject.adapters[0].parent)]
        bare = ours("auto").start(subject)
        stack.callback(bare.close)
        found.engine = bare.ask({"kind": "describe"}, timeout_s=_BARE_S_MAX)["description"]
        suite = stack.enter_context(running_suite(*options))
        for turn in range(-1, turns):  # the first one warms up
            if turn > 0 and time.monotonic() > end_s:
                return
            # Prompts of its own, because the suite keeps the contexts of earlier ones.
            command = measure.command(subject, output_tokens=OUTPUT_TOKENS, seed=turn + 1)
            command |= {"kind": "waves", "in_flight": MAX_REQUESTS}
            bare_tokens_per_s = bare.ask(command, timeout_s=_BARE_S_MAX)["tokens_per_s"]
            suite_tokens_per_s = _suite_turn(suite, command, names)
            if turn < 0:
                continue
            found.bare_tokens_per_s.append(bare_tokens_per_s)
            found.suite_tokens_per_s.append(suite_tokens_per_s)
            print(
                f"{turn} {subject.name:5} suite {suite_tokens_per_s:8.1f} tok/s,"
                f" bare engine {bare_tokens_per_s:8.1f}, load {os.getloadavg()[0]:.2f}",
                flush=True,
            )


def _rows(results: Sequence[Through]) -> list[Row]:
    """Both, with least and greatest."""
    return [
        {
            "through_the_suite": one.subject,
            "engine": one.engine,
            "turns": len(one.suite_tokens_per_s),
            "suite_tokens_per_s": median(one.suite_tokens_per_s),
            "suite_least": min(one.suite_tokens_per_s),
            "suite_greatest": max(one.suite_tokens_per_s),
            "bare_tokens_per_s": median(one.bare_tokens_per_s),
            "bare_least": min(one.bare_tokens_per_s),
            "bare_greatest": max(one.bare_tokens_per_s),
            "share": one.share,
        }
        for one in results
        if one.suite_tokens_per_s
    ]


def _targets(results: Sequence[Through]) -> list[Target]:
    """What is left of the bare engine's throughput."""
    return [
        Target(f"{one.subject}, mixed 32: suite over bare engine", SHARE_MIN, one.share, "x")
        for one in results
    ]


def _suite_turn(suite: Suite, command: dict[str, Any], names: list[str]) -> float:
    pairs = zip(command["prompts"], command["adapters"], strict=True)
    requests = [_request(prompt, adapter=str(names[index])) for prompt, index in pairs]
    return asyncio.run(_ask_all(suite.gateway, requests))


def _request(prompt: Sequence[int], *, adapter: str) -> gateway_pb2.GenerateStreamRequest:
    return gateway_pb2.GenerateStreamRequest(
        token_ids=gateway_pb2.TokenIds(ids=prompt),
        adapter=adapter,
        stopping=common_pb2.StopConditions(max_tokens=OUTPUT_TOKENS, ignore_eos=True),
    )


async def _ask_all(address: str, requests: Sequence[gateway_pb2.GenerateStreamRequest]) -> float:
    """Output tokens per second over all of them."""
    slots = asyncio.Semaphore(MAX_REQUESTS)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = gateway_pb2_grpc.InferenceServiceStub(channel)

        async def one(request: gateway_pb2.GenerateStreamRequest) -> int:
            tokens = 0
            async with slots:
                async for response in stub.GenerateStream(request, timeout=_CALL_S_MAX):
                    tokens += len(response.chunk.token_ids)
            return tokens

        began_s = time.perf_counter()
        ends = await asyncio.gather(*map(one, requests), return_exceptions=True)
        wall_s = time.perf_counter() - began_s
    if failure := next((end for end in ends if isinstance(end, BaseException)), None):
        raise failure
    counts = [end for end in ends if isinstance(end, int)]
    assert counts == [OUTPUT_TOKENS] * len(requests), counts
    return sum(counts) / wall_s
