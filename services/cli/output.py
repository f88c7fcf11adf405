"""What a terminal or a script gets to see: text on stdout, everything about it on stderr.

With `--json` stdout carries JSON only, one object per line; a failure is
`{"error": {"message", "code", "reason", "field", "hint"}}` there and exit code 1.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from services.common.base_model import LINEARS

stdout: Final = Console(highlight=False)
stderr: Final = Console(stderr=True, highlight=False)
# Escape sequences in text from elsewhere would drive the terminal. Newline and tab are harmless.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MEBIBYTE = 2**20


@dataclasses.dataclass(eq=False)  # an exception is told apart by identity
class CommandError(Exception):
    """A command failed; everything a person needs to go on."""

    message: str
    code: str = ""  # gRPC status, for example "NOT_FOUND"
    reason: str = ""  # stable, for example "ADAPTER_NOT_FOUND"
    field: str = ""  # of the request, for example "sampling.temperature"
    hint: str = ""

    def __str__(self) -> str:
        return self.message


@dataclasses.dataclass(frozen=True, slots=True)
class Addresses:
    """Where the services listen, host:port each."""

    gateway: str
    scheduler: str
    adapter_store: str
    worker: str


@dataclasses.dataclass(slots=True)
class Session:
    """What this run of the command line was told for all commands."""

    addresses: Addresses
    as_json: bool = False


def session_of(ctx: typer.Context) -> Session:
    assert isinstance(ctx.obj, Session)
    return ctx.obj


def _remember_json(ctx: typer.Context, value: bool) -> bool:  # noqa: FBT001 - Typer calls it
    if isinstance(ctx.obj, Session):  # absent while a shell completes
        ctx.obj.as_json = value
    return value


JsonFlag = Annotated[
    bool, typer.Option("--json", help="JSON on stdout, for scripts.", callback=_remember_json)
]


def print_json(value: Any) -> None:
    """One line of JSON. Dataclasses become objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    typer.echo(json.dumps(value, ensure_ascii=False))


def show_error(error: CommandError, *, as_json: bool = False) -> None:
    if as_json:
        fields = dataclasses.asdict(error)
        print_json({"error": {key: value or None for key, value in fields.items()}})
        return
    line = Text("error: ", style="bold red")
    line.append(printable(error.message), style="not bold default")
    stderr.print(line, soft_wrap=True)
    for label, value in (("reason", error.reason or error.code), ("field", error.field)):
        if value:
            stderr.print(Text(f"  {label}: {printable(value)}", style="dim"), soft_wrap=True)
    if error.hint:
        stderr.print(Text(f"  hint: {printable(error.hint)}", style="cyan"), soft_wrap=True)


def printable(text: str) -> str:
    """Text without what could drive a terminal."""
    return _CONTROL_CHARACTERS.sub("", text)


def note(text: str) -> None:
    """A dim line beside the answer, on stderr."""
    stderr.print(Text(printable(text), style="dim"), soft_wrap=True)


@contextmanager
def byte_progress(label: str, *, console: Console = stderr) -> Generator["ByteProgress"]:
    """A bar in bytes; nothing where the console is no terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    silent = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=silent) as progress:
        yield ByteProgress(progress, label)


class ByteProgress:
    """One bar that grows by `advance`, whose total may grow with each `expect`."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=0)
        self._total_bytes = 0

    def expect(self, size_bytes: int) -> None:
        self._total_bytes += size_bytes
        self._progress.update(self._task, total=self._total_bytes)

    def describe(self, label: str) -> None:
        self._progress.update(self._task, description=label)

    def advance(self, size_bytes: int) -> None:
        self._progress.advance(self._task, size_bytes)


def table(*columns: str) -> Table:
    """An empty table whose first column, the name of its rows, is never cut."""
    rows = Table(box=SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        rows.add_column(column, no_wrap=position == 0, overflow="fold")
    return rows


def size_text(size_bytes: int) -> str:
    if size_bytes >= 1024 * _MEBIBYTE:
        return f"{size_bytes / (1024 * _MEBIBYTE):.1f} GiB"
    return f"{size_bytes / _MEBIBYTE:.1f} MiB"


def modules_text(modules: Collection[str]) -> str:
    """Which linears an adapter changes, in the order of a layer: "q v", "all linears"."""
    if set(modules) == set(LINEARS):
        return "all linears"
    known = [module for module in LINEARS if module in modules]
    others = sorted(set(modules) - set(LINEARS))
    return " ".join(module.removesuffix("_proj") for module in (*known, *others))


def seconds_text(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def short_digest(digest: str) -> str:
    """`sha256:` and the first twelve digits: enough to tell adapters apart."""
    return digest[:19]


def age_text(created: str) -> str:
    """How long ago an RFC 3339 time was, in its largest unit."""
    if not created:
        return "-"
    age_s = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds())
    for unit, unit_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if age_s >= unit_s:
            return f"{age_s / unit_s:.0f} {unit} ago"
    return "just now"


def aliases_text(aliases: Mapping[str, int]) -> str:
    return ", ".join(f"{alias}→{version}" for alias, version in sorted(aliases.items()))
