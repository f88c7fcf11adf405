"""The processes of all shards but the first: started, told what to do, watched, ended.

They are started anew, not forked: this process has threads, and perhaps a device. They live as long
as their connections: when this process ends, however it does, so do they. Signals of a terminal go
to this process only, which ends them when its work is done.

Losing one is final. Whoever notices it first notes why: the thread that waits for the process and
reads its last words, or a collective or an answer that did not come in time. From then on every
call raises EngineLostError.
"""

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from services.worker.engine.api import EngineLostError
from services.worker.engine.parallel_wire import Done

START_TIMEOUT_S: Final = 600.0  # a process imports torch and loads its part of the model
SEND_TIMEOUT_S: Final = 30.0  # for a process that does not read what it is told
END_TIMEOUT_S: Final = 5.0  # then it is killed
_LAST_WORDS_S: Final = 0.5
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Peer:
    """Another shard's process. Messages: `services.worker.engine.parallel_wire`."""

    index: int
    process: subprocess.Popen[bytes]
    steps: Connection
    adapters: Connection
    last_words: BinaryIO  # why it failed, once it has

    def end(self) -> None:
        """Wait for it to end, a little; then make it."""
        try:
            self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Team:
    """All of them."""

    def __init__(self, count: int, *, timeout_s: float) -> None:
        """`count`: of shards, this process's own included. `timeout_s`: for an answer."""
        self.count = count
        self._timeout_s = timeout_s
        self._on_lost: list[Callable[[EngineLostError], None]] = []
        self._lost: str | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        self._is_lost = threading.Event()
        self.peers: tuple[Peer, ...] = tuple(_start_peer(index) for index in range(1, count))
        self._watchers = [
            threading.Thread(target=self._watch, args=(peer,), name="shard", daemon=True)
            for peer in self.peers
        ]
        for watcher in self._watchers:
            watcher.start()

    def watch(self, on_lost: Callable[[EngineLostError], None]) -> None:
        """Call it when one of them is lost, from any thread, unless the team was closed before."""
        with self._lock:
            self._on_lost.append(on_lost)
            if self._lost is not None:
                on_lost(EngineLostError(self._lost))

    def check(self) -> None:
        """Raises EngineLostError if any of them is gone."""
        if self._lost is not None:
            with self._lock:  # whoever watches has been told
                raise EngineLostError(self._lost)

    def tell(self, message: object) -> None:
        """Say the same to all, on the connection for steps. Raises EngineLostError."""
        self.check()
        for peer in self.peers:
            self.send(peer, peer.steps, message)

    def send(self, peer: Peer, connection: Connection, message: object) -> None:
        """Raises EngineLostError."""
        try:
            connection.send(message)
        except OSError as error:
            raise self.lose(f"{self._name(peer)} can't be told anything: {error}") from error

    def await_all(self, answer: type[_Answer], *, timeout_s: float | None = None) -> None:
        """Wait for this answer of each, on the connection for steps. Raises EngineLostError."""
        deadline_s = time.monotonic() + (timeout_s or self._timeout_s)
        for peer in self.peers:
            self.receive(peer, peer.steps, answer, deadline_s=deadline_s)

    def await_adapters(self) -> list[Done]:
        """Each one's answer on the connection for adapters. Raises EngineLostError."""
        deadline_s = time.monotonic() + self._timeout_s
        return [
            self.receive(peer, peer.adapters, Done, deadline_s=deadline_s) for peer in self.peers
        ]

    def receive(
        self, peer: Peer, connection: Connection, answer: type[_Answer], *, deadline_s: float
    ) -> _Answer:
        """Raises EngineLostError."""
        try:
            if not connection.poll(max(0.0, deadline_s - time.monotonic())):
                raise self.lose(f"{self._name(peer)} does not answer")
            message = connection.recv()
        except (EOFError, OSError) as error:
            raise self.lose(f"{self._name(peer)} has closed its connection") from error
        assert isinstance(message, answer)
        return message

    def lose(self, reason: str) -> EngineLostError:
        """Note that the engine is lost, and end what is left of it.

        `reason` counts unless there is a better one: that of a process that has failed.
        """
        self._is_lost.wait(_LAST_WORDS_S)
        self._note(reason)
        for peer in self.peers:
            peer.process.kill()
        assert self._lost is not None
        return EngineLostError(self._lost)

    def close(self) -> None:
        """End all of them. Harmless when they have ended."""
        with self._lock:
            self._is_closed = True
        for peer in self.peers:
            peer.steps.close()
            peer.adapters.close()
        for peer in self.peers:
            peer.end()
        for watcher in self._watchers:
            watcher.join()

    def _watch(self, peer: Peer) -> None:
        code = peer.process.wait()
        with peer.last_words:
            words = peer.last_words.read().decode(errors="replace")
        how = f"failed: {words}" if words else f"ended with code {code}"
        self._note(f"{self._name(peer)} {how}")

    def _note(self, reason: str) -> None:
        with self._lock:
            if self._lost is not None or self._is_closed:
                self._lost = self._lost or "the engine was closed"
                return
            self._lost = reason
            for on_lost in self._on_lost:
                on_lost(EngineLostError(reason))
            self._is_lost.set()

    def _name(self, peer: Peer) -> str:
        return f"shard {peer.index} of {self.count}"


def _start_peer(index: int) -> Peer:
    steps, its_steps = socket.socketpair()
    adapters, its_adapters = socket.socketpair()
    words, its_words = os.pipe()
    with its_steps, its_adapters, os.fdopen(its_words, "wb"):
        numbers = (its_steps.fileno(), its_adapters.fileno(), its_words)
        module = "services.worker.engine.parallel_child"
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *map(str, numbers)],
            env=os.environ | {"PYTHONPATH": _python_path()},
            stdin=subprocess.DEVNULL,
            pass_fds=numbers,
            start_new_session=True,
        )
    connections = (_connection(steps), _connection(adapters))
    return Peer(index, process, *connections, os.fdopen(words, "rb"))


def _connection(end: socket.socket) -> Connection:
    limit = struct.pack("ll", int(SEND_TIMEOUT_S), 0)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    return Connection(end.detach())


def _python_path() -> str:
    """Where this process finds its modules."""
    return os.pathsep.join(str(Path(place or ".").absolute()) for place in sys.path)
