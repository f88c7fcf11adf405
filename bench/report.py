"""What every benchmark returns and how it is written: rows, targets, and where it was measured."""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """One claim, the value that was measured, and whether it holds."""

    name: str
    target: float
    value: float
    unit: str
    is_upper: bool = False  # the value must not be above the target; otherwise not below it

    @property
    def holds(self) -> bool:
        """NaN holds nowhere."""
        return self.value <= self.target if self.is_upper else self.value >= self.target


@dataclass(frozen=True, slots=True)
class Report:
    """The result of one benchmark run."""

    rows: Sequence[Row]
    targets: Sequence[Target]
    figures: Mapping[str, bytes] = field(default_factory=dict[str, bytes])  # by file name


def write(report: Report, path: Path | None) -> None:
    """Print the report for people and, if `path` is given, as JSON.

    Figures go to a folder beside that file, named as it is without its suffix.
    """
    for _, table in groupby(report.rows, key=tuple):  # rows of one table have the same columns
        _print_rows(list(table))
        print()
    for target in report.targets:
        verdict = "holds" if target.holds else "MISSED"
        print(
            f"{verdict}: {target.name} = {target.value:.3g} {target.unit}"
            f" (target {'at most ' if target.is_upper else ''}{target.target:g})"
        )
    if path is not None:
        path.write_text(json.dumps(_document(report), indent=1, allow_nan=False) + "\n")
        for name, content in report.figures.items():
            folder = path.with_suffix("")
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def _document(report: Report) -> dict[str, Any]:
    return {
        "commit": _commit(),
        "machine": _machine(),
        "command": _command(),
        "rows": [_finite(row) for row in report.rows],
        "targets": [_finite({**asdict(one), "holds": one.holds}) for one in report.targets],
    }


def _finite(row: Row) -> Row:
    """JSON has no infinity: what never came is null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _command() -> str:
    """What was run, but for where its report went."""
    arguments = iter(sys.argv[1:])
    kept = [word for word in arguments if word != "--json" or not next(arguments, "")]
    return " ".join([Path(sys.executable).name, "-m", "bench", *kept])


def _print_rows(rows: Sequence[Row]) -> None:
    columns = list(rows[0])
    cells = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [
        max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)
    ]
    for line in [columns, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")


def _machine() -> dict[str, Any]:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }
