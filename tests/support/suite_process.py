"""`calumma up` as a process, for tests that want the whole suite as a user has it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench.suite import free_port_base
from services.common import base_model

READY_TIMEOUT_S = 90


@dataclass
class SuiteProcess:
    """One `calumma up --json`."""

    process: subprocess.Popen[str]
    port_base: int
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def gateway(self) -> str:
        return f"127.0.0.1:{self.port_base}"

    @property
    def options(self) -> list[str]:
        """What makes any other command speak to this suite."""
        names = ("gateway", "scheduler", "worker", "adapter-store")
        pairs = [(f"--{n}", f"127.0.0.1:{self.port_base + i}") for i, n in enumerate(names)]
        return [word for pair in pairs for word in pair]

    def read_until(self, event: str, **fields: Any) -> dict[str, Any]:
        """The next line of `up` itself with this event. Every line on the way must be JSON."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))
            record = self.lines[-1]
            if record.items() >= {"service": "up", "event": event, **fields}.items():
                return record
        raise AssertionError(f"no {event!r}; the last lines: {self.lines[-10:]}")

    def pids(self) -> list[int]:
        """Of everything that it ever started."""
        return [
            line["pid"] for line in self.lines if line.get("event") == "started" and "pid" in line
        ]

    def end(self, number: signal.Signals = signal.SIGINT, *, times: int = 1) -> int:
        """Signal it, read what it still says, and return its exit code."""
        assert self.process.stdout is not None
        self.process.send_signal(number)
        for _ in range(times - 1):
            self.read_until("draining")
            self.process.send_signal(number)
        self.lines.extend(json.loads(line) for line in self.process.stdout)
        return self.process.wait(30)

    def command(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run another `calumma` command against this suite."""
        return subprocess.run(
            [sys.executable, "-m", "services.cli", *self.options, *arguments],
            input=text,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@contextmanager
def running_suite(home: Path, *options: str, workers: int = 1) -> Generator[SuiteProcess]:
    """Start it; read on with `read_until("ready")`. Killed at the end if it still runs."""
    port_base = free_port_base()
    arguments = ["up", "--json", "--home", str(home), "--port-base", str(port_base)]
    process = subprocess.Popen(
        [sys.executable, "-m", "services.cli", *arguments, f"--workers={workers}", *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    suite = SuiteProcess(process, port_base)
    try:
        yield suite
    finally:
        if process.poll() is None:
            suite.end()
        assert process.stdout is not None
        process.stdout.close()


def default_model_folder() -> Path:
    """The pulled default model; skips the test where it is not there."""
    try:
        return base_model.locate(base_model.DEFAULT_MODEL)
    except base_model.ModelNotFoundError as error:
        pytest.skip(str(error))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
