"""A TCP proxy with faults, to stand between a client and a real server.

A fault belongs to connections: setting one ends those that are open, and the next `connections` of
them get it (None: all). Bytes are counted from the server's side, per connection, headers included.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

CONNECTIONS_MAX: Final = 256
_READ_BYTES: Final = 2**16
_TICK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a connection. All None: nothing."""

    refuse: bool = False  # it ends at once
    answer: bytes | None = None  # HTTP, to every request, in place of the server's
    latency_s: float = 0.0  # before anything passes
    reset_after_bytes: int | None = None
    end_after_bytes: int | None = None  # orderly, as if that were all
    stall_after_bytes: int | None = None
    corrupt_at_byte: int | None = None
    corrupt_every_bytes: int | None = None
    bytes_per_s: int | None = None
    connections: int | None = None


CLEAN: Final = Fault()


class FaultProxy:
    """One proxy. `url` is where clients go."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self._fault = CLEAN
        self._left: int | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""
        self.requests = 0  # answered by `answer`
        self.connections = 0
        self.faulted = 0  # connections that had a fault
        self.sent_bytes = 0  # to clients

    def set(self, fault: Fault) -> None:
        """Have this fault from now on."""
        self._fault, self._left = fault, fault.connections
        self.requests = self.connections = self.faulted = self.sent_bytes = 0
        for writer in self._open:
            writer.transport.abort()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(writer)
        self.connections += 1
        try:
            if len(self._open) <= CONNECTIONS_MAX:
                # Cancelled by `close`: a callback of asyncio's asks this task for its exception.
                with contextlib.suppress(
                    OSError, asyncio.IncompleteReadError, asyncio.CancelledError
                ):
                    await self._serve(self._next_fault(), reader, writer)
        finally:
            self._open.discard(writer)
            self._tasks.discard(task)
            writer.close()

    async def close(self) -> None:
        """End all connections."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _next_fault(self) -> Fault:
        if self._fault is CLEAN or self._left == 0:
            return CLEAN
        if self._left is not None:
            self._left -= 1
        self.faulted += 1
        return self._fault

    async def _serve(
        self, fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if fault.refuse:
            writer.transport.abort()
            return
        await asyncio.sleep(fault.latency_s)
        if fault.answer is not None:
            while request := await reader.readuntil(b"\r\n\r\n"):
                self.requests += 1
                head, blank, body = fault.answer.partition(b"\r\n\r\n")
                writer.write(head + blank + (b"" if request.startswith(b"HEAD") else body))
                await writer.drain()
        from_server, to_server = await asyncio.open_connection(*self._upstream)
        requests = asyncio.create_task(_copy(reader, to_server))
        try:
            await self._answers(fault, from_server, writer)
        finally:
            requests.cancel()
            to_server.transport.abort()

    async def _answers(
        self, fault: Fault, from_server: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        passed = 0
        read_bytes = _READ_BYTES
        if fault.bytes_per_s is not None:
            read_bytes = max(1, int(fault.bytes_per_s * _TICK_S))
        limits = (fault.reset_after_bytes, fault.end_after_bytes, fault.stall_after_bytes)
        limit = min((one for one in limits if one is not None), default=None)
        while data := await from_server.read(read_bytes):
            if fault.bytes_per_s is not None:
                await asyncio.sleep(_TICK_S)
            if limit is not None and passed + len(data) >= limit:
                writer.write(data[: limit - passed])
                await writer.drain()
                self.sent_bytes += limit - passed
                await self._broken_off(fault, writer)
                return
            writer.write(_corrupted(data, fault, passed))
            await writer.drain()
            passed += len(data)
            self.sent_bytes += len(data)

    async def _broken_off(self, fault: Fault, writer: asyncio.StreamWriter) -> None:
        if fault.stall_after_bytes is not None:
            await asyncio.Event().wait()  # until the client or the test ends it
        if fault.reset_after_bytes is not None:
            await asyncio.sleep(0.05)  # what was sent before is to arrive
            writer.transport.abort()


def http(status: str, body: str = "") -> bytes:
    """An HTTP answer that keeps the connection."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@asynccontextmanager
async def run_fault_proxy(upstream: str) -> AsyncGenerator[FaultProxy]:
    """A proxy before "http://host:port"."""
    host, _, port = upstream.removeprefix("http://").rpartition(":")
    proxy = FaultProxy(host, int(port))
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_READ_BYTES):
            writer.write(data)
            await writer.drain()


def _corrupted(data: bytes, fault: Fault, passed: int) -> bytes:
    stop = passed + len(data)
    positions = [fault.corrupt_at_byte] if fault.corrupt_at_byte is not None else []
    if every := fault.corrupt_every_bytes:
        positions += range(-(-max(passed, 1) // every) * every, stop, every)
    damaged = bytearray(data)
    for position in positions:
        if passed <= position < stop:
            damaged[position - passed] ^= 1
    return bytes(damaged)
