"""A link as between machines: a TCP relay that passes so many bytes a second, each a while later.

All connections share the rate of what comes back from the target, as behind one network port; what
goes to the target passes at once, so `delay_s` is the round trip. The relay is a process of its
own. Prints its address and runs until its standard input ends:
`python bench/coldstart/link.py TARGET_HOST:PORT BYTES_PER_S DELAY_S`.
"""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

import uvloop

_READ_BYTES: Final = 2**16
_AHEAD_S: Final = 0.01  # beyond the delay: what the link's own buffer holds
_START_S_MAX: Final = 30.0


@dataclass(frozen=True, slots=True)
class Link:
    """A kind of link."""

    name: str
    bytes_per_s: float
    delay_s: float


@dataclass(frozen=True, slots=True)
class RunningLink:
    """Where to dial instead of the target, and which process to look at."""

    address: str
    pid: int


@contextlib.contextmanager
def running_link(link: Link, target: str) -> Generator[RunningLink]:
    """A relay to the target, ended at the end."""
    rate, delay = str(link.bytes_per_s), str(link.delay_s)
    argv = [sys.executable, "-P", __file__, target, rate, delay]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            if not address:
                raise RuntimeError("the relay did not start")
            yield RunningLink(address, process.pid)
        finally:
            process.stdin.close()
            process.wait(_START_S_MAX)


class _Pace:
    """When bytes that come now have passed."""

    def __init__(self, bytes_per_s: float, delay_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._delay_s = delay_s
        self._free_s = 0.0  # when the link has sent all that it was given

    def passed_s(self, size_bytes: int, *, now: float) -> float:
        self._free_s = max(now, self._free_s) + size_bytes / self._bytes_per_s
        return self._free_s + self._delay_s

    @property
    def pieces_max(self) -> int:
        """Pieces under way: no more than what is sent during the delay, and a little."""
        return 1 + int((self._delay_s + _AHEAD_S) * self._bytes_per_s / _READ_BYTES)


async def _relay(target: str, pace: _Pace) -> None:
    host, _, port = target.rpartition(":")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back_reader, back_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(_pass_at_once(reader, back_writer))
            group.create_task(_pass_at_pace(back_reader, writer, pace))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    bound = server.sockets[0].getsockname()
    print(f"{bound[0]}:{bound[1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


async def _pass_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_READ_BYTES):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _pass_at_pace(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pace: _Pace
) -> None:
    """Two tasks: one reads at the link's pace, the other writes what has passed."""
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(pace.pieces_max)
    clock = asyncio.get_running_loop().time

    async def deliver() -> None:
        with contextlib.suppress(OSError):
            while True:
                passed_s, data = await under_way.get()
                if (wait_s := passed_s - clock()) > 0:
                    await asyncio.sleep(wait_s)
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        writer.close()

    delivering = asyncio.create_task(deliver())
    with contextlib.suppress(OSError):
        while not delivering.done() and (data := await reader.read(_READ_BYTES)):
            await under_way.put((pace.passed_s(len(data), now=clock()), data))
    if not delivering.done():
        await under_way.put((clock(), b""))
    await delivering


if __name__ == "__main__":
    _target, _bytes_per_s, _delay_s = sys.argv[1:]
    uvloop.run(_relay(_target, _Pace(float(_bytes_per_s), float(_delay_s))))
