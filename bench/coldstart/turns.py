"""Requests for adapters of every tier, by turns, at one worker.

A round is five or six requests: a cold adapter for a prompt of one token, which is what a load
takes when nothing else is computed; that adapter again; another cold one with a prompt; that one
again; and one that has left device memory for host memory. Rounds are short, so what else the
machine does falls on all kinds, and what is compared is compared within a round.
"""

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bench.coldstart.client import Answer, Client
from bench.coldstart.cpu import all_cpu_s
from bench.suite import Event, LoggedProcess

PROMPT_TOKENS: Final = 400  # on two cores they take about as long as a load over a link
# Of so many rounds ago an adapter has left device memory, and is still in host memory.
_HOST_HIT_AGE: Final = 2
_LOG_S_MAX: Final = 30.0


@dataclass(frozen=True, slots=True)
class Published:
    """An adapter in the store."""

    name: str
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """A worker to ask: its log, and whose CPU time its loads take."""

    client: Client
    log: LoggedProcess
    pids: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that had to load its adapter, or not, and what the worker logged of the load."""

    answer: Answer
    load: Event | None
    cpu_s: Mapping[str, float]  # by process

    @property
    def load_s(self) -> float:
        return sum(self.stage(name) for name in ("wait_s", "download_s", "engine_s"))

    def stage(self, name: str) -> float:
        return 0.0 if self.load is None else float(self.load[name])


@dataclass(frozen=True, slots=True)
class Round:
    """`short` requests have one prompt token. `host` is absent in the first rounds."""

    short_cold: Seen
    short_warm: Seen
    cold: Seen
    warm: Seen
    host: Seen | None

    @property
    def hidden(self) -> float:
        """The share of a load that a prompt does not wait for, because it is computed meanwhile."""
        late_s = self.cold.answer.ttft_s - self.warm.answer.ttft_s
        return 1.0 - late_s / self.short_cold.load_s

    @property
    def load_cpu_s(self) -> dict[str, float]:
        """CPU time of one load, by process: what a cold short request takes over a warm one."""
        cold, warm = self.short_cold.cpu_s, self.short_warm.cpu_s
        return {name: cold[name] - warm[name] for name in cold}


async def ask_in_turns(place: Place, adapters: Sequence[Published]) -> list[Round]:
    """`adapters`: of which the worker has none, two for each round."""
    rounds: list[Round] = []
    prompted = adapters[1::2]
    for index, adapter in enumerate(prompted):
        short_cold = await ask(place, adapters[2 * index], prompt_tokens=1)
        short_warm = await ask(place, adapters[2 * index], prompt_tokens=1)
        cold = await ask(place, adapter)
        warm = await ask(place, adapter)
        host = None
        if index >= _HOST_HIT_AGE:
            host = await ask(place, prompted[index - _HOST_HIT_AGE])
        rounds.append(Round(short_cold, short_warm, cold, warm, host))
        tiers = [one.answer.tier for one in (short_cold, short_warm, cold, warm)]
        assert tiers == ["store", "device", "store", "device"], tiers
    return rounds


async def ask(place: Place, adapter: Published, *, prompt_tokens: int = PROMPT_TOKENS) -> Seen:
    """One request, and its load if there was one."""
    begin = len(place.log.events)
    before_s = all_cpu_s(place.pids)
    answer = await place.client.ask(adapter.name, prompt_tokens=prompt_tokens, max_tokens=2)
    used_s = {name: at_s - before_s[name] for name, at_s in all_cpu_s(place.pids).items()}
    if answer.tier not in {"store", "host"}:
        return Seen(answer, None, used_s)

    def is_load(event: Event) -> bool:
        return event.get("event") == "adapter_loaded" and event.get("digest") == adapter.digest

    load = await asyncio.to_thread(place.log.wait_for, is_load, _LOG_S_MAX, after=begin)
    return Seen(answer, load, used_s)


def kinds(rounds: Sequence[Round]) -> dict[str, list[Seen]]:
    """The requests by what they were."""
    return {
        "store, 1-token prompt": [one.short_cold for one in rounds],
        "device, 1-token prompt": [one.short_warm for one in rounds],
        "store": [one.cold for one in rounds],
        "device": [one.warm for one in rounds],
        "host": [one.host for one in rounds if one.host is not None],
    }


def median_stage_s(seen: Sequence[Seen], name: str) -> float:
    """Of the stage of the load that the log calls so; 0 where there was no load."""
    return statistics.median(one.stage(name) for one in seen)


def median_ttft_s(seen: Sequence[Seen]) -> float:
    """As the client saw it."""
    return statistics.median(one.answer.ttft_s for one in seen)
