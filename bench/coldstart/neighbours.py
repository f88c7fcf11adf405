"""What cold loads do to streams that have nothing to do with them.

Streams of the base model run on and on. Beside them requests of one token come at a fixed pace,
either for two adapters in turns that are in device memory, or for adapters of which each has to be
downloaded again. So both have the same steps to compute, and differ by the loads alone.
"""

import asyncio
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from bench.coldstart.client import Client
from bench.report import Row

STREAMS: Final = 4
_STREAM_TOKENS: Final = 64
_PROMPT_TOKENS: Final = 16
_PACE_S: Final = 0.3
_WARM: Final = 2  # adapters in device memory, named in turns
_REQUESTS_PER_LOAD: Final = 3  # at most: the worker may keep some of the adapters


@dataclass(frozen=True, slots=True)
class Turn:
    """Times between tokens of the streams, and what ran beside them."""

    gaps_s: Sequence[float]
    requests: int
    cold: int  # requests beside the streams whose adapter came from the store

    @property
    def p99_s(self) -> float:
        return statistics.quantiles(self.gaps_s, n=100, method="inclusive")[98]


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The turns of each kind."""

    warm: Sequence[Turn]
    cold: Sequence[Turn]

    @property
    def ratio(self) -> float:
        """Median p99 with cold loads over that with warm requests."""
        return _p99_s(self.cold) / _p99_s(self.warm)

    def rows(self) -> list[Row]:
        return [
            {
                "beside_streams": kind,
                "turns": len(turns),
                "requests": sum(turn.requests for turn in turns),
                "cold_loads": sum(turn.cold for turn in turns),
                "gap_p50_s": statistics.median(gap for turn in turns for gap in turn.gaps_s),
                "gap_p99_s": _p99_s(turns),
                "gap_p99_min_s": min(turn.p99_s for turn in turns),
                "gap_p99_max_s": max(turn.p99_s for turn in turns),
            }
            for kind, turns in (("warm requests", self.warm), ("cold loads", self.cold))
        ]


async def watch_neighbours(
    client: Client, names: Sequence[str], *, loads: int, turns: int
) -> Neighbours:
    """Both kinds in turns. `names`: more adapters than the worker can hold."""
    warm: list[Turn] = []
    cold: list[Turn] = []
    cycle = itertools.cycle(names)
    for _ in range(turns):
        cold.append(await _turn(client, cycle, cold=loads, requests_max=_REQUESTS_PER_LOAD * loads))
        for name in names[:_WARM]:
            await client.ask(name, prompt_tokens=1, max_tokens=1)
        warm.append(
            await _turn(
                client, itertools.cycle(names[:_WARM]), cold=None, requests_max=cold[-1].requests
            )
        )
    return Neighbours(warm, cold)


async def _turn(
    client: Client, names: Iterator[str], *, cold: int | None, requests_max: int
) -> Turn:
    """Ask at the pace until so many requests were cold, or `requests_max` were sent."""
    stop = asyncio.Event()
    streams = [asyncio.create_task(_stream(client, stop)) for _ in range(STREAMS)]
    asked: list[asyncio.Task[str]] = []
    while len(asked) < requests_max and (cold is None or _cold(asked) < cold):
        asked.append(asyncio.create_task(_tier(client, next(names))))
        await asyncio.sleep(_PACE_S)
    await asyncio.wait(asked)
    stop.set()
    gaps_s = [gap for gaps in await asyncio.gather(*streams) for gap in gaps]
    return Turn(gaps_s, len(asked), _cold(asked))


def _cold(asked: Sequence[asyncio.Task[str]]) -> int:
    return sum(task.done() and task.result() == "store" for task in asked)


async def _tier(client: Client, name: str) -> str:
    return (await client.ask(name, prompt_tokens=1, max_tokens=1)).tier


async def _stream(client: Client, stop: asyncio.Event) -> list[float]:
    """Times between the tokens of one stream after the other, until `stop`."""
    gaps_s: list[float] = []
    while not stop.is_set():
        answer = await client.ask("", prompt_tokens=_PROMPT_TOKENS, max_tokens=_STREAM_TOKENS)
        gaps_s += [later - earlier for earlier, later in itertools.pairwise(answer.token_times_s)]
    return gaps_s


def _p99_s(turns: Sequence[Turn]) -> float:
    return statistics.median(turn.p99_s for turn in turns)
