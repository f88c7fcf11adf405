"""Single services as processes, with their log lines and how much memory they take."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Final

LIMIT_S: Final = 300.0
_STOP_S: Final = 20.0

Event = Mapping[str, Any]


class ServiceProcess:
    """One `python -m services.NAME`."""

    def __init__(self, name: str, *options: str) -> None:
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"services.{name}", "--log-format", "json", *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def memory_bytes(self) -> int:
        """Anonymous memory of the process that is in RAM: not that of mapped files."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024

    def wait_for(self, event: str) -> Event:
        """The first log line with this event. Raises TimeoutError."""
        end_s = time.monotonic() + LIMIT_S
        with self._changed:
            while True:
                for seen in self._events:
                    if seen.get("event") == event:
                        return seen
                self._check(event, end_s)
                self._changed.wait(1.0)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Until the condition holds. Raises TimeoutError."""
        end_s = time.monotonic() + LIMIT_S
        while not condition():
            self._check(what, end_s)
            time.sleep(0.02)

    def stop(self) -> None:
        """End it, and wait until it has."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_STOP_S)
        self._reader.join(_STOP_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _check(self, what: str, end_s: float) -> None:
        if time.monotonic() > end_s or self._process.poll() is not None:
            tail = "\n".join(json.dumps(event) for event in self._events[-20:])
            raise TimeoutError(f"{what} not seen; the last lines:\n{tail}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError), self._changed:
                self._events.append(json.loads(line))
                self._changed.notify_all()


@contextlib.contextmanager
def service(name: str, **settings: object) -> Generator[ServiceProcess]:
    """A running service, stopped at the end. `settings` are its flags."""
    options = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    process = ServiceProcess(name, *options)
    try:
        yield process
    finally:
        process.stop()
