"""Does each example adapter do its own job through the whole suite, and can the base not?

Held-out inputs of every machine-checkable task go through gateway, scheduler and worker, all tasks
mixed in the same batches: with the task's adapter, with the base model, and with the base model
that is told its job by a system message.
"""

import asyncio
from collections.abc import Callable
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
    ways: dict[str, Callable[[Task, Example], Job]] = {
        "adapter": lambda task, example: Job(example.prompt, task.name, task.max_tokens),
        "base": lambda task, example: Job(example.prompt, "", task.max_tokens),
        "base_told": lambda task, example: Job(
            example.prompt, "", task.max_tokens, system=task.description
        ),
    }
    with running_suite() as suite:
        answers = {
            way: asyncio.run(
                run_jobs(suite.gateway, [job(*case) for case in cases], concurrency=_CONCURRENCY)
            )
            for way, job in ways.items()
        }
    rows = [
        {
            "task": task.name,
            "rank": task.rank,
            "cases": per_task,
            **{way: _share(task, cases, result) for way, result in answers.items()},
        }
        for task in tasks
    ]
    shown = sum(_shows(row) for row in rows)
    target = Target("tasks that the adapter does and the base cannot", TASKS_MIN, shown, "tasks")
    return Report(rows, [target])


def _share(task: Task, cases: list[tuple[Task, Example]], result: LoadResult) -> float:
    verdicts = [
        bool(task.check(outcome.text, example))
        for (owner, example), outcome in zip(cases, result.outcomes, strict=True)
        if owner is task
    ]
    return sum(verdicts) / len(verdicts)


def _shows(row: Row) -> bool:
    base = max(row["base"], row["base_told"])
    return bool(row["adapter"] >= ADAPTER_SHARE_MIN and base < BASE_SHARE_MAX)
