"""How `calumma up` shows what its processes log: merged, aligned, one colour per process.

Every process writes JSON lines. With `--json` they pass through as they are, and what `up` itself
has to say is a line of the same form with `"service": "up"`; a line that is not JSON, such as a
traceback at start, is wrapped in one.
"""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import typer
from rich.console import Console
from rich.text import Text

from services.cli.output import printable, stderr

_PROCESS_COLUMNS = 13
_LEVEL_COLUMNS = 7
_STYLES: Final = ("cyan", "magenta", "green", "blue", "yellow")
_LEVEL_STYLES: Final = {"warning": "yellow", "error": "bold red", "critical": "bold red"}
_SHOWN_ELSEWHERE: Final = frozenset({"timestamp", "level", "event", "service", "exception"})


class LogView:
    """Where the lines of all processes and of `up` itself meet."""

    def __init__(self, console: Console, *, as_json: bool) -> None:
        self._console = console
        self._as_json = as_json
        self._styles: dict[str, str] = {"up": "bold"}

    @property
    def as_json(self) -> bool:
        return self._as_json

    @property
    def console(self) -> Console:
        return self._console

    def line(self, process: str, line: str) -> None:
        """Show one line that a process wrote."""
        if not line.strip():
            return
        fields = _parsed(line)
        if not self._as_json:
            self._show(process, fields)
        elif "timestamp" in fields:
            typer.echo(line)
        else:
            self._echo(process, fields)

    def event(self, event: str, *, level: str = "info", **fields: Any) -> None:
        """Show something that `up` did or saw."""
        record = {"level": level, "event": event, **fields}
        if self._as_json:
            self._echo("up", record)
        else:
            self._show("up", record)

    @property
    def bars(self) -> Console:
        """Where progress is drawn: with the log on a terminal, never into JSON."""
        return stderr if self._as_json else self._console

    @contextmanager
    def waiting(self, text: str) -> Generator[None]:
        """A spinner below the log, on a terminal."""
        if self._as_json or not self._console.is_terminal:
            yield
            return
        with self._console.status(text):
            yield

    def _echo(self, service: str, fields: Mapping[str, Any]) -> None:
        stamp = datetime.now(UTC).isoformat()
        typer.echo(json.dumps({"service": service, "timestamp": stamp, **fields}))

    def _show(self, process: str, fields: Mapping[str, Any]) -> None:
        stamp, level = _clock(fields.get("timestamp")), str(fields.get("level", "info"))
        line = Text(f"{stamp} ", style="dim")
        style = self._styles.setdefault(process, _STYLES[len(self._styles) % len(_STYLES)])
        line.append(f"{process:<{_PROCESS_COLUMNS}} ", style=f"not dim {style}")
        level_style = _LEVEL_STYLES.get(level, "dim")
        line.append(f"{level:<{_LEVEL_COLUMNS}} ", style=f"not dim {level_style}")
        line.append(printable(str(fields.get("event", ""))), style="not dim bold")
        for key, value in fields.items():
            if key not in _SHOWN_ELSEWHERE:
                line.append(f" {printable(key)}=", style="dim")
                line.append(printable(_value(value)), style="not dim")
        self._console.print(line, soft_wrap=True)
        if exception := fields.get("exception"):
            self._console.print(Text(printable(str(exception)), style="red"), soft_wrap=True)


def _parsed(line: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    return fields if isinstance(fields, dict) else {"level": "info", "event": line}


def _clock(stamp: Any) -> str:
    """Local time of day of an RFC 3339 stamp, or of now."""
    try:
        moment = datetime.fromisoformat(str(stamp))
    except ValueError:
        moment = datetime.now(UTC)
    return f"{moment.astimezone():%H:%M:%S.%f}"[:-3]


def _value(value: Any) -> str:
    """A string bare where that is unambiguous, everything else as JSON."""
    if isinstance(value, str) and value and not any(c.isspace() or c in '"=' for c in value):
        return value
    return json.dumps(value, ensure_ascii=False)
