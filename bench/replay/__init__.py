"""One trace twice: live, through the four services in real time, and simulated.

The services run with simulated engines, which take the time of real hardware and make up tokens;
everything else is the real thing, gRPC and processes included. Then two questions are answered. Do
the decisions that the scheduler recorded come out of a fresh core again, all of them? And does the
simulator, with the same core objects, the same trace, hardware and predictor, tell the times to
first token that were seen live?
"""

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from bench.replay.adapters import write_adapters
from bench.replay.lengths import LengthSeeds
from bench.replay.live import LiveOutcome, play, possible, warm_up
from bench.report import Report, Row, Target
from bench.sim import Hardware, Learned, RequestRecord, Scenario, simulate
from bench.suite import NO_PREFIX_CACHE, Suite, running_suite
from bench.workload import AdapterPool, Poisson, Trace, Workload, build
from services.common.base_model import DEFAULT_MODEL, locate
from services.core.systems import SYSTEMS
from services.scheduler.journal import replay
from services.worker.engine.profiles import PROFILES

SYSTEM: Final = "adaptive"
PROFILE: Final = "a40-llama-7b"
MAX_REQUESTS: Final = 256  # batch slots: memory is what limits
ADAPTERS: Final = 20
# Lengths and rate that keep the card busy, with queues that come and go: at a load where they only
# grow, the last digit of a step's time decides, and a comparison says nothing.
LENGTH_SCALE: Final = 0.25
RATE_RPS: Final = 6.0
DIFFERENCE_MAX: Final = 10.0  # percent
PERCENTILES: Final = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class _Decisions:
    """What a fresh core made of the journal."""

    events: int
    decisions: int
    different: int  # events whose decisions were others, or were not recorded


def run(*, quick: bool) -> Report:
    """Play, decide again, simulate, compare."""
    seeds = LengthSeeds()
    wanted = _trace(28.0 if quick else 150.0)
    with tempfile.TemporaryDirectory(prefix="calumma-replay-") as name:
        folder = Path(name)
        journal = folder / "journal.jsonl"
        trace, live = _live(wanted, seeds, folder, journal)
        decided = _decide_again(journal)
    times_s = {
        "live": [(outcome.ttft_s, outcome.e2e_s) for outcome in live],
        "simulated": [(record.ttft_s, record.e2e_s) for record in _simulated(trace)],
    }
    rows = [_row(world, trace, found) for world, found in times_s.items()]
    rows[0] |= {"late_ms_max": 1000 * max(outcome.late_s for outcome in live)}
    rows[0] |= {"events": decided.events, "decisions": decided.decisions}
    return Report(rows, [*_targets(live, trace, decided), *_agreement(rows)])


def _trace(duration_s: float) -> Trace:
    workload = Workload(
        scale=LENGTH_SCALE,
        arrivals=Poisson(RATE_RPS),
        duration_s=duration_s,
        pool=AdapterPool(count=ADAPTERS),
    )
    return build(workload)


def _live(
    wanted: Trace, seeds: LengthSeeds, folder: Path, journal: Path
) -> tuple[Trace, list[LiveOutcome]]:
    names = write_adapters(folder / "adapters", [adapter.rank for adapter in wanted.adapters])
    model = locate(DEFAULT_MODEL)
    options = ("--engine", "simulated", "--model", str(model), "--home", str(folder / "home"))
    env = {
        **NO_PREFIX_CACHE,  # the simulated requests have sizes, but no tokens
        "CALUMMA_SCHEDULER_RECORD": str(journal),
        "CALUMMA_WORKER_PROFILE": PROFILE,
        "CALUMMA_WORKER_MAX_REQUESTS": str(MAX_REQUESTS),
    }
    more = ("--system", SYSTEM, "--adapters", str(folder / "adapters"))
    with running_suite(*options, *more, env=env) as suite:
        return asyncio.run(_play(suite, wanted, seeds, names))


async def _play(
    suite: Suite, wanted: Trace, seeds: LengthSeeds, names: Sequence[str]
) -> tuple[Trace, list[LiveOutcome]]:
    adapters = await warm_up(suite.gateway, names)
    trace = possible(wanted, adapters, seeds)
    by_digest = dict(zip((adapter.digest for adapter in adapters), names, strict=True))
    return trace, await play(suite.gateway, trace, by_digest, seeds)


def _simulated(trace: Trace) -> Sequence[RequestRecord]:
    """The same on one simulated worker. The live engine, too, uses layers as they come."""
    hardware = Hardware(PROFILES[PROFILE], max_requests=MAX_REQUESTS, overlaps_prefill=True)
    scenario = Scenario(SYSTEMS[SYSTEM], hardware, trace, predictor=Learned())
    return simulate(scenario).requests


def _decide_again(journal: Path) -> _Decisions:
    events = decisions = different = 0
    for step in replay(journal):
        events += 1
        decisions += len(step.decisions)
        different += step.recorded is None or not step.is_same
    return _Decisions(events, decisions, different)


def _row(world: str, trace: Trace, times_s: Sequence[tuple[float, float]]) -> Row:
    ttft_s, e2e_s = np.array(times_s).T
    row: Row = {"world": world, "requests": len(times_s), "rate_rps": trace.rate_rps}
    for percentile in PERCENTILES:
        row[f"ttft_p{percentile}_s"] = float(np.percentile(ttft_s, percentile))
    return {**row, "e2e_p50_s": float(np.median(e2e_s))}


def _targets(live: Sequence[LiveOutcome], trace: Trace, decided: _Decisions) -> Sequence[Target]:
    exact = sum(
        outcome.output_tokens + 1 == arrival.output_tokens
        for outcome, arrival in zip(live, trace.arrivals, strict=True)
    )
    different = Target(
        f"events of {decided.events} that a fresh core decides otherwise",
        0,
        decided.different,
        "events",
        is_upper=True,
    )
    share = 100 * exact / len(live)
    return [different, Target("answers as long as their trace says", 100, share, "%")]


def _agreement(rows: Sequence[Row]) -> Sequence[Target]:
    live, simulated = rows
    targets: list[Target] = []
    for percentile in PERCENTILES:
        column = f"ttft_p{percentile}_s"
        difference = 100 * abs(live[column] / simulated[column] - 1)
        name = f"TTFT p{percentile}, live against simulated"
        targets.append(Target(name, DIFFERENCE_MAX, difference, "%", is_upper=True))
    return targets
