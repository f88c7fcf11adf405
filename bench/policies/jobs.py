"""What a benchmark of many runs consists of: sections, their jobs, and the processes that do them.

A section names its jobs, all sections' jobs run in one pool of processes, longest first, and each
section then makes rows, targets and figures of its own results, in an order that no timing changes.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.report import Row, Target

Key = tuple[Any, ...]
Results = Mapping[Key, Any]
Figures = dict[str, bytes]  # PNG by file name


class Job(Protocol):
    """A frozen value that another process can run."""

    @property
    def cost_s(self) -> float:
        """About how many CPU seconds it takes: for the order and the progress bar only."""
        ...

    def run(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Findings:
    """What a section comes to."""

    rows: Sequence[Row]
    targets: Sequence[Target] = ()
    figures: Figures = field(default_factory=Figures)


@dataclass(frozen=True, slots=True)
class Section:
    """Jobs by key, and what is made of their results by the same keys."""

    name: str
    jobs: Mapping[Key, Job]
    findings: Callable[[Results], Findings]


def run_sections(sections: Sequence[Section]) -> list[Findings]:
    """All jobs on all processors, then each section's findings, in order."""
    jobs = {(s.name, key): job for s in sections for key, job in s.jobs.items()}
    done = _run_jobs(jobs)
    return [s.findings({key: done[s.name, key] for key in s.jobs}) for s in sections]


_START: Final = "spawn"  # no threads of this process are copied into the others


def _run_jobs(jobs: Mapping[Key, Job]) -> dict[Key, Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    results: dict[Key, Any] = {}
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        ProcessPoolExecutor(os.cpu_count(), mp_context=get_context(_START)) as pool,
    ):
        bar = progress.add_task("simulating", total=sum(job.cost_s for job in jobs.values()))
        longest_first = sorted(jobs, key=lambda key: -jobs[key].cost_s)
        futures: dict[Future[Any], Key] = {pool.submit(jobs[k].run): k for k in longest_first}
        for future in as_completed(futures):
            key = futures[future]
            results[key] = future.result()
            progress.advance(bar, jobs[key].cost_s)
    return results
