"""A whole suite as processes, started with `calumma up`, for benchmarks and end-to-end tests."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

ADAPTERS_DIR: Final = Path(__file__).parent.parent / "examples" / "adapters"
READY_TIMEOUT_S: Final = 180.0
# For those that ask the same again: what is measured is the work, not that it was done before.
NO_PREFIX_CACHE: Final = {"CALUMMA_WORKER_PREFIX_CACHE": "false"}
_STOP_TIMEOUT_S = 60.0
_PORTS = 16

Event = Mapping[str, Any]


class LoggedProcess:
    """A process that logs to its stdout. Its lines are kept and can be waited for."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def events(self) -> list[Event]:
        """All log lines so far."""
        with self._changed:
            return list(self._events)

    def wait_for(
        self, matches: Callable[[Event], bool], timeout_s: float, *, after: int = 0
    ) -> Event:
        """The first log line from index `after` on that matches. Raises TimeoutError."""
        end_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for event in self._events[after:]:
                    if matches(event):
                        return event
                left_s = end_s - time.monotonic()
                if left_s <= 0 or self._process.poll() is not None:
                    tail = "\n".join(json.dumps(event) for event in self._events[-30:])
                    raise TimeoutError(f"not seen in time; the last lines:\n{tail}")
                self._changed.wait(min(left_s, 1.0))

    def stop(self) -> int:
        """Drain as Ctrl-C does. Returns the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGINT)  # a second one ends everything at once
            code = self._process.wait(_STOP_TIMEOUT_S)
        self._reader.join(_STOP_TIMEOUT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self._events.append(_parsed(line))
                self._changed.notify_all()


class Suite(LoggedProcess):
    """A running `calumma up --json`: the log lines are its own and the services'."""

    def __init__(self, *options: str, env: Mapping[str, str] | None = None) -> None:
        port_base = free_port_base()
        self.command = ["up", "--json", "--port-base", str(port_base), *options]
        super().__init__([sys.executable, "-m", "services.cli", *self.command], env=env)
        try:
            ready = self.wait_for(_is_ready, READY_TIMEOUT_S)
        except TimeoutError:
            self.stop()
            raise
        self.endpoints: Mapping[str, Any] = ready["endpoints"]
        self.adapters: list[str] = list(ready["adapters"])

    @property
    def gateway(self) -> str:
        """host:port of the gateway."""
        return str(self.endpoints["gateway"])

    def pid(self, process: str) -> int:
        """Process id of a service, the latest if it was restarted."""
        started = [
            event
            for event in self.events
            if event.get("event") == "started" and event.get("process") == process
        ]
        return int(started[-1]["pid"])

    def kill(self, process: str) -> None:
        """SIGKILL a service; `up` starts it again."""
        os.kill(self.pid(process), signal.SIGKILL)


@contextlib.contextmanager
def running_suite(*options: str, env: Mapping[str, str] | None = None) -> Generator[Suite]:
    """A suite with the example adapters, stopped at the end. `options` are those of `up`."""
    suite = Suite(*options, env=env)
    try:
        yield suite
    finally:
        suite.stop()


def _is_ready(event: Event) -> bool:
    return event.get("service") == "up" and event.get("event") == "ready"


def _parsed(line: str) -> Event:
    try:
        value = json.loads(line)
    except ValueError:
        return {"event": line.rstrip()}
    return value if isinstance(value, dict) else {"event": line.rstrip()}


def free_port_base() -> int:
    """First of a run of ports that are free now; enough for any suite here."""
    mine = os.getpid() * _PORTS % 20_000  # processes that look at the same time look elsewhere
    for base in range(20_000 + mine, 60_000, _PORTS):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(base, base + _PORTS):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return base
    raise RuntimeError("no run of free ports")
