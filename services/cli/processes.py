"""The child processes of `calumma up`: start in order, keep alive, stop in reverse order.

Each child leads its own process group, so that Ctrl-C reaches `up` only and `up` decides the order
in which they end. A child that dies after it was ready is started again, with growing delays and
within a budget; one that dies before that ends everything.
"""

import asyncio
import os
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cli.output import CommandError
from services.common.clients import Backoff, open_channel

RESTARTS_MAX: Final = 5
RESTART_WINDOW_S: Final = 60.0
_TAIL_LINES = 20
_LINE_BYTES_MAX = 2**20
_POLL_S = 0.1
_LAST_OUTPUT_S = 2.0  # a grandchild may hold the pipe open for ever


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to start, where it will listen, and which health name says that it is ready."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    address: str
    health_name: str


class View(Protocol):
    """Who is told what happens."""

    def line(self, process: str, line: str) -> None: ...
    def event(self, event: str, *, level: str = "info", **fields: Any) -> None: ...


class Child:
    """One process, started any number of times."""

    def __init__(self, spec: ProcessSpec, view: View) -> None:
        self.spec = spec
        self._view = view
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def last_lines(self) -> str:
        return "\n".join(self._tail)

    async def start(self) -> None:
        self._tail.clear()
        self._process = await asyncio.create_subprocess_exec(
            *self.spec.argv,
            env=self.spec.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            process_group=0,
            limit=_LINE_BYTES_MAX,
        )
        assert self._process.stdout is not None
        self._reader = asyncio.create_task(self._read(self._process.stdout))
        self._view.event("started", process=self.spec.name, pid=self._process.pid)

    async def wait(self) -> int:
        """Exit code of the running process, once its last output has been read."""
        assert self._process is not None
        assert self._reader is not None
        code = await self._process.wait()
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._reader), _LAST_OUTPUT_S)
        return code

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when it serves. Raises CommandError when it dies or takes too long."""
        serving = asyncio.create_task(_wait_serving(self.spec))
        exited = asyncio.create_task(self.wait())
        try:
            await asyncio.wait(
                {serving, exited}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if exited.done():
                raise CommandError(
                    f"{self.spec.name} died at start with exit code {exited.result()}",
                    hint=f"its last lines:\n{self.last_lines}" if self._tail else "",
                )
            if not serving.done():
                raise CommandError(
                    f"{self.spec.name} was not ready after {timeout_s:g} s",
                    hint="--ready-timeout gives it longer",
                )
            serving.result()
        finally:
            await _cancel(serving, exited)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL when it has not ended in time."""
        if not self.is_running:
            return
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.wait(), grace_s)
        except TimeoutError:
            self._view.event("killed", level="warning", process=self.spec.name, waited_s=grace_s)
            self.kill()
            await self.wait()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        """To the whole group: the child may have children. It leads the group, so pid = group."""
        if self._process is not None and self.is_running:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def _read(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                data = await stream.readline()
            except ValueError:  # longer than the limit: the reader has dropped it
                data = b"(a line that was too long)\n"
            if not data:
                return
            line = data.decode(errors="replace").rstrip("\n")
            self._tail.append(line)
            self._view.line(self.spec.name, line)


class Suite:
    """All children, in the order in which they start."""

    def __init__(self, specs: tuple[ProcessSpec, ...], view: View) -> None:
        self.children = tuple(Child(spec, view) for spec in specs)
        self._view = view

    async def keep_alive(self) -> None:
        """Start again what dies. Ends only by CommandError, when one dies too often."""
        tasks = [asyncio.create_task(self._keep(child)) for child in self.children]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await _cancel(*tasks)

    async def stop(self, grace_s: float) -> None:
        """End the children one by one, the last started first."""
        for child in reversed(self.children):
            await child.stop(grace_s)

    def kill(self) -> None:
        """End everything at once."""
        for child in self.children:
            child.kill()

    async def _keep(self, child: Child) -> None:
        backoff = Backoff(base_s=0.5, cap_s=10.0)
        restarts: deque[float] = deque()
        while True:
            code = await child.wait()
            now_s = time.monotonic()
            while restarts and now_s - restarts[0] > RESTART_WINDOW_S:
                restarts.popleft()
            name = child.spec.name
            if len(restarts) == RESTARTS_MAX:
                raise CommandError(
                    f"{name} died {RESTARTS_MAX + 1} times within {RESTART_WINDOW_S:g} s",
                    hint=f"its last lines:\n{child.last_lines}" if child.last_lines else "",
                )
            if not restarts:
                backoff.reset()
            restarts.append(now_s)
            delay_s = round(backoff.next_delay_s(), 3)
            self._view.event(
                "died", level="error", process=name, exit_code=code, restart_in_s=delay_s
            )
            await asyncio.sleep(delay_s)
            await child.start()


async def _wait_serving(spec: ProcessSpec) -> None:
    request = health_pb2.HealthCheckRequest(service=spec.health_name)
    async with open_channel(spec.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its types lack the methods
        while True:
            try:
                response = await stub.Check(request, timeout=1.0)
            except grpc.aio.AioRpcError:
                pass  # not listening yet
            else:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(_POLL_S)


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
