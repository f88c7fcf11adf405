"""The children of `calumma up`: started, watched, started again, ended."""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from services.cli import processes
from services.cli.output import CommandError
from services.cli.processes import Child, ProcessSpec, Suite
from services.common.clients import Backoff

SCRIPT = Path(__file__).with_name("fake_process.py")


class Recorder:
    """Everything that a view is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.events: list[dict[str, Any]] = []

    def line(self, process: str, line: str) -> None:
        self.lines.append((process, line))

    def event(self, event: str, *, level: str = "info", **fields: Any) -> None:
        self.events.append({"event": event, "level": level, **fields})

    def named(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.events if record["event"] == event]


def spec(name: str, mode: str = "serves") -> ProcessSpec:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    argv = (sys.executable, str(SCRIPT), address, mode)
    return ProcessSpec(name, argv, dict(os.environ), address, "probe")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_child_is_ready_when_its_health_says_so_and_ends_on_sigterm() -> None:
    view = Recorder()
    child = Child(spec("one"), view)
    await child.start()
    await child.wait_ready(20)
    pid = view.named("started")[0]["pid"]
    assert os.getpgid(pid) == pid  # Ctrl-C at the terminal does not reach it
    await child.stop(10)
    assert not is_alive(pid)
    assert [line for _, line in view.lines][-1] == "a last word"
    assert ("one", "a bare line") in view.lines


async def test_a_child_that_dies_at_start_is_named_with_its_last_lines() -> None:
    child = Child(spec("one", "dies"), Recorder())
    await child.start()
    with pytest.raises(CommandError) as raised:
        await child.wait_ready(20)
    assert raised.value.message == "one died at start with exit code 3"
    assert "a bare line" in raised.value.hint


async def test_a_child_that_is_not_ready_in_time_is_an_error() -> None:
    view = Recorder()
    child = Child(spec("one", "silent"), view)
    await child.start()
    with pytest.raises(CommandError, match=r"not ready after 0\.5 s"):
        await child.wait_ready(0.5)
    await child.stop(10)
    assert not is_alive(view.named("started")[0]["pid"])


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace_period() -> None:
    view = Recorder()
    child = Child(spec("one", "stubborn"), view)
    await child.start()
    await child.wait_ready(20)
    await child.stop(0.3)
    assert view.named("killed")[0]["process"] == "one"
    assert not is_alive(view.named("started")[0]["pid"])


async def test_children_end_in_reverse_order() -> None:
    view = Recorder()
    suite = Suite((spec("first"), spec("second")), view)
    for child in suite.children:
        await child.start()
        await child.wait_ready(20)
    await suite.stop(10)
    last_words = [process for process, line in view.lines if line == "a last word"]
    assert last_words == ["second", "first"]


async def test_a_child_that_dies_later_is_started_again() -> None:
    view = Recorder()
    suite = Suite((spec("one"),), view)
    (child,) = suite.children
    await child.start()
    await child.wait_ready(20)
    keeping = asyncio.create_task(suite.keep_alive())
    os.kill(view.named("started")[0]["pid"], signal.SIGKILL)
    while len(view.named("started")) < 2:
        await asyncio.sleep(0.02)
    await child.wait_ready(20)
    assert view.named("died")[0]["exit_code"] == -signal.SIGKILL
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    await suite.stop(10)
    assert not any(is_alive(record["pid"]) for record in view.named("started"))


async def test_a_child_that_dies_too_often_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_delay(_backoff: Backoff) -> float:
        return 0.0

    monkeypatch.setattr(Backoff, "next_delay_s", no_delay)
    monkeypatch.setattr(processes, "RESTARTS_MAX", 2)
    view = Recorder()
    suite = Suite((spec("one", "dies"),), view)
    await suite.children[0].start()
    with pytest.raises(CommandError, match="one died 3 times within 60 s"):
        await suite.keep_alive()
    assert len(view.named("started")) == 3
