"""32 concurrent requests over 8 adapters and the base model, against transformers + PEFT.

The suite gets all 32 at once over gRPC and mixes them in its batches. The peer gets the same 32
at once and, as PEFT is used, runs one batch per adapter, one after the other; its mixed-batch mode
(`adapter_names`) is shown beside it. Both generate exactly the same number of tokens per request in
bf16 on the same cores, in turns; the figures are medians over the turns.
"""

import asyncio
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench.load import Job, run_jobs
from bench.peft_peer import PeftPeer
from bench.report import Report, Row, Target
from bench.suite import ADAPTERS_DIR, NO_PREFIX_CACHE, running_suite
from examples.adapter_tasks import TASKS
from services.common.base_model import DEFAULT_MODEL, locate

REQUESTS: Final = 32
ADAPTERS: Final = 8
RATIO_MIN: Final = 4.0
_Run = tuple[float, Sequence[float]]  # tokens per second, seconds to each first token


def run(*, quick: bool) -> Report:
    """Alternate the systems and compare their medians."""
    turns, max_tokens = (1, 32) if quick else (5, 64)
    jobs = _jobs(max_tokens)
    adapters = {name: ADAPTERS_DIR / name for name in {job.adapter for job in jobs} - {""}}
    runs: dict[str, list[_Run]] = {"suite": [], "peft_by_adapter": [], "peft_mixed": []}
    with running_suite(env=NO_PREFIX_CACHE) as suite:
        peer = PeftPeer(locate(DEFAULT_MODEL), adapters)
        try:
            _suite_turn(suite.gateway, jobs)  # warms caches on both sides
            peer.run("by_adapter", jobs[: ADAPTERS + 1])
            for _ in range(turns):
                runs["suite"].append(_suite_turn(suite.gateway, jobs))
                for mode in ("by_adapter", "mixed"):
                    if mode == "mixed" and quick:
                        continue
                    result = peer.run(mode, jobs)
                    runs[f"peft_{mode}"].append((result.tokens_per_s, result.ttft_s))
        finally:
            peer.close()
    rows = [_row(name, found) for name, found in runs.items() if found]
    ratio = rows[0]["tokens_per_s"] / rows[1]["tokens_per_s"]
    return Report(rows, [Target("tokens/s, suite over PEFT by adapter", RATIO_MIN, ratio, "x")])


def _jobs(max_tokens: int) -> list[Job]:
    names = [name for name in TASKS if Path(ADAPTERS_DIR / name).is_dir()][:ADAPTERS]
    targets = [*names, ""]
    chosen = [targets[i % len(targets)] for i in range(REQUESTS)]
    return [
        Job(_prompt(name or names[i % len(names)], i), name, max_tokens, exact_tokens=True)
        for i, name in enumerate(chosen)
    ]


def _prompt(task_name: str, index: int) -> str:
    task = TASKS[task_name]
    return task.make_examples("heldout", index + 1, seed=7)[index].prompt


def _suite_turn(gateway: str, jobs: Sequence[Job]) -> _Run:
    result = asyncio.run(run_jobs(gateway, jobs, concurrency=len(jobs)))
    return result.tokens_per_s, [outcome.ttft_s for outcome in result.outcomes]


def _row(name: str, runs: Sequence[_Run]) -> Row:
    speeds = [speed for speed, _ in runs]
    ttft_s = [value for _, values in runs for value in values]
    return {
        "system": name,
        "turns": len(runs),
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_min": min(speeds),
        "tokens_per_s_max": max(speeds),
        "ttft_p50_s": statistics.median(ttft_s),
        "ttft_p99_s": statistics.quantiles(ttft_s, n=100, method="inclusive")[98],
    }
