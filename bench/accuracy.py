"""Does each example adapter do its own job through the whole suite, and can the base not?

Held-out inputs of every machine-checkable task go through gateway, scheduler and worker, all tasks
mixed in the same batches: once with the task's adapter, once with the base model.
"""

import asyncio
from typing import Final

from bench.load import Job, LoadResult, run_jobs
from bench.report import Report, Row, Target
from bench.suite import running_suite
from examples.adapter_tasks import TASKS, Task
from examples.jobs.words import Example

ADAPTER_SHARE_MIN: Final = 0.90
BASE_SHARE_MAX: Final = 0.30
TASKS_MIN: Final = 5
_CONCURRENCY: Final = 32
_SEED: Final = 20_000  # not a seed that training used


def run(*, quick: bool) -> Report:
    """Score every checkable task."""
    per_task = 5 if quick else 50
    tasks = [task for task in TASKS.values() if task.is_checkable]
    cases = [
        (task, example)
        for task in tasks
        for example in task.make_examples("heldout", per_task, _SEED)
    ]
    with running_suite() as suite:
        adapted = asyncio.run(_answers(suite.gateway, cases, use_adapter=True))
        base = asyncio.run(_answers(suite.gateway, cases, use_adapter=False))
    rows = [
        {
            "task": task.name,
            "rank": task.rank,
            "cases": per_task,
            "adapter": _share(task, cases, adapted),
            "base": _share(task, cases, base),
        }
        for task in tasks
    ]
    return Report(rows, [Target("tasks that the adapter does and the base cannot", TASKS_MIN,
                                sum(map(_shows, rows)), "tasks")])  # fmt: skip


async def _answers(
    gateway: str, cases: list[tuple[Task, Example]], *, use_adapter: bool
) -> LoadResult:
    jobs = [
        Job(example.prompt, task.name if use_adapter else "", task.max_tokens)
        for task, example in cases
    ]
    return await run_jobs(gateway, jobs, concurrency=_CONCURRENCY)


def _share(task: Task, cases: list[tuple[Task, Example]], result: LoadResult) -> float:
    verdicts = [
        bool(task.check(outcome.text, example))
        for (owner, example), outcome in zip(cases, result.outcomes, strict=True)
        if owner is task
    ]
    return sum(verdicts) / len(verdicts)


def _shows(row: Row) -> bool:
    return bool(row["adapter"] >= ADAPTER_SHARE_MIN and row["base"] < BASE_SHARE_MAX)
